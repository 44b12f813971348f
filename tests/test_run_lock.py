"""Without these, a job submitted twice would write two runs into one folder, or a dead job keep its folder for ever."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from launching import ROOT, TINY_RECIPE

from cyclebnn_dist import run_lock as module
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.run_lock import LOCK, OWNER, run_lock

HOLD = """
import sys, time
from pathlib import Path
from cyclebnn_dist.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(folder, *, seconds=600.0, **variables):
    """Another process that holds the lock of ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_a_second_job_is_refused_and_told_who_works_there(tmp_path):
    with (
        holder(tmp_path / "run", SLURM_JOB_ID="4711") as first,
        pytest.raises(RecipeError, match=rf"in use by job 4711 process {first.pid} on "),
        run_lock(tmp_path / "run"),
    ):
        pass


def test_a_killed_job_keeps_nothing(tmp_path):
    with holder(tmp_path / "run") as first:
        first.kill()
        first.wait()
        assert (tmp_path / "run" / OWNER).exists()
        with run_lock(tmp_path / "run"):
            assert f"process {os.getpid()} on " in (tmp_path / "run" / OWNER).read_text()


def test_where_there_are_no_locks_a_killed_job_keeps_nothing_either(tmp_path, monkeypatch, caplog):
    """As on Lustre mounted without flock: a lock made of a mere file would have to be removed by hand."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with holder(tmp_path / "run"), run_lock(tmp_path / "run"):
        assert "cannot be locked: take care that only one job works there" in caplog.text
    with run_lock(tmp_path / "run"):
        pass


def test_a_requeued_job_waits_for_its_earlier_life(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with holder(tmp_path / "run", seconds=1.5, SLURM_JOB_ID="4711"), run_lock(tmp_path / "run"):
        pass


def test_a_job_that_was_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "a" / "run"):
        _ = 1 / 0
    assert not (tmp_path / "a").exists()
    with run_lock(tmp_path / "run"):
        (tmp_path / "run" / "recipe.yaml").write_text("")
    assert {path.name for path in (tmp_path / "run").iterdir()} - {LOCK} == {"recipe.yaml"}


def test_training_in_a_folder_that_is_in_use_is_refused(tmp_path, tiny_data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    with holder(tmp_path / "run") as first:
        before = sorted((tmp_path / "run").iterdir())
        command = [sys.executable, "-m", "cyclebnn_dist", "train", str(recipe)]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert second.returncode == 2, second.stderr
        assert f"process {first.pid} on " in second.stderr
        assert sorted((tmp_path / "run").iterdir()) == before
