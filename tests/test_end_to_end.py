"""Whole runs through the local executor. Without these a kill would cost a user more than the last checkpoint interval."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from launching import ROOT, TINY_RECIPE, Launched, alive, wait_until
from safetensors.torch import load_file

from cyclebnn_dist.data.sample import generate_sample
from cyclebnn_dist.metrics import read_journal


@pytest.fixture
def start(tmp_path, tiny_data):
    launched = []

    def start(name: str, *, ranks: int, overrides: tuple[str, ...] = ()) -> Launched:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / name, data=tiny_data))
        launched.append(Launched(recipe, tmp_path / name, ranks=ranks, overrides=overrides))
        return launched[-1]

    yield start
    for one in launched:
        if not one.ended:
            one.end()


def final_states(run_dir):
    """Every tensor of the last checkpoint, by file."""
    folder = max((run_dir / "checkpoints").glob("step_*"))
    return folder.name, {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def newest_log(run_dir, *, rank):
    """What a rank of the newest start has logged."""
    logs = (run_dir / "submitit").glob(f"*_{rank}_log.out")
    return max(logs, key=lambda path: path.stat().st_mtime_ns).read_text()


def assert_same_final_state(run_dir, other):
    name, expected = final_states(run_dir)
    again_name, found = final_states(other)
    assert again_name == name
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file].keys() == expected[file].keys()
        for key, tensor in expected[file].items():
            assert torch.equal(tensor, found[file][key]), f"{file}: {key}"


@pytest.mark.parametrize(("ranks", "kills"), [(2, [(1, 1), (2, 0), (6, 1)]), (4, [(3, 1)])])
def test_killed_at_early_and_later_steps_and_resumed_equals_the_undisturbed_run(start, ranks, kills):
    undisturbed = start("undisturbed", ranks=ranks)
    status, output = undisturbed.wait(seconds=240)
    assert status == 0, output

    for life, (step, rank) in enumerate(kills):
        killed = start("killed", ranks=ranks)
        killed.wait_for_step(step, seconds=120)
        pids = killed.kill_rank(rank)
        status, output = killed.wait(seconds=60)
        assert status == 1, output
        assert f"rank {rank}" in output, f"life {life}: the message does not name the killed rank\n{output}"
        assert wait_until(lambda pids=pids: not alive(pids), seconds=30), "siblings of a killed rank live on"
        survivor = newest_log(killed.run_dir, rank=0 if rank else 1)
        assert re.search(f"nothing is heard of .*rank {rank} on {socket.gethostname()}", survivor)
    resumed = start("killed", ranks=ranks)
    status, output = resumed.wait(seconds=240)
    assert status == 0, output
    assert "resuming from the checkpoint of step" in output

    assert_same_final_state(undisturbed.run_dir, resumed.run_dir)
    summaries = [json.loads((r.run_dir / "summary.json").read_text()) for r in (undisturbed, resumed)]
    for key in (
        "steps",
        "bits",
        "fp32_bytes",
        "eval_top1",
        "eval_images",
        "training_saving_model",
    ):
        assert summaries[0][key] == summaries[1][key], key
    # DDP's first step of a life is one bucket, and every bucket has its own headers and padding.
    assert summaries[1]["sent_bytes"] == pytest.approx(summaries[0]["sent_bytes"], rel=0.01)
    losses = [
        {r["step"]: r["loss"] for r in read_journal(one.run_dir) if r["event"] == "train"}
        for one in (undisturbed, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    health = [
        {r["step"]: r for r in read_journal(one.run_dir) if r["event"] == "health"}
        for one in (undisturbed, resumed)
    ]
    assert health[0].keys() == health[1].keys() == {2, 4, 6, 8, 10}
    for step, row in health[0].items():
        assert row["flip_rate_max"] > 0
        # A life that began between two measurements has no flip rate at its first one.
        found = {key: value for key, value in health[1][step].items() if key != "life"}
        assert found.items() <= row.items()


def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_the_others(start):
    run = start("hanging", ranks=2, overrides=("run.progress_timeout_seconds=15",))
    run.wait_for_step(2, seconds=120)
    os.kill(run.rank_pids()[1], signal.SIGSTOP)
    status, output = run.wait(seconds=60)
    assert status == 1, output
    logs = "".join(path.read_text() for path in (run.run_dir / "submitit").rglob("*0_log.*"))
    assert "nothing was finished for 15 s (run.progress_timeout_seconds) since step " in logs
    assert f"on {socket.gethostname()}, ends" in logs
    assert "cyclebnn_dist/loop.py" in logs, "where it stood"
    assert logs.count("Thread 0x") + logs.count("thread 0x") > 2, "of every thread"


@pytest.mark.long
def test_the_quickstart_learns(tmp_path):
    data, run_dir = tmp_path / "data", tmp_path / "quickstart"
    generate_sample(data)
    overrides = (f"data.path={data}", f"run.dir={run_dir}")
    status, output = Launched(ROOT / "recipes/quickstart.yaml", run_dir, ranks=2, overrides=overrides).wait(
        seconds=900
    )
    assert status == 0, output
    assert json.loads((run_dir / "summary.json").read_text())["eval_top1"] >= 90.0


def test_ctrl_c_saves_on_every_rank_and_the_same_line_goes_on(start):
    stopped = start("run", ranks=2)
    stopped.wait_for_step(2, seconds=120)
    stopped.interrupt()
    status, output = stopped.wait(seconds=60)
    assert status == 130, output
    assert "everything is saved" in output
    again = start("run", ranks=2)
    status, output = again.wait(seconds=120)
    assert status == 0, output
    assert "resuming from the checkpoint of step" in output


@pytest.mark.parametrize("seconds", [0.0, 4.0, 8.0])
def test_ctrl_c_in_a_start_ends_it_in_a_word(start, seconds):
    """While torch is imported, groups are formed, the model is built: whatever falls into these moments."""
    stopped = start("run", ranks=2, overrides=("train.epochs=1000",))
    assert wait_until(lambda: len(stopped.rank_pids()) == 2, seconds=60)
    time.sleep(seconds)
    stopped.interrupt()
    status, output = stopped.wait(seconds=60)
    assert status == 130, output
    assert "Traceback" not in output


def test_an_image_that_breaks_on_one_rank_is_named(start, tmp_path, tiny_data):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    image = sorted((broken / "train").rglob("*.JPEG"))[33]
    image.write_bytes(image.read_bytes()[:200])
    status, output = start("run", ranks=2, overrides=(f"data.path={broken}",)).wait(seconds=120)
    assert status == 2, output
    assert f"cannot read image {image}" in output
    assert "data.skip_list" in output


def test_a_finished_run_says_so_and_is_not_run_again(start):
    assert start("run", ranks=1, overrides=("train.epochs=0.2",)).wait(seconds=120)[0] == 0
    again = start("run", ranks=1, overrides=("train.epochs=0.2",))
    rows = (again.run_dir / "metrics.jsonl").read_bytes()
    status, output = again.wait(seconds=60)
    assert status == 0
    assert "finished" in output
    assert "validation top-1" in output
    assert (again.run_dir / "metrics.jsonl").read_bytes() == rows


def test_a_run_folder_of_another_recipe_is_refused_by_name(start):
    assert start("run", ranks=1, overrides=("train.epochs=0.2",)).wait(seconds=120)[0] == 0
    other = start("run", ranks=1, overrides=("train.epochs=0.2", "optim.lr=0.5"))
    status, output = other.wait(seconds=60)
    assert status == 2, output
    assert "optim.lr" in output
    assert "Traceback" not in output


@pytest.mark.long
def test_killed_with_four_ranks_resumed_with_two_killed_and_resumed_with_four(start):
    """comm.check_every=1 compares all parameters across ranks after every step."""
    for ranks, step, rank in [(4, 2, 3), (2, 5, 0)]:
        killed = start("moving", ranks=ranks)
        killed.wait_for_step(step, seconds=120)
        killed.kill_rank(rank)
        status, output = killed.wait(seconds=60)
        assert status == 1, output
    resumed = start("moving", ranks=4)
    status, output = resumed.wait(seconds=240)
    assert status == 0, output
    assert "was written by 2 ranks, this run has 4" in output
    assert "residuals of the all-reduce are shared out anew" in output
    summary = json.loads((resumed.run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["ranks"]) == (10, 4)
