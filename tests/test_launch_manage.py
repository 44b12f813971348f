"""status, logs, cancel: a user who knows the run folder needs no job number.

squeue, sacct, scontrol and scancel are small programs here that answer in Slurm 22.05's words.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cyclebnn_dist.config import Recipe, RecipeError, save_recipe
from launch import processes, queue, record
from launch.manage import find_runs, main
from launch.progress import read_progress

ROOT = Path(__file__).parents[1]


def submission(job, *, cluster="slurm", ranks=2, logs="logs", **more):
    return record.Submission(job, cluster, ranks, str(logs), **more)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_recipe(Recipe(), folder / "recipe.yaml")
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """``slurm(squeue=..., sacct=...)``: what these answer from now on; returns the file of the commands given."""
    folder, asked = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    asked.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(**answers: str) -> Path:
        for name in ("squeue", "sacct", "scontrol", "scancel"):
            text, status = answers.get(name, ""), 0
            if "error" in text:
                text, status = f"echo '{text}' >&2", 1
            else:
                text = f"cat <<'END'\n{text}END"
            (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {asked}\n{text}\nexit {status}\n')
            (folder / name).chmod(0o755)
        return asked

    return answer


def test_states_come_from_the_queue_and_then_from_the_books(slurm):
    slurm(
        squeue="7_0|RUNNING|None|0:15|node1\n7_1|PENDING|JobArrayTaskLimit|0:00|\n9|CANCELLED|None|2:05|node1\n",
        sacct="8|CANCELLED by 0|0:0|00:02:05|node1\n",
    )
    states = queue.job_states(["7_0", "7_1", "8", "9", "10"])
    assert {job: (state.state, state.live) for job, state in states.items()} == {
        "7_0": ("RUNNING", True),
        "7_1": ("PENDING", True),
        "8": ("CANCELLED", False),
        "9": ("CANCELLED", False),
        "10": ("UNKNOWN", False),
    }
    assert states["7_1"].detail == "(JobArrayTaskLimit)"


def test_jobs_the_queue_has_forgotten_are_no_error(slurm):
    slurm(squeue="slurm_load_jobs error: Invalid job id specified", sacct="error: accounting is disabled")
    assert queue.job_states(["5"])["5"].state == "UNKNOWN"


def test_a_controller_that_does_not_answer_is_not_an_empty_queue(slurm):
    slurm(squeue="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(RecipeError, match="Unable to contact slurm controller"):
        queue.job_states(["5"])


def test_cancel_forbids_a_requeue_first_and_leaves_ended_jobs_alone(run_dir, slurm, capsys):
    asked = slurm(squeue="5|CANCELLED|None|0:15|node1\n6|RUNNING|None|0:15|node1\n")
    for job in ("5", "6"):
        record.add(run_dir, submission(job))
    assert main(["cancel", str(run_dir)]) == 0
    _, *commands = asked.read_text().splitlines()
    assert commands == ["scontrol update JobId=6 Requeue=0", "scancel 6"]
    assert capsys.readouterr().out == f"cancelled job 6  {run_dir}\n"


def test_cancel_says_when_there_is_nothing_to_end(run_dir, slurm, capsys):
    asked = slurm(squeue="5|COMPLETED|None|0:15|node1\n")
    record.add(run_dir, submission("5"))
    assert main(["cancel", str(run_dir)]) == 0
    assert "no job of these runs" in capsys.readouterr().out
    assert "scancel" not in asked.read_text()


def test_without_slurm_cancel_is_refused_and_status_shows_the_folder(run_dir, monkeypatch, capsys):
    record.add(run_dir, submission("5"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RecipeError, match="login node"):
        main(["cancel", str(run_dir)])
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "Slurm's commands are not on this machine" in shown
    assert "no job at work" not in shown, "that is not known here"
    assert "job 5  UNKNOWN" in shown


def test_status_tells_what_the_folder_and_the_queue_say(run_dir, slurm, capsys):
    slurm(squeue="6|RUNNING|None|0:15|node[1-2]\n", sacct="5|TIMEOUT|0:0|12:00:00|node1\n")
    for job in ("5", "6"):
        record.add(run_dir, submission(job))
    for step in (500, 1000):
        (run_dir / f"checkpoints/step_{step:09d}").mkdir(parents=True)
        (run_dir / f"checkpoints/step_{step:09d}/meta.json").touch()
    (run_dir / "checkpoints/.partial_step_000001500").mkdir()
    rows = [
        '{"life": 1, "event": "train", "step": 1010, "loss": 2.25}',
        '{"life": 1, "event": "health", "step": 1',
        "",
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(rows))
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "job 6: running" in shown
    assert "newest checkpoint: step 1000" in shown
    assert "train: step 1010, loss 2.25 (" in shown
    assert "job 5  TIMEOUT exit 0:0, 12:00:00 node1" in shown


def test_a_run_that_ended_is_finished_and_a_longer_recipe_is_not(run_dir):
    (run_dir / "summary.txt").write_text("all done\n")
    summary = {"finished": True, "epochs": Recipe().train.epochs}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert read_progress(run_dir).finished
    longer = dataclasses.replace(Recipe().train, epochs=Recipe().train.epochs + 1)
    save_recipe(dataclasses.replace(Recipe(), train=longer), run_dir / "recipe.yaml")
    assert not read_progress(run_dir).finished


def test_a_grids_folder_stands_for_its_points(tmp_path):
    for name in ("lr=0.1", "lr=0.2"):
        record.add(tmp_path / "sweep" / name, submission("1_0"))
    (tmp_path / "sweep/submitit").mkdir()
    assert [run.name for run in find_runs(tmp_path / "sweep")] == ["lr=0.1", "lr=0.2"]
    with pytest.raises(RecipeError, match="no run was started"):
        find_runs(tmp_path)


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, command):
    words = [sys.executable, "-m", "launch", command, str(tmp_path / "typo")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_record_survives_a_torn_line_and_newer_fields(run_dir):
    record.add(run_dir, submission("1"))
    path = run_dir / "submitit" / record.RECORD
    path.write_text(path.read_text().replace('{"job"', '{"new_field": 1, "job"') + '{"job": "2", "clus')
    assert [s.job for s in record.read(run_dir)] == ["1"]


def test_logs_shows_the_rank_asked_for_of_the_newest_job(run_dir, tmp_path, capsys):
    for job in ("5", "6_1"):
        record.add(run_dir, submission(job, logs=tmp_path))
    (tmp_path / "6_1_1_log.out").write_text("rank 1 speaks\n")
    assert main(["logs", str(run_dir), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "rank 1 speaks\n"
    with pytest.raises(RecipeError, match="ranks 0 to 1"):
        main(["logs", str(run_dir), "--rank", "2"])
    with pytest.raises(RecipeError, match="has not written"):
        main(["logs", str(run_dir)])


def test_logs_follow_waits_for_the_log_and_shows_what_comes(run_dir, tmp_path):
    record.add(run_dir, submission("5", logs=tmp_path))
    words = [sys.executable, "-m", "launch", "logs", str(run_dir), "--follow"]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert "waiting for" in process.stderr.readline()
            log = tmp_path / "5_0_log.out"
            log.write_text("first\n")
            assert process.stdout.readline() == "first\n"
            with open(log, "a") as stream:
                stream.write("second\n")
            assert process.stdout.readline() == "second\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_only_the_very_launcher_of_a_local_run_is_signalled(run_dir, capsys):
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            seen = processes.look(process.pid)
            assert seen is not None
            local = submission("1", cluster="local", launcher=seen.pid, launcher_start=seen.start - 1)
            record.add(run_dir, local)
            assert main(["cancel", str(run_dir)]) == 0
            assert "no job of these runs" in capsys.readouterr().out
            assert process.poll() is None, "another process has that number now"
            record.add(run_dir, dataclasses.replace(local, launcher_start=seen.start))
            assert main(["status", str(run_dir)]) == 0
            assert "RUNNING" in capsys.readouterr().out
            assert main(["cancel", str(run_dir)]) == 0
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.returncode == -signal.SIGTERM
        finally:
            process.kill()


def test_a_local_run_of_another_machine_is_left_to_it(run_dir, capsys):
    record.add(run_dir, submission("1", cluster="local", host="elsewhere", launcher=os.getpid()))
    assert main(["cancel", str(run_dir)]) == 0
    assert "ask there: local run 1 on elsewhere" in capsys.readouterr().out
