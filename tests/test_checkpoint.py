"""Without these a kill at the wrong moment would leave a run without a checkpoint it can trust."""

import json
import os
import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import make_world

from cyclebnn_dist.checkpoint import (
    Saver,
    Snapshot,
    best_checkpoint,
    complete_checkpoints,
    damaged_parts,
    kept_steps,
    missing_parts,
    newest_checkpoint,
    read_meta,
    read_own,
    read_shared,
    snapshot,
)
from cyclebnn_dist.config import Recipe, RecipeError, RunConfig
from cyclebnn_dist.evaluate import find_checkpoint


def take(rank, step, *, top1=None):
    return Snapshot(
        step=step,
        model={"weight": torch.full((2,), float(step))},
        ema={},
        shared={"engine": {"optimizer": {"w": {"step": torch.tensor(float(step))}}}},
        own={"rank": rank, "buffer": torch.tensor([rank + 0.5])},
        facts={"schedule": 7, "evaluation": None if top1 is None else {"top1": top1}},
    )


def save_all(rank, size, run_dir, steps, config):
    """``steps`` are numbers, or pairs of a number and a validation accuracy."""
    world = make_world(rank, size)
    saver = Saver(run_dir, recipe=Recipe(run=config), world=world)
    for each in steps:
        step, top1 = each if isinstance(each, tuple) else (each, None)
        saver.begin(step, partial(take, rank, step, top1=top1))
        result = saver.settle()
        assert not result.failures
        assert saver.newest == result.folder
    saver.close()
    newest = newest_checkpoint(run_dir, world=world)
    return newest.name, read_own(newest, rank=rank), read_shared(newest)


def steps_on_disk(run_dir):
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


LAST_TWO = RunConfig(keep_checkpoints=2)


def test_every_rank_finds_its_own_state_in_the_newest_and_older_ones_are_removed(ranks, tmp_path):
    results = ranks(2, save_all, tmp_path, [5, 10, 15], LAST_TWO)
    for rank, (name, own, shared) in enumerate(results):
        assert name == "step_000000015"
        assert own["rank"] == rank
        assert own["buffer"].item() == rank + 0.5
        assert shared["engine"]["optimizer"]["w"]["step"].item() == 15.0
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000000015", "step_000000010"]
    assert steps_on_disk(tmp_path) == [10, 15]
    assert read_meta(complete_checkpoints(tmp_path)[0])["world_size"] == 2


def test_every_n_th_and_the_best_stay_beside_the_newest(ranks, tmp_path):
    steps = [5, (10, 50.0), 15, (20, 70.0), 25, (30, 70.0), (35, 60.0)]
    ranks(1, save_all, tmp_path, steps, RunConfig(keep_checkpoints=1, keep_every=15))
    assert steps_on_disk(tmp_path) == [15, 20, 30, 35]
    assert best_checkpoint(tmp_path).name == "step_000000020", "the earlier of two equals"
    assert find_checkpoint(tmp_path, which="best").name == "step_000000020"
    assert find_checkpoint(tmp_path).name == "step_000000035"
    assert find_checkpoint(tmp_path, which="15").name == "step_000000015"
    with pytest.raises(RecipeError, match="steps 15, 20, 30, 35"):
        find_checkpoint(tmp_path, which="16")
    with pytest.raises(RecipeError, match="is one checkpoint"):
        find_checkpoint(find_checkpoint(tmp_path), which="best")


@given(
    scores=st.dictionaries(st.integers(0, 60), st.none() | st.floats(0, 100), min_size=1),
    last=st.integers(1, 4),
    every=st.integers(0, 7),
    best=st.booleans(),
)
def test_what_is_kept_is_what_was_asked_for_and_no_more(scores, last, every, best):
    kept = kept_steps(scores, last=last, every=every, best=best)
    assert kept <= scores.keys()
    newest = set(sorted(scores, reverse=True)[:last])
    assert newest <= kept
    extra = kept - newest
    periodic = {step for step in scores if every and step % every == 0}
    assert periodic <= kept
    others = extra - periodic
    top = max((score for score in scores.values() if score is not None), default=None)
    assert len(others) <= int(best)
    assert all(scores[step] == top for step in others)
    if best and top is not None:
        assert any(scores[step] == top for step in kept)


@pytest.mark.parametrize(
    "damage",
    [
        "no meta",
        "torn meta",
        "meta is noise",
        "meta is a list",
        "missing file",
        "truncated file",
        "other format",
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(ranks, tmp_path, damage):
    ranks(1, save_all, tmp_path, [5, 10], LAST_TWO)
    folder = tmp_path / "checkpoints" / "step_000000010"
    meta = folder / "meta.json"
    if damage == "no meta":
        meta.unlink()
    elif damage == "torn meta":
        meta.write_text(meta.read_text()[:20])
    elif damage == "meta is noise":
        meta.write_bytes(bytes(range(256)))
    elif damage == "meta is a list":
        meta.write_text("[]")
    elif damage == "missing file":
        (folder / "rank_0.safetensors").unlink()
    elif damage == "truncated file":
        os.truncate(folder / "model.safetensors", 10)
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 999}))
    (problem,) = missing_parts(folder)
    expected = {
        "missing file": "rank_0.safetensors: missing",
        "truncated file": "model.safetensors: 10 bytes",
    }
    assert problem.startswith(expected.get(damage, "meta.json: "))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000000005"]
    assert ranks(2, find_newest, tmp_path) == ["step_000000005"] * 2


def find_newest(rank, size, run_dir):
    try:
        return newest_checkpoint(run_dir, world=make_world(rank, size)).name
    except RecipeError as error:
        return str(error)


def test_a_changed_byte_is_found_before_it_is_loaded(ranks, tmp_path):
    ranks(2, save_all, tmp_path, [5, 10], LAST_TWO)
    folder = tmp_path / "checkpoints" / "step_000000010"
    for path in sorted(folder.iterdir()):
        intact = path.read_bytes()
        for place in {0, len(intact) // 2, len(intact) - 2}:
            path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
            (problem,) = damaged_parts(folder)
            assert problem.startswith(f"{path.name}: "), (path.name, place)
        assert ranks(2, find_newest, tmp_path) == ["step_000000005"] * 2
        path.write_bytes(intact)
    assert damaged_parts(folder) == []


def test_a_run_of_which_every_checkpoint_is_damaged_does_not_start_over_by_itself(ranks, tmp_path):
    """It would overwrite what may be saved of days of training."""
    ranks(1, save_all, tmp_path, [5, 10], LAST_TWO)
    for step in (5, 10):
        os.truncate(tmp_path / "checkpoints" / f"step_{step:09d}" / "model.safetensors", 10)
    for message in ranks(2, find_newest, tmp_path):
        assert message.startswith("run.dir: no checkpoint in ")
        assert "step_000000010 (model.safetensors: 10 bytes, " in message
        assert "step_000000005 (model.safetensors: " in message


def test_what_a_kill_left_behind_is_cleared_by_the_next_save(ranks, tmp_path):
    for name in (".partial_step_000000003", ".partial_step_000000005_0a1b2c3d", ".removed_step_000000002_99"):
        leftover = tmp_path / "checkpoints" / name
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
    ranks(1, save_all, tmp_path, [5], LAST_TWO)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000005"]


def test_after_falling_back_the_damaged_future_does_not_displace_what_is_written_anew(ranks, tmp_path):
    ranks(1, save_all, tmp_path, [5, 10], LAST_TWO)
    os.truncate(tmp_path / "checkpoints" / "step_000000010" / "rank_0.safetensors", 10)
    ranks(1, save_all, tmp_path, [7], RunConfig(keep_checkpoints=1))
    assert steps_on_disk(tmp_path) == [7]
    ranks(1, save_all, tmp_path, [10], RunConfig(keep_checkpoints=1))
    assert find_checkpoint(tmp_path).name == "step_000000010"


def change_while_writing(rank, size, run_dir):
    """Everything a snapshot refers to is changed before the first byte is written."""
    world = make_world(rank, size)
    saver = Saver(run_dir, recipe=Recipe(), world=world)
    weight, moment = torch.ones(1000), torch.ones(1000)
    evaluation = {"top1": 1.0}
    changed = threading.Event()
    write = snapshot.write_encoded

    def late(path, content):
        changed.wait()
        return write(path, content)

    snapshot.write_encoded = late
    try:
        saver.begin(
            1, lambda: Snapshot(1, {"w": weight}, {}, {"m": moment, "n": evaluation}, {"w": weight}, {})
        )
        busy = saver.writing
        for tensor in (weight, moment):
            tensor.mul_(2)
        evaluation["top1"] = 2.0
        changed.set()
        result = saver.settle()
    finally:
        snapshot.write_encoded = write
    shared, own = read_shared(result.folder), read_own(result.folder, rank=rank)
    return busy, shared["m"].unique().tolist(), shared["n"], own["w"].unique().tolist(), result.failures


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(ranks, tmp_path):
    for busy, moment, evaluation, own, failures in ranks(2, change_while_writing, tmp_path):
        assert busy
        assert (moment, evaluation, own, failures) == ([1.0], {"top1": 1.0}, [1.0], {})


def fail_and_try_again(rank, size, run_dir, where):
    """A folder lies where rank 1 wants to write, or a file where all do; then no longer."""
    world = make_world(rank, size)
    saver = Saver(run_dir, recipe=Recipe(), world=world)
    saver.begin(5, partial(take, rank, 5))
    saver.settle()
    root, aside = run_dir / "checkpoints", run_dir / "aside"
    if where == "checkpoints" and rank == 0:
        root.rename(aside)
        root.write_text("")

    def obstructed():
        if where != "checkpoints" and rank == 1:
            (path,) = root.glob(".partial_*")
            (path / f"rank_{rank}.safetensors").mkdir()
        return take(rank, 10)

    saver.begin(10, obstructed)
    failed = saver.settle()
    if where == "checkpoints" and rank == 0:
        root.unlink()
        aside.rename(root)
    left = sorted(path.name for path in root.iterdir()) if rank == 0 else []
    saver.begin(15, partial(take, rank, 15))
    again = saver.settle()
    saver.close()
    return failed, left, again.failures, saver.newest.name


@pytest.mark.parametrize("where", ["file of rank 1", "checkpoints"])
def test_a_save_that_fails_is_told_to_every_rank_and_the_next_one_is_made(ranks, tmp_path, where):
    results = ranks(2, fail_and_try_again, tmp_path, where)
    for failed, _, again, newest in results:
        (rank, failure), *others = failed.failures.items()
        assert others == []
        assert rank == (1 if where == "file of rank 1" else 0)
        assert failure.cause == ("Is a directory" if where == "file of rank 1" else "File exists")
        assert (again, newest) == ({}, "step_000000015")
    assert results[0][1] == ["step_000000005"], "the one before is left, and nothing of the one that failed"
    assert steps_on_disk(tmp_path) == [5, 15]
