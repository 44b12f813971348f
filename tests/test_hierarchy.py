"""Without these, nodes could drift apart, or narrow codes could travel where the user paid for 16 bits."""

import json
import os
from dataclasses import replace

import pytest
import torch
from launching import TINY_RECIPE
from links import counted_bytes
from test_reducer import GROUPINGS, SHAPES, WIDTHS, chunks_of, gradients_of, make_reducer, octets, reduced
from worlds import make_world

from cyclebnn_dist import train
from cyclebnn_dist.comm import build_layout
from cyclebnn_dist.comm.levels import GAUSSIAN_DISTORTION
from cyclebnn_dist.comm.traffic import count_step
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.world import local_world_size, ranks_per_node

RECIPE = TINY_RECIPE.replace("error_feedback: true", "hierarchical: true")


def make_hierarchical(rank, n, per_node, **options):
    return make_reducer(rank, n, hierarchical=True, ranks_per_node=per_node, **options)


def average_in_every_grouping(rank, n, per_node, comm):
    reducer = make_hierarchical(rank, n, per_node, **comm)
    results = {}
    for step, bits in enumerate(WIDTHS):
        for grouping in GROUPINGS:
            tensors = reduced(reducer, gradients_of(rank, step), step=step, bits=bits, grouping=grouping)
            results[bits, grouping] = octets(tensors)
        with chunks_of(1000):
            tensors = reduced(reducer, gradients_of(rank, step), step=step, bits=bits)
        results[bits, "several chunks"] = octets(tensors)
    reducer.close()
    return results


@pytest.mark.parametrize(
    ("n", "per_node", "comm"),
    [
        (4, 2, {}),
        (4, 2, {"codec": "minmax", "small_bits": 16}),
        (4, 2, {"codec": "absmax", "second_phase_extra_bits": 1}),
        (6, 3, {}),
        (3, 3, {}),
    ],
)
def test_the_result_is_the_same_on_all_ranks_of_all_nodes_and_in_all_buckets(ranks, n, per_node, comm):
    results = ranks(n, average_in_every_grouping, per_node, comm)
    for bits in WIDTHS:
        ways = (*GROUPINGS, "several chunks")
        assert len({result[bits, way] for result in results for way in ways}) == 1, f"{bits} bits"


def average(rank, n, per_node):
    reducer = make_hierarchical(rank, n, per_node)
    results = {bits: reduced(reducer, gradients_of(rank, 0), step=0, bits=bits) for bits in (3, 4, 5, 16, 32)}
    narrow = reduced(
        reducer, {name: g.to(torch.bfloat16) for name, g in gradients_of(rank, 0).items()}, step=0, bits=32
    )
    reducer.close()
    return results, narrow


def test_sums_run_within_nodes_in_order_then_over_nodes_in_order(ranks):
    results, narrow = ranks(4, average, 2)[0]
    for name in SHAPES:
        gradients = [gradients_of(rank, 0)[name] for rank in range(4)]
        nodes = [(gradients[0] + gradients[1]) / 2, (gradients[2] + gradients[3]) / 2]
        assert torch.equal(results[32][name], (nodes[0] + nodes[1]) / 2)
        torch.testing.assert_close(results[16][name], results[32][name], rtol=0.02, atol=0.02)
        torch.testing.assert_close(narrow[name].float(), results[32][name], rtol=0.02, atol=0.02)
        if name in ("stem", "bias", "scale"):
            assert torch.equal(results[4][name], results[32][name])


def test_the_error_is_that_of_the_nodes_messages_not_of_the_ranks(ranks):
    """Two roundings, the first of which is averaged over two independent nodes: D R/M + D, with R/M = 1 for noise."""
    results, _ = ranks(4, average, 2)[0]
    for bits in (3, 4, 5):
        one = GAUSSIAN_DISTORTION[bits] / (1 - GAUSSIAN_DISTORTION[bits])
        lost = sum(float((results[bits][n] - results[32][n]).square().sum()) for n in ("conv", "wide"))
        energy = sum(float(results[32][n].square().sum()) for n in ("conv", "wide"))
        assert lost / energy == pytest.approx(one + one * (1 + one), rel=0.15), f"{bits} bits"


def count_by_group(rank, n, per_node, bits):
    """Bytes that left this rank for others, near and far, counted where torch gets them, and the reducer's counters."""
    reducer = make_hierarchical(rank, n, per_node)
    near, far = reducer._nodes.near, reducer._nodes.far
    with counted_bytes() as counted:
        reduced(reducer, gradients_of(rank, 0), step=0, bits=bits)
        reducer.close()
    assert counted.keys() == {near, far}
    return {"near": counted[near], "far": counted[far]}, reducer.counters


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_bytes_between_nodes_are_counted_apart_and_foretold(ranks, bits):
    layout = build_layout(
        [(name, torch.empty(shape)) for name, shape in SHAPES.items()],
        world_size=4,
        block_size=64,
        small_bits=32,
        small_numel=1024,
        ranks_per_node=2,
    )
    numel = layout.parameters[1].numel + layout.parameters[3].numel + layout.parameters[5].numel
    for rank, (counted, counters) in enumerate(ranks(4, count_by_group, 2, bits)):
        assert (counters.far_bytes, counters.sent_bytes) == (counted["far"], sum(counted.values()))
        foretold = count_step(layout, [range(len(SHAPES))], bits=bits, codec="hadamard", rank=rank)
        assert (foretold.far_bytes, foretold.sent_bytes) == (counters.far_bytes, counters.sent_bytes)
        wide = numel * (bits / 8 + (2 / 64 if bits <= 8 else 0))
        small = (layout.parameters[0].numel + 41) * 4
        half_of_it_each_way = 2 * (1 / 2) * (wide + small) / 2
        assert counters.far_bytes == pytest.approx(half_of_it_each_way, rel=0.05)


def out_of_step(rank, n, per_node, folder):
    """A rank that fails ends, as in a run, and says why where others do not look."""
    reducer = make_hierarchical(rank, n, per_node)
    try:
        reducer.reduce(gradients_of(rank, 0), step=7 + (rank == 3), bits=4).wait()
    except RuntimeError as error:
        (folder / f"rank_{rank}").write_text(str(error))
        os._exit(1)


def test_a_rank_of_another_node_out_of_step_is_named_and_ends_all(ranks, tmp_path):
    outcomes = ranks.outcomes(4, out_of_step, 2, tmp_path, timeout_seconds=40)
    assert outcomes == [("lost", "the process ended")] * 4
    said = {rank: (tmp_path / f"rank_{rank}").read_text() for rank in range(4)}
    assert "rank 3 sent step 8 instead of 7" in said[2]
    assert "rank 2 sent step 7 instead of 8" in said[3]
    for rank in (0, 1):
        assert "If a peer has ended, its own log says why" in said[rank]


def train_on_two_nodes(rank, size, path, overrides):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.use_deterministic_algorithms(True)
    try:
        world = replace(make_world(rank, size), local_rank=rank % 2)
        return train.run_recipe(load_recipe(path, [*overrides, "wandb.mode=disabled"]), world)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def test_a_run_on_two_nodes_of_two_ranks_ends_with_equal_parameters(ranks, tmp_path, tiny_data):
    """comm.check_every=1 compares all parameters across ranks after every step."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    assert ranks(4, train_on_two_nodes, path, ["train.epochs=1"]) == [train.FINISHED] * 4
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["far_bytes"] < summary["sent_bytes"] / 3
    assert "to other nodes" in (tmp_path / "run" / "summary.txt").read_text()


def ask_for_nodes(rank, size, local_sizes, local_ranks):
    if local_sizes[rank]:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_sizes[rank])
    try:
        return ranks_per_node(replace(make_world(rank, size), local_rank=local_ranks[rank]))
    except RecipeError as error:
        return str(error)
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)


@pytest.mark.parametrize(
    ("local_sizes", "local_ranks", "answer"),
    [
        ([2, 2, 2, 2], [0, 1, 0, 1], 2),
        ([4, 4, 4, 4], [0, 1, 2, 3], 4),
        ([0, 0, 0, 0], [0, 1, 0, 1], "is not known"),
        ([2, 2, 2, 2], [0, 0, 1, 1], "not spread evenly"),
        ([3, 3, 3, 1], [0, 1, 2, 0], "not spread evenly"),
    ],
)
def test_nodes_must_hold_equally_many_consecutive_ranks(ranks, local_sizes, local_ranks, answer):
    for found in ranks(4, ask_for_nodes, local_sizes, local_ranks):
        if isinstance(answer, int):
            assert found == answer
        else:
            assert "comm.hierarchical" in found
            assert answer in found


def test_the_size_of_a_node_is_torchruns_or_slurms():
    assert local_world_size(environ={"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "4"}) == 8
    assert local_world_size(environ={"SLURM_NTASKS_PER_NODE": "4"}) == 4
    assert local_world_size(environ={}) == 0


def test_residuals_beside_nodes_are_refused(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    with pytest.raises(RecipeError, match=r"beside comm\.hierarchical=true"):
        load_recipe(path, ["comm.error_feedback=true"])
