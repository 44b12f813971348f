"""A real Slurm: without these a pre-emption, a time limit or a dead node at 3 a.m. would cost a user the run."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, TINY_RECIPE, Launched, wait_until
from one_slurm import LONG, NotPossible, OneSlurm, Submitted
from test_end_to_end import assert_same_final_state
from test_mixbin import made, write_recipe

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.metrics import read_journal

SAVE_EVERY = 8
STEPS = 40
LENGTH = ("train.epochs=8", f"run.save_every={SAVE_EVERY}", "eval.every_epochs=4")
NO_WANDB = "wandb.mode=disabled"

PROFILE = """\
nodes: {nodes}
tasks_per_node: 1
timeout_min: {minutes}
signal_delay_s: {delay}
partition: main
environment: {{OMP_NUM_THREADS: "1"}}
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneSlurm]:
    """Three nodes. ``CYCLEBNN_SLURM=off`` leaves these tests out; ``required`` lets them fail where there can be no Slurm."""
    wish = os.environ.get("CYCLEBNN_SLURM", "")
    if wish == "off":
        pytest.skip("Slurm: CYCLEBNN_SLURM=off")
    try:
        started = OneSlurm(tmp_path_factory.mktemp("slurm") / "one", nodes=3)
    except NotPossible as why:
        if wish == "required":
            raise
        pytest.skip(f"Slurm: {why}")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir="unnamed", data=tiny_data))
    return path


@pytest.fixture
def profile(tmp_path):
    def write(*, nodes: int = 2, minutes: int = 60, delay: int = 60, more: str = "") -> str:
        path = tmp_path / f"nodes_{nodes}_{minutes}.yaml"
        path.write_text(PROFILE.format(nodes=nodes, minutes=minutes, delay=delay) + more)
        return str(path)

    return write


@pytest.fixture
def submit(slurm, tiny_recipe, profile, tmp_path):
    """Submits the tiny recipe; what is left of it at the end of the test is cancelled."""
    made: list[Submitted] = []

    def submit(
        name: str = "run", *more: str, cluster: str | None = None, snapshot: bool = False
    ) -> Submitted:
        arguments = [str(tiny_recipe), "--cluster", cluster or profile(), *LENGTH, *more]
        # A job that imports a copy of the code compiles its kernels first.
        arguments += [] if snapshot else ["--no-snapshot"]
        made.append(Submitted(slurm, tmp_path / name, *arguments))
        return made[-1]

    yield submit
    for run in made:
        slurm.call("scontrol", "update", f"JobId={run.job}", "Requeue=0")
        slurm.call("scancel", run.job)


@pytest.fixture(scope="session")
def undisturbed(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same run on two local ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output = Launched(tiny_recipe, run_dir, ranks=2, overrides=(*LENGTH, f"run.dir={run_dir}")).wait(
        seconds=LONG
    )
    assert status == 0, output
    return run_dir


def assert_as_undisturbed(run: Submitted, undisturbed: Path) -> None:
    assert_same_final_state(undisturbed, run.run_dir)
    losses = [
        {row["step"]: row["loss"] for row in read_journal(folder) if row["event"] == "train"}
        for folder in (undisturbed, run.run_dir)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_two_nodes_train_as_two_local_ranks_do(submit, undisturbed):
    run = submit("run", NO_WANDB, snapshot=True)
    facts = run.assert_finished()
    assert facts["NumNodes"] == "2"
    assert "code: snapshot " in run.log()
    assert_as_undisturbed(run, undisturbed)
    assert run.slurm.left_behind(run.job) == []


def test_two_nodes_share_out_a_model_under_deepspeed_also_after_a_signal(slurm, submit, undisturbed):
    """Slurm's ranks are none that DeepSpeed has started, and what each keeps must be whole after a restart."""
    run = submit("run", NO_WANDB, "run.save_every=1000", "engine.name=deepspeed", "engine.zero_stage=2")
    run.wait_for_life(1)
    slurm.ask("scancel", "--signal=USR2", run.job)
    facts = run.assert_finished()
    assert (facts["NumNodes"], facts["Restarts"]) == ("2", "1")
    first, second = run.starts()
    assert first < second
    losses = [
        [row["loss"] for row in read_journal(folder) if row["event"] == "train"]
        for folder in (undisturbed, run.run_dir)
    ]
    assert losses[0][0] == losses[1][0], "before gradients count"
    assert len(losses[1]) == STEPS
    assert sum(losses[1][-5:]) == pytest.approx(sum(losses[0][-5:]), rel=0.3)
    assert slurm.left_behind(run.job) == []


def test_signalled_and_preempted_the_job_saves_comes_back_and_ends_as_undisturbed(slurm, submit, undisturbed):
    """First submitit's signal, as before a time limit; then SIGTERM, which Slurm sends at a pre-emption by default."""
    run = submit("run", "run.save_every=1000")
    run.wait_for_life(1)
    slurm.ask("scancel", "--signal=USR2", run.job)
    run.wait_for_life(2)
    urgent = slurm.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o/dev/null", "--wrap=:"
    )
    slurm.wait(urgent.strip(), "COMPLETED")
    facts = run.assert_finished()
    assert facts["Restarts"] == "2"
    first, second, third = run.starts()
    assert first < second < third, "both signals made it save"
    assert_as_undisturbed(run, undisturbed)
    assert len({path.name.rpartition("-")[2] for path in run.run_dir.glob("wandb/offline-run-*")}) == 1


def test_requeued_from_outside_and_by_a_dead_node_the_job_loses_no_published_checkpoint(
    slurm, submit, undisturbed
):
    run = submit()
    run.wait_for_life(1)
    slurm.ask("scontrol", "requeue", run.job)
    run.wait_for_life(2)
    run.wait_for_checkpoint(since=run.starts()[1])
    node = int(slurm.facts(run.job)["NodeList"].strip("]").rpartition("-")[2][-1])
    published = run.checkpoints()[-1]
    done = max(row["step"] for row in run.rows())
    slurm.lose_power(node)
    try:
        facts = run.assert_finished()
    finally:
        slurm.restore(node)
    assert facts["Restarts"] == "2"
    resumed = run.starts()[2]
    assert resumed >= published
    assert resumed >= done - 2 * SAVE_EVERY, "one interval, and one whose files were being written"
    assert_as_undisturbed(run, undisturbed)
    assert slurm.left_behind(run.job) == []


def test_a_killed_rank_fails_the_job_and_submitting_again_goes_on(slurm, submit, undisturbed):
    run = submit("run", NO_WANDB)
    run.wait_for_life(1)
    run.wait_for_checkpoint()
    slurm.kill_rank(run.job, 1)
    facts = run.wait_until_ended()
    assert facts["JobState"] == "FAILED"
    assert "nothing is heard of rank 1 on node" in run.log()
    assert "onnection" in run.log()
    assert slurm.left_behind(run.job) == []
    again = submit("run", NO_WANDB)
    again.assert_finished()
    assert again.starts()[1] >= SAVE_EVERY
    assert_as_undisturbed(again, undisturbed)


def test_a_live_job_is_looked_after_from_its_run_folder(slurm, submit, tiny_recipe, profile):
    run = submit("run", "train.epochs=400", NO_WANDB)
    run.wait_for_life(1)
    folder = str(run.run_dir)
    assert f"job {run.job}: running" in slurm.launch("status", folder).stdout
    assert "resnet18, 2 ranks on cpu" in slurm.launch("logs", folder).stdout
    second = slurm.launch(
        str(tiny_recipe), *LENGTH, "train.epochs=400", f"run.dir={folder}", "--cluster", profile()
    )
    assert second.returncode == 2
    assert f"{folder} has job {run.job} in the queue" in second.stderr

    # A job that is about to ask for another life gets none.
    slurm.ask("scancel", "--signal=USR2", run.job)
    assert slurm.launch("cancel", folder).stdout == f"cancelled job {run.job}  {folder}\n"
    facts = run.wait_until_ended()
    assert slurm.left_behind(run.job) == []
    assert facts["JobState"] == "CANCELLED"
    assert facts["Restarts"] == "0"
    assert run.checkpoints(), "cancelled ranks save"
    assert "no job at work" in slurm.launch("status", folder).stdout


def test_points_of_a_grid_run_as_an_array_with_a_cap(slurm, tiny_recipe, profile, tmp_path):
    sweep = tmp_path / "sweep"
    arguments = (
        *(str(tiny_recipe), "--cluster", profile(nodes=1), "--no-snapshot", "train.epochs=0.4", NO_WANDB),
        *(f"run.dir={sweep}", "--grid", "optim.lr=1e-3,3e-4", "--max-parallel", "1"),
    )
    done = slurm.launch(*arguments)
    assert done.returncode == 0, done.stderr
    array = done.stdout.split()[2].partition("_")[0]
    live = slurm.launch(*arguments)
    assert live.returncode == 0, live.stderr
    assert live.stdout.count("left out") == 2
    running = 0

    def ended() -> bool:
        nonlocal running
        states = slurm.ask("squeue", "-h", "--array", "--states=all", "-o%T", f"--jobs={array}").split()
        running = max(running, states.count("RUNNING"))
        return set(states) <= {"COMPLETED", "FAILED"}

    assert wait_until(ended, seconds=LONG)
    assert running == 1, "the cap"
    told = slurm.launch(*arguments)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("finished already") == 2
    assert sorted(path.name for path in sweep.glob("lr=*")) == ["lr=0.0003", "lr=0.001"]


def test_tasks_of_an_array_share_a_search_though_one_is_requeued_in_it(slurm, tiny_data, tmp_path):
    recipe, folder = write_recipe(tmp_path, tiny_data), tmp_path / "run-mixbin"
    overrides = ("search.steps=20", "search.budget=0.9")
    line = shlex.join((sys.executable, "-m", "cyclebnn_dist", "search", "mixbin", str(recipe), *overrides))
    options = ("--parsable", "--array=0-1", "--requeue", f"--output={tmp_path}/%a.out", "--open-mode=append")
    array = slurm.ask("sbatch", *options, "--wrap", line).strip()
    tasks = [f"{array}_{number}" for number in range(2)]

    def said() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("?.out")))

    try:
        assert wait_until(lambda: said().count("candidates: ") >= 2 and made(folder)[0], seconds=LONG), said()
        slurm.ask("scontrol", "requeue", tasks[1])
        for task in tasks:
            facts = slurm.wait(task, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert facts["JobState"] == "COMPLETED", said()
    finally:
        slurm.call("scancel", array)
    assert facts["Restarts"] == "1"
    alone = tmp_path / "alone"
    assert main(["search", "mixbin", str(recipe), *overrides, f"search.dir={alone}"]) == 0
    assert made(folder)[0] == made(alone)[0]
    assert (folder / "pattern.json").read_bytes() == (alone / "pattern.json").read_bytes()


def test_slurm_accepts_what_a_dry_run_shows(slurm, tiny_recipe, tmp_path):
    gpus = tmp_path / "gpu.yaml"
    gpus.write_text((ROOT / "slurm/gpu.yaml").read_text().replace("partition: gpu", "partition: main"))
    grid = ("--grid", "run.seed=1,2", "--max-parallel", "1")
    shown = slurm.launch(str(tiny_recipe), "--cluster", str(gpus), "--dry-run", *grid).stdout
    batch = tmp_path / "shown.sh"
    batch.write_text(shown[shown.index("#!/bin/bash") : shown.index("model ")])
    done = slurm.call("sbatch", "--test-only", str(batch))
    assert done.returncode == 0, done.stderr
    assert "using 192 processors on nodes node[1-2]" in done.stderr


def test_the_plain_batch_file_runs_as_it_is(slurm, tiny_recipe, tmp_path):
    job = submit_plain(slurm, tiny_recipe, tmp_path, "train.epochs=0.4", NO_WANDB)
    facts = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = (tmp_path / "plain.out").read_text()
    assert facts["JobState"] == "COMPLETED", log
    assert "resnet18, 2 ranks on cpu, 2 steps" in log
    assert (tmp_path / "plain/summary.json").exists()


def submit_plain(slurm: OneSlurm, recipe: Path, folder: Path, *overrides: str) -> str:
    size = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
    command = ("sbatch", "--parsable", *size, f"--output={folder / 'plain.out'}", "slurm/train.sbatch")
    return slurm.ask(
        *command, str(recipe), f"run.dir={folder / 'plain'}", *overrides, CYCLEBNN_PYTHON=sys.executable
    ).strip()


@pytest.mark.long
def test_a_time_limit_requeues_the_job_until_it_has_finished(submit, profile, tiny_recipe, tmp_path):
    """Slurm looks at time limits every 30 s and counts them in minutes."""
    length = ("train.epochs=160", "eval.every_epochs=80", "run.save_every=1000", NO_WANDB)
    run = submit("limited", *length, cluster=profile(minutes=1, delay=10))
    facts = run.assert_finished(seconds=600)
    assert int(facts["Restarts"]) >= 1, "the run was shorter than its limit"
    overrides = (*LENGTH, *length, f"run.dir={tmp_path / 'unlimited'}")
    status, output = Launched(tiny_recipe, tmp_path / "unlimited", ranks=2, overrides=overrides).wait(
        seconds=600
    )
    assert status == 0, output
    assert_same_final_state(tmp_path / "unlimited", run.run_dir)


@pytest.mark.long
def test_a_node_whose_daemon_died_is_noticed_and_no_two_lives_write_at_once(slurm, submit):
    """Tasks on that node live on, and know nothing of their requeued job."""
    run = submit("run", "train.epochs=120", "eval.every_epochs=40")
    run.wait_for_life(1)
    slurm.lose_daemon(1)
    try:
        slurm.wait(run.job, "PENDING", "COMPLETING")
        facts = run.assert_finished()
    finally:
        slurm.restore(1)
    assert int(facts["Restarts"]) >= 1
    steps = [row["step"] for row in read_journal(run.run_dir) if row["event"] == "train"]
    assert steps == list(range(1, 601))


@pytest.mark.long
def test_the_plain_batch_file_is_requeued_at_its_signal_and_not_when_cancelled(slurm, tiny_recipe, tmp_path):
    run_dir = tmp_path / "plain"
    job = submit_plain(slurm, tiny_recipe, tmp_path, "train.epochs=400")
    for _ in range(2):
        rows = run_dir / "metrics.jsonl"
        begun = rows.read_text().count('"event": "start"') if rows.exists() else 0
        assert wait_until(
            lambda rows=rows, begun=begun: (
                rows.exists() and rows.read_text().count('"event": "start"') > begun
            ),
            seconds=LONG,
        ), slurm.facts(job)
        time.sleep(1)
        if begun == 0:
            slurm.ask("scancel", "--signal=USR2", job)
    slurm.ask("scancel", job)
    facts = slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED")
    assert facts["JobState"] == "CANCELLED"
    assert slurm.left_behind(job) == []
    assert slurm.facts(job)["Restarts"] == "1"
