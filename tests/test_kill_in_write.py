"""SIGKILL in the middle of writing a checkpoint. Without these a kill at the wrong moment would cost more than an interval."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from launching import TINY_RECIPE, Launched, wait_until
from safetensors.torch import load_file

from cyclebnn_dist.checkpoint import complete_checkpoints, damaged_parts, read_meta

LARGE = (
    "model.kwargs={channels: [48, 96, 192, 384]}",
    "run.save_every=2",
    "run.health_every=0",
    "eval.every_epochs=2",
)


@pytest.fixture
def start(tmp_path, tiny_data):
    launched = []

    def start(name: str) -> Launched:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / name, data=tiny_data))
        launched.append(Launched(recipe, tmp_path / name, ranks=2, overrides=LARGE))
        return launched[-1]

    yield start
    for one in launched:
        if not one.ended:
            one.end()


def newest_step(run_dir):
    complete = complete_checkpoints(run_dir)
    return read_meta(complete[0])["step"] if complete else 0


def kill_when(run, written):
    """Let a run publish one checkpoint; kill both ranks when a file of this name is in the next. Its files and sizes."""
    assert wait_until(lambda: len(run.rank_pids()) == 2, seconds=60)
    pids = list(run.rank_pids().values())
    root = run.run_dir / "checkpoints"
    before = newest_step(run.run_dir)
    assert wait_until(lambda: run.ended or newest_step(run.run_dir) > before, seconds=120)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not run.ended:
        partial = [path for path in root.glob(".partial_*") if (path / written).exists()]
        if partial:
            break
        time.sleep(0.001)
    else:
        raise AssertionError(f"no {written} is being written")
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    (folder,) = partial
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_killed_inside_writes_and_resumed_equals_the_undisturbed_run(start):
    undisturbed = start("undisturbed")
    status, output = undisturbed.wait(seconds=240)
    assert status == 0, output
    final = complete_checkpoints(undisturbed.run_dir)[0]
    sizes = {name: facts["bytes"] for name, facts in read_meta(final)["files"].items()}
    begun_at = []
    for written in ("", "rank_1.safetensors", "shared.safetensors"):
        run = start("killed")
        left = kill_when(run, written)
        assert run.wait(seconds=60)[0] == 1
        assert "meta.json" not in left
        complete = complete_checkpoints(run.run_dir)
        assert [damaged_parts(folder) for folder in complete] == [[]] * len(complete)
        begun_at.append(newest_step(run.run_dir))
        unfinished = {name for name, size in sizes.items() if left.get(name, 0) < size}
        assert unfinished or written == "shared.safetensors", "nothing was left to be written"
    assert begun_at == [2, 4, 6], "a kill costs what came after the newest checkpoint, and no checkpoint"
    status, output = start("killed").wait(seconds=240)
    assert status == 0, output
    assert f"resuming from the checkpoint of step {begun_at[-1]}" in output
    found = complete_checkpoints(run.run_dir)[0]
    assert found.name == final.name
    for name in sizes:
        if name.endswith(".safetensors"):
            expected, after = load_file(final / name), load_file(found / name)
            assert expected.keys() == after.keys()
            assert all(torch.equal(tensor, after[key]) for key, tensor in expected.items()), name
    assert list((run.run_dir / "checkpoints").glob(".*")) == [], "what was left has been cleared away"
