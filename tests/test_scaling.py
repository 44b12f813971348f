"""The scaling model. Without these a user would rent a cluster by numbers that no cluster has."""

import json
import time
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import TINY_RECIPE
from links import slow_link
from worlds import make_world

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.comm.breakeven import CodecCost, Load, exchange_seconds
from cyclebnn_dist.comm.measure import measure_codec, measure_link
from cyclebnn_dist.comm.scaling import Cluster, exposed_seconds, step_exposure
from cyclebnn_dist.comm.traffic import bucket_loads
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import CommConfig
from cyclebnn_dist.preview import Length, preview
from cyclebnn_dist.preview.cluster import parse_clusters, parse_nodes, parse_rate
from cyclebnn_dist.preview.scaling import plan_scaling
from cyclebnn_dist.world import largest_over_ranks

TICKS = 12


def tick_by_tick(ready, seconds):
    """The same queue, watched: at every tick the first bucket in line works, if it has come."""
    left, tick = list(seconds), 0
    while any(left):
        first = next(place for place, rest in enumerate(left) if rest)
        if ready[first] <= tick:
            left[first] -= 1
        tick += 1
    return max(0, tick - TICKS)


@given(st.lists(st.tuples(st.integers(0, TICKS), st.integers(0, 9)), min_size=1, max_size=6))
def test_what_a_queue_leaves_exposed_is_what_is_seen_watching_it(buckets):
    ready = sorted(ready for ready, _ in buckets)
    seconds = [seconds for _, seconds in buckets]
    exchanges = [(at / TICKS, float(takes)) for at, takes in zip(ready, seconds, strict=True)]
    found = exposed_seconds(exchanges, backward_seconds=float(TICKS))
    assert found == pytest.approx(tick_by_tick(ready, seconds))


def test_without_computation_all_is_exposed_and_with_much_of_it_only_the_last_bucket():
    loads = [Load({4: 3000}, 2000), Load({4: 5000}, 4000)]
    costs, link = {4: CodecCost(1e-9, 1e-9)}, Cluster(2, 1, 1e6, 1e9, 1e-6).link()
    first, last = (exchange_seconds(load, costs, link, world_size=2, overlap=False) for load in loads)

    def exposed(**given):
        return step_exposure(loads, costs, link, world_size=2, overlap=False, **given)

    assert exposed(compute_seconds=0.0) == pytest.approx(first + last)
    assert exposed(compute_seconds=100.0) == pytest.approx(last)
    between = exposed(compute_seconds=3 * first, passes=2)
    assert between == pytest.approx(max(3 / 8 * first + first, first) + last - first), "of one pass of two"
    assert step_exposure(loads, costs, link, world_size=1, compute_seconds=1.0, overlap=False) == 0.0


@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e6, 1e12), st.floats(1e6, 1e12))
def test_links_carry_what_all_pairs_of_ranks_send_each_other(nodes, gpus, network, intra):
    cluster = Cluster(nodes, gpus, network, intra, 1e-6)
    ranks = [(node, gpu) for node in range(nodes) for gpu in range(gpus)]
    if len(ranks) == 1:
        return
    leaving, staying = Counter(), Counter()
    for source in ranks:
        for target in ranks:
            if source != target:
                (staying if source[0] == target[0] else leaving)[source] += 1
    of_nodes = Counter()
    for (node, _), messages in leaving.items():
        of_nodes[node] += messages
    seconds = max([n / network for n in of_nodes.values()] + [n / intra for n in staying.values()])
    link = cluster.link()
    assert (len(ranks) - 1) / link.bytes_per_second == pytest.approx(seconds)
    assert link.latency_seconds == pytest.approx(2e-6 * (len(ranks) - 1))


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100gbit", 12.5e9), ("25Gbit", 3.125e9), ("1gbit", 1.25e8), ("100mbit", 1.25e7), ("2.5e9", 2.5e9)],
)
def test_networks_are_read_as_their_makers_write_them(text, rate):
    assert parse_rate("--network", text) == rate


@given(st.text(max_size=8))
@settings(max_examples=200)
def test_no_text_at_all_ends_in_a_traceback(text):
    for parse in (lambda: parse_rate("--network", text), lambda: parse_nodes(text)):
        try:
            found = parse()
        except RecipeError:
            continue
        assert found if isinstance(found, list) else 0 < found < float("inf")


@pytest.fixture
def recipe(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return load_recipe(path)


def clusters(nodes, *, gpus=1, network="1gbit"):
    return parse_clusters(nodes=nodes, gpus_per_node=gpus, network=network, intra="pcie", message_us=1.0)


def test_a_plan_counts_the_bytes_that_the_schedule_command_counts(recipe):
    """Those are held against real runs; they have the first step, too, which DDP sends in one bucket."""
    length = Length(40, 20, "given")
    described = plan_scaling(
        recipe, clusters("1,2,5"), length=length, compute_seconds=0.1, codec_gb_per_second=1.0
    )
    alone, *others = described["rows"]
    assert alone["modes"]["schedule"]["sent_bytes"] == 0
    assert alone["modes"]["fp32"]["efficiency"] == 1.0
    for row in others:
        for name, mode in (("schedule", "quantized"), ("bf16", "bf16"), ("fp32", "fp32")):
            other = replace(recipe, comm=replace(recipe.comm, mode=mode))
            _, told = preview(other, length=length, ranks=row["ranks"])
            assert row["modes"][name]["sent_bytes"] == pytest.approx(told["sent_bytes"], rel=0.002)


def test_more_nodes_and_slower_links_cost_and_narrow_gradients_save(recipe):
    def exposed(network):
        given = {"length": Length(40, 20, "given"), "compute_seconds": 0.01, "codec_gb_per_second": 50.0}
        rows = plan_scaling(recipe, clusters("2,4,16", gpus=2, network=network), **given)["rows"]
        return [{name: mode["exposed_seconds"] for name, mode in row["modes"].items()} for row in rows]

    fast, slow = exposed("1gbit"), exposed("100mbit")
    for row in slow:
        assert row["schedule"] < row["bf16"] < row["fp32"]
    for name in ("fp32", "bf16", "schedule"):
        assert slow[0][name] < slow[1][name] < slow[2][name]
        assert all(quick[name] < row[name] for quick, row in zip(fast, slow, strict=True))


def test_computing_is_measured_where_it_is_not_given(recipe, tmp_path, capsys):
    arguments = [
        "plan",
        str(tmp_path / "tiny.yaml"),
        "--nodes",
        "1,2",
        "--gpus-per-node",
        "2",
        "--steps",
        "9",
    ]
    assert main([*arguments, "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "measured here on one" in text
    assert "with 2 images a pass" in text
    assert "A prediction, not a measurement" in text
    assert text.count("schedule ") >= 2
    assert (
        main([*arguments, "--compute-seconds", "0.2", "--codec", "3", "--network", "100mbit", "--json"]) == 0
    )
    described = json.loads(capsys.readouterr().out)
    assert [(row["nodes"], row["ranks"]) for row in described["rows"]] == [(1, 2), (2, 4)]
    for row in described["rows"]:
        for mode in row["modes"].values():
            assert mode["step_seconds"] == pytest.approx(0.2 + mode["exposed_seconds"])
            assert mode["efficiency"] == pytest.approx(0.2 / mode["step_seconds"])
            assert mode["sent_bytes"] == pytest.approx(9 * mode["sent_bytes_per_step"])


SHAPE, BUCKETS = (256, 256), 4
RATE = 4e6
"""Bytes a second: slow enough for the wire, which is known, to outweigh a busy machine, which is not."""
COMPUTE_SECONDS = 0.15
BITS = (8, 16, 32)


def train_by_sleeping(rank, n):
    """Steps whose computation is sleep, over a slow link, with the real exchange; and what the model says of them."""
    world = make_world(rank, n)
    named = [(f"w{i}", torch.empty(SHAPE)) for i in range(BUCKETS)]
    device = torch.device("cpu")
    reducer = build_reducer(CommConfig(), named, rank=rank, world_size=n, seed=3, device=device)

    def slowest(seconds):
        return largest_over_ranks(world, seconds)

    flats = [torch.randn(SHAPE).view(-1) for _ in range(BUCKETS)]
    measured, sent = {}, {}
    with slow_link(RATE):
        costs = measure_codec(reducer.codec, BITS, device=device, slowest=slowest)
        link = measure_link(
            reducer.group, rank=rank, world_size=n, device=device, largest_bytes=2**20, slowest=slowest
        )
        for step in range(4):
            for bits in BITS:
                reducer.begin_step(step, bits)
                slowest([0.0])
                before = reducer.counters.sent_bytes
                time.sleep(COMPUTE_SECONDS / 3)
                futures = []
                for bucket, flat in enumerate(flats):
                    time.sleep(COMPUTE_SECONDS * 2 / 3 / BUCKETS)
                    futures.append(reducer.reduce_flat(flat, parameters=[bucket]))
                begun = time.perf_counter()
                for future in futures:
                    future.wait()
                (exposed,) = slowest([time.perf_counter() - begun])
                if step:
                    measured.setdefault(bits, []).append(exposed)
                sent[bits] = reducer.counters.sent_bytes - before
    reducer.close()
    loads = {
        bits: bucket_loads(reducer.layout, [(i,) for i in range(BUCKETS)], bits=bits, codec="hadamard")
        for bits in BITS
    }
    predicted = {
        bits: step_exposure(found, costs, link, world_size=n, compute_seconds=COMPUTE_SECONDS, overlap=True)
        for bits, found in loads.items()
    }
    foretold = {bits: sum(load.sent_bytes for load in found) for bits, found in loads.items()}
    return {bits: median(times) for bits, times in measured.items()}, predicted, sent, foretold


@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.long)])
def test_the_model_foretells_what_real_ranks_then_expose(ranks, n):
    """Bytes exactly, the order of the widths, and ratios within a factor of three.

    Three, because ranks outnumber cores here: a thread that waits for one is milliseconds late, while the link is measured
    or later, and at 8 bits that is a good part of what is exposed at all. A model without codec, latency or overlap, or with
    the bytes of another width, is further off.
    """
    results = ranks(n, train_by_sleeping)
    for _, _, sent, foretold in results:
        # All parameters are whole blocks and evenly owned, so that rank 0's bytes are everyone's.
        assert sent == foretold
    measured, predicted, _, _ = results[0]
    for bits in BITS:
        print(
            f"{n} ranks, {bits:>2} bits: exposed {predicted[bits]:.3f} s foretold, {measured[bits]:.3f} s measured"
        )
    assert sorted(BITS, key=measured.get) == sorted(BITS, key=predicted.get) == list(BITS)
    for bits in BITS[:-1]:
        ratio = (measured[bits] / measured[32]) / (predicted[bits] / predicted[32])
        assert 1 / 3 < ratio < 3, f"{bits} bits"
