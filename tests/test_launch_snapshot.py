"""Code snapshots: a job that waited in the queue runs what was submitted, not what was edited meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cyclebnn_dist.config import RecipeError
from launch import snapshot

ROOT = Path(__file__).parents[1]

PROBE = """
    import os, signal, time
    from pathlib import Path
    from submitit.helpers import DelayedSubmission
    from launch import snapshot

    VERSION = "submitted"

    class Probe:
        def __init__(self, name, lives):
            self.name, self.lives = name, lives

        def __call__(self):
            said = snapshot.enter() if snapshot.CODE in os.environ else "none"
            with open(f"{self.name}.lives", "a") as stream:
                stream.write(VERSION + "\\n")
            if len(Path(f"{self.name}.lives").read_text().split()) < self.lives:
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(60)
            return {"versions": Path(f"{self.name}.lives").read_text().split(), "folder": os.getcwd(), "said": said}

        def checkpoint(self):
            return DelayedSubmission(self)
"""

SUBMITTER = """
    import json, sys
    from pathlib import Path
    import submitit
    from launch import snapshot
    from launch.probe import Probe
    from launch.submit import submit_all

    folder = Path("run/submitit").absolute()
    setup = ["while [ ! -e go ]; do sleep 0.05; done"]  # the queue
    if sys.argv[1] == "snapshot":
        setup += snapshot.setup_lines(snapshot.take_snapshot(folder))
    executor = submitit.LocalExecutor(folder, max_num_timeout=3)
    executor.update_parameters(timeout_min=2, setup=setup)
    jobs = submit_all(executor, [Probe("a", 1), Probe("b", 2)])
    probe = Path("launch/probe.py")
    probe.write_text(probe.read_text().replace('"submitted"', '"edited"'))
    Path("go").touch()
    print(json.dumps([job.result() for job in jobs]))
"""


@pytest.fixture
def working_tree(tmp_path):
    """A working tree of this project that may be edited, with two programs for the tests."""
    tree = tmp_path / "tree"
    for package in snapshot.PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "launch" / "probe.py").write_text(textwrap.dedent(PROBE))
    (tree / "submitter.py").write_text(textwrap.dedent(SUBMITTER))
    return tree


@pytest.mark.parametrize(("how", "version"), [("snapshot", "submitted"), ("none", "edited")])
def test_jobs_of_an_array_run_the_submitted_code_in_every_life(working_tree, how, version):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "submitter.py", how],
        cwd=working_tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    once, requeued = json.loads(done.stdout.splitlines()[-1])
    assert once["versions"] == [version]
    assert requeued["versions"] == [version, version], "one job was requeued, and only that one"
    assert once["folder"] == str(working_tree), "relative paths are meant from where the command was typed"
    if how == "snapshot":
        (code,) = (working_tree / "run/submitit/code").iterdir()
        assert once["said"] == f"code: snapshot {code.name} in {code}"


def test_equal_source_shares_a_snapshot_and_an_edit_makes_another(working_tree, tmp_path):
    first = snapshot.take_snapshot(tmp_path / "run", root=working_tree)
    assert first == snapshot.snapshot_path(tmp_path / "run", root=working_tree)
    assert (first / "launch/probe.py").read_bytes() == (working_tree / "launch/probe.py").read_bytes()
    (working_tree / "launch/__pycache__").mkdir()
    (working_tree / "launch/__pycache__/probe.cpython-311.pyc").write_bytes(b"compiled")
    assert snapshot.take_snapshot(tmp_path / "run", root=working_tree) == first
    (working_tree / "cyclebnn_dist/new_file.py").write_text("x = 1\n")
    second = snapshot.take_snapshot(tmp_path / "run", root=working_tree)
    assert second != first
    assert (second / "cyclebnn_dist/new_file.py").exists()
    assert sorted(p.name for p in (tmp_path / "run/code").iterdir()) == sorted([first.name, second.name])


def test_a_snapshot_that_was_edited_is_not_taken_for_what_was_submitted(working_tree, tmp_path):
    code = snapshot.take_snapshot(tmp_path / "run", root=working_tree)
    (code / "launch/probe.py").write_text("VERSION = 'tampered'\n")
    with pytest.raises(RecipeError, match="not what was submitted") as caught:
        snapshot.take_snapshot(tmp_path / "run", root=working_tree)
    assert str(code) in str(caught.value)


def test_a_rank_that_would_run_other_code_ends_instead(tmp_path, monkeypatch):
    monkeypatch.setenv(snapshot.CODE, str(tmp_path / "code"))
    monkeypatch.setenv(snapshot.WORKING_FOLDER, os.getcwd())
    with pytest.raises(RuntimeError, match="not from the snapshot"):
        snapshot.enter()
