"""Checkpoints of a run while it trains, on disks that fail as well. Without these a full disk would cost a user the run."""

import json
import logging
import signal
import time

import pytest
import torch
from disks import fill, read_only, small_disk
from launching import TINY_RECIPE, Launched, wait_until
from safetensors.torch import load_file
from worlds import make_world

from cyclebnn_dist import saving, train
from cyclebnn_dist.checkpoint import complete_checkpoints, damaged_parts, read_meta, snapshot
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.metrics import read_journal

STATE = ("model", "ema", "shared", "rank_0", "rank_1")


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


class Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run(rank, size, path, overrides, *, before_backward=None):
    """Train in this process; status and warnings. ``before_backward(step)`` is called on every rank."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    backward, calls, messages = DDPEngine.backward, [], Messages()

    def watched(self, loss):
        calls.append(loss)
        if before_backward:
            before_backward(len(calls))
        backward(self, loss)

    DDPEngine.backward = watched
    logging.getLogger("cyclebnn_dist").addHandler(messages)
    try:
        status = train.run_recipe(
            load_recipe(path, [*overrides, "wandb.mode=disabled"]), make_world(rank, size)
        )
    except (RecipeError, saving.SaveError) as error:
        status = f"{type(error).__name__}: {error}"
    finally:
        DDPEngine.backward = backward
        logging.getLogger("cyclebnn_dist").removeHandler(messages)
    return status, messages.lines


def assert_same_states(folder, other):
    for name in STATE:
        expected, found = (load_file(each / f"{name}.safetensors") for each in (folder, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), (folder, name)


def run_slowly_saved(rank, size, path, overrides):
    """Files of a checkpoint are written when training has gone on for a step or two."""
    write = snapshot.write_encoded

    def late(path, content):
        time.sleep(0.15)
        return write(path, content)

    snapshot.write_encoded = late
    try:
        return run(rank, size, path, overrides)
    finally:
        snapshot.write_encoded = write


def run_saved_at_once(rank, size, path, overrides):
    """Training stands still until each checkpoint is published."""
    save = saving.save
    saving.save = lambda run, *, wait: save(run, wait=True)
    try:
        return run(rank, size, path, overrides)
    finally:
        saving.save = save


def test_what_is_written_while_training_goes_on_is_the_state_of_its_step(ranks, recipe_file):
    """Restarting from it would train something else."""
    behind, at_once = recipe_file.parent / "behind", recipe_file.parent / "at_once"
    common = ["run.save_every=3", "run.keep_checkpoints=9"]
    for function, folder in ((run_slowly_saved, behind), (run_saved_at_once, at_once)):
        assert ranks(2, function, recipe_file, [*common, f"run.dir={folder}"]) == [(0, []), (0, [])]
    found, expected = complete_checkpoints(behind), complete_checkpoints(at_once)
    assert [path.name for path in found] == [path.name for path in expected]
    assert {"step_000000003", "step_000000006", "step_000000009", "step_000000010"} <= {p.name for p in found}
    for one, other in zip(expected, found, strict=True):
        assert_same_states(one, other)
    lags = [[row["step"] - row["of_step"] for row in saved_rows(folder)] for folder in (behind, at_once)]
    assert max(lags[0]) >= 1, "training has gone on while it was written"
    assert max(lags[1]) == 0
    summary = json.loads((behind / "summary.json").read_text())
    assert 0 < summary["save_seconds"] < 60
    assert summary["failed_checkpoints"] == 0
    assert "standing still for checkpoints" in (behind / "summary.txt").read_text()


def saved_rows(run_dir):
    return [row for row in read_journal(run_dir) if row["event"] == "checkpoint"]


def test_the_best_evaluation_is_saved_where_no_checkpoint_was_due_and_stays(ranks, recipe_file):
    overrides = ["run.save_every=100", "run.keep_checkpoints=1", "eval.every_epochs=0.4", "run.keep_every=7"]
    assert ranks(2, run, recipe_file, overrides) == [(0, []), (0, [])]
    run_dir = recipe_file.parent / "run"
    scores = {row["step"]: row["top1"] for row in read_journal(run_dir) if row["event"] == "eval"}
    assert scores.keys() == {2, 4, 6, 8, 10}
    best = max(scores, key=lambda step: (scores[step], -step))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["best_step"], summary["best_top1"]) == (best, scores[best])
    assert {read_meta(folder)["step"] for folder in complete_checkpoints(run_dir)} == {best, 7, 10}
    evaluations = {read_meta(f)["step"]: read_meta(f)["evaluation"] for f in complete_checkpoints(run_dir)}
    assert evaluations[best]["top1"] == scores[best]
    assert evaluations[7] is None


def run_on_a_full_disk(rank, size, path, overrides, full_at, free_at, stop_at=None):
    """Rank 0 fills the disk at one step and frees it at another; what lies there just before it is freed.

    Rank 1 gets a signal to stop at a third.
    """
    disk, seen = path.parent / "disk", []

    def change(step):
        if rank == 0 and step == full_at:
            fill(disk)
        if rank == 0 and step == free_at:
            complete = complete_checkpoints(disk / "run")
            partial = list((disk / "run" / "checkpoints").glob(".partial_*"))
            seen.append(([f.name for f in complete], [damaged_parts(f) for f in complete], len(partial)))
            (disk / "filling").unlink()
        if rank == 1 and step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    return *run(rank, size, path, overrides, before_backward=change), seen


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(ranks, recipe_file):
    undisturbed = recipe_file.parent / "undisturbed"
    assert ranks(2, run, recipe_file, [f"run.dir={undisturbed}"]) == [(0, []), (0, [])]
    with small_disk(recipe_file.parent / "disk", megabytes=48) as folder:
        (first, told, seen), (second, _, _) = ranks(
            2, run_on_a_full_disk, recipe_file, [f"run.dir={folder / 'run'}"], 4, 8
        )
        assert first == second == train.FINISHED
        failures = [line for line in told if "failed: " in line]
        assert len(failures) >= 3
        assert f"{folder / 'run' / 'checkpoints'}: No space left on device" in failures[0]
        assert "What to do: free space on that disk" in failures[0]
        goes_on = next(line for line in told if line.startswith("training goes on"))
        assert "the newest intact checkpoint is " in goes_on
        ((complete, damage, partial),) = seen
        assert len(complete) >= 2
        assert damage == [[]] * len(complete)
        assert partial <= 1, "only what is being written takes room"
        summary = json.loads((folder / "run" / "summary.json").read_text())
        assert summary["failed_checkpoints"] == len(failures)
        assert f"{len(failures)} could not be written" in (folder / "run" / "summary.txt").read_text()
        assert_same_states(complete_checkpoints(undisturbed)[0], complete_checkpoints(folder / "run")[0])
        losses = [
            {row["step"]: row["loss"] for row in read_journal(each) if row["event"] == "train"}
            for each in (undisturbed, folder / "run")
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 10
        assert any("its rows wait in memory" in line for line in told)
        assert any("can be written again" in line for line in told)


def test_a_run_does_not_end_well_without_its_last_checkpoint_and_goes_on_when_there_is_room(
    ranks, recipe_file
):
    undisturbed = recipe_file.parent / "undisturbed"
    assert ranks(2, run, recipe_file, [f"run.dir={undisturbed}"]) == [(0, []), (0, [])]
    with small_disk(recipe_file.parent / "disk", megabytes=48) as folder:
        overrides = [f"run.dir={folder / 'run'}"]
        for status, _, _ in ranks(2, run_on_a_full_disk, recipe_file, overrides, 6, 99):
            assert status.startswith("SaveError: this run ends without the checkpoint of step 10: ")
            assert "No space left on device" in status
            newest = complete_checkpoints(folder / "run")[0]
            assert f"the newest intact checkpoint is {newest}; " in status
        assert damaged_parts(newest) == []
        fill(folder)
        for status, _ in ranks(2, run, recipe_file, overrides):
            assert status.startswith("RecipeError: run.dir: ")
            assert "No space left on device" in status
        (folder / "filling").unlink()
        assert [status for status, _ in ranks(2, run, recipe_file, overrides)] == [train.FINISHED] * 2
        assert_same_states(complete_checkpoints(undisturbed)[0], complete_checkpoints(folder / "run")[0])


def test_a_stop_without_room_for_its_checkpoint_says_which_one_there_is(ranks, recipe_file):
    with small_disk(recipe_file.parent / "disk", megabytes=48) as folder:
        overrides = [f"run.dir={folder / 'run'}"]
        for status, _, _ in ranks(2, run_on_a_full_disk, recipe_file, overrides, 4, 99, 6):
            assert status.startswith("SaveError: this run ends without the checkpoint of step 7: ")
            newest = complete_checkpoints(folder / "run")[0]
            assert f"the newest intact checkpoint is {newest}; " in status


def test_checkpoints_that_become_read_only_end_the_run_with_status_1_and_those_that_are_with_status_2(
    recipe_file,
):
    run_dir = recipe_file.parent / "run"
    length = ("train.epochs=4", "eval.every_epochs=4")
    going = Launched(recipe_file, run_dir, ranks=2, overrides=length)
    try:
        assert wait_until(lambda: complete_checkpoints(run_dir), seconds=120)
        with read_only(run_dir / "checkpoints"):
            status, output = going.wait(seconds=120)
            assert status == 1, output
            assert f"{run_dir / 'checkpoints'}: Read-only file system" in output
            assert "this run ends without the checkpoint of step 20" in output
            newest = complete_checkpoints(run_dir)[0]
            assert f"the newest intact checkpoint is {newest}" in output
            assert "Traceback" not in output
            assert damaged_parts(newest) == []
            again = Launched(recipe_file, run_dir, ranks=2, overrides=length)
            status, output = again.wait(seconds=60)
            assert status == 2, output
            assert f"{run_dir / 'checkpoints'} may not be written" in output
    finally:
        if not going.ended:
            going.end()
