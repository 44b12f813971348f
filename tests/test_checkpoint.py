"""Without these a kill at the wrong moment would leave a run without a checkpoint it can trust."""

import json
import os
from functools import partial

import pytest
import torch
from worlds import make_world

from cyclebnn_dist.checkpoint import (
    Saver,
    Snapshot,
    complete_checkpoints,
    damaged_parts,
    missing_parts,
    newest_checkpoint,
    read_meta,
    read_own,
    read_shared,
)
from cyclebnn_dist.config import Recipe, RunConfig


def snapshot(rank, step):
    return Snapshot(
        step=step,
        model={"weight": torch.full((2,), float(step))},
        ema={},
        shared={"engine": {"optimizer": {"w": {"step": torch.tensor(float(step))}}}},
        own={"rank": rank, "buffer": torch.tensor([rank + 0.5])},
        facts={"schedule": 7},
    )


def save_all(rank, size, run_dir, steps, keep):
    world = make_world(rank, size)
    recipe = Recipe(run=RunConfig(keep_checkpoints=keep))
    saver = Saver(run_dir, recipe=recipe, world=world)
    for step in steps:
        saver.begin(step, partial(snapshot, rank, step))
        assert not saver.settle().failures
    saver.close()
    newest = newest_checkpoint(run_dir, world=world)
    return newest.name, read_own(newest, rank=rank), read_shared(newest)


def test_every_rank_finds_its_own_state_in_the_newest_and_older_ones_are_removed(ranks, tmp_path):
    results = ranks(2, save_all, tmp_path, [5, 10, 15], 2)
    for rank, (name, own, shared) in enumerate(results):
        assert name == "step_000000015"
        assert own["rank"] == rank
        assert own["buffer"].item() == rank + 0.5
        assert shared["engine"]["optimizer"]["w"]["step"].item() == 15.0
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000000015", "step_000000010"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step_000000010",
        "step_000000015",
    ]
    assert read_meta(complete_checkpoints(tmp_path)[0])["world_size"] == 2


@pytest.mark.parametrize("damage", ["no meta", "torn meta", "missing file", "truncated file", "other format"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(ranks, tmp_path, damage):
    ranks(1, save_all, tmp_path, [5, 10], 2)
    folder = tmp_path / "checkpoints" / "step_000000010"
    meta = folder / "meta.json"
    if damage == "no meta":
        meta.unlink()
    elif damage == "torn meta":
        meta.write_text(meta.read_text()[:20])
    elif damage == "missing file":
        (folder / "rank_0.safetensors").unlink()
    elif damage == "truncated file":
        os.truncate(folder / "model.safetensors", 10)
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 999}))
    assert missing_parts(folder)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000000005"]


def test_what_a_kill_left_behind_is_cleared_by_the_next_save(ranks, tmp_path):
    leftover = tmp_path / "checkpoints" / ".partial_step_000000003"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    ranks(1, save_all, tmp_path, [5], 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000005"]


def find_newest(rank, size, run_dir):
    return newest_checkpoint(run_dir, world=make_world(rank, size)).name


def test_a_changed_byte_is_found_before_it_is_loaded(ranks, tmp_path):
    ranks(2, save_all, tmp_path, [5, 10], 2)
    path = tmp_path / "checkpoints" / "step_000000010" / "rank_1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert ranks(2, find_newest, tmp_path) == ["step_000000005"] * 2
    assert damaged_parts(path.parent) == ["rank_1.safetensors: its content has changed since it was written"]
