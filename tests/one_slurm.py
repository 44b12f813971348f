"""A real Slurm for tests: virtual nodes on this machine (slurm/one_machine.sh), jobs submitted as a user submits them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from launching import ROOT, wait_until

SCRIPT = ROOT / "slurm/one_machine.sh"
NOT_POSSIBLE_HERE = 2

LONG = 180.0
"""Seconds within which anything a test waits for happens, also on a machine that others use."""


class NotPossible(Exception):
    """This machine cannot have a Slurm; says why."""


class OneSlurm:
    """A running Slurm; all it writes is below ``folder``.

    Raises:
        NotPossible: no root, no packages, no namespaces.
    """

    def __init__(self, folder: Path, *, nodes: int) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = self._script("start", "--nodes", str(nodes), "--gpus", "8", "--until-end-of", str(os.getpid()))
        if done.returncode == NOT_POSSIBLE_HERE:
            raise NotPossible(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        """End it, and every job with it."""
        done = self._script("stop")
        assert done.returncode == 0, done.stderr

    def lose_power(self, node: int) -> None:
        """Let a node be gone at once, and its failure be noticed at once, as a health check does it."""
        assert self._script("kill-node", str(node)).returncode == 0
        self.ask("scontrol", "update", f"NodeName=node{node}", "State=DOWN", "Reason=test")

    def lose_daemon(self, node: int) -> None:
        """Let only a node's daemon die; its tasks go on."""
        assert self._script("kill-slurmd", str(node)).returncode == 0

    def restore(self, node: int) -> None:
        """Let a node come back."""
        assert self._script("start-node", str(node)).returncode == 0

        def back() -> bool:
            shown = self.ask("sinfo", "-h", "-n", f"node{node}", "-p", "main", "-o", "%T")
            return shown.strip() == "idle"

        assert wait_until(back, seconds=LONG), self.ask("sinfo", "-Nl")

    def ask(self, *command: str, **variables: str) -> str:
        """What a command prints that must succeed."""
        done = self.call(*command, **variables)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this Slurm."""
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONG
        )

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``python -m launch`` with these arguments."""
        return self.call(sys.executable, "-m", "launch", *arguments)

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = LONG) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what Slurm says of it then."""
        if not wait_until(lambda: self.facts(job)["JobState"] in states, seconds=seconds):
            raise AssertionError(f"not {states}: {self.facts(job)}\n{self.diary()}")
        return self.facts(job)

    def ranks(self, job: str) -> dict[int, psutil.Process]:
        """The processes of a job's ranks."""
        found = {}
        for process, environment in self._processes(job):
            words = set(process.cmdline()[1:])
            is_python = process.name().startswith("python")
            if (
                is_python
                and "SLURM_PROCID" in environment
                and words & {"submitit.core._submit", "cyclebnn_dist"}
            ):
                found[int(environment["SLURM_PROCID"])] = process
        return found

    def kill_rank(self, job: str, rank: int) -> None:
        self.ranks(job)[rank].send_signal(signal.SIGKILL)

    def left_behind(self, job: str) -> list[str]:
        """Processes of a job that live on after it; some take a moment to go."""

        def left() -> list[str]:
            return [" ".join(process.cmdline()) for process, _ in self._processes(job)]

        wait_until(lambda: not left(), seconds=30)
        return left()

    def diary(self) -> str:
        """The controller's last lines."""
        return "\n".join((self.folder / "log/slurmctld.log").read_text().splitlines()[-30:])

    def _processes(self, job: str) -> list[tuple[psutil.Process, dict[str, str]]]:
        mark = {"SLURM_JOB_ID": job, "SLURM_CONF": self.environment["SLURM_CONF"]}
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if mark.items() <= environment.items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process, environment))
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        return found

    def _script(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [str(SCRIPT), command, str(self.folder), *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=600)


class Submitted:
    """A run that was submitted, and its run folder."""

    def __init__(self, slurm: OneSlurm, run_dir: Path, *arguments: str) -> None:
        self.slurm, self.run_dir = slurm, run_dir
        done = slurm.launch(*arguments, f"run.dir={run_dir}")
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split()[2]

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it is, repeated steps included."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def lives(self) -> int:
        return sum(row["event"] == "start" for row in self.rows())

    def starts(self) -> list[int]:
        """Step at which each life began."""
        return [row["step"] for row in self.rows() if row["event"] == "start"]

    def checkpoints(self) -> list[int]:
        """Steps of published checkpoints."""
        return sorted(
            int(path.parent.name.removeprefix("step_"))
            for path in self.run_dir.glob("checkpoints/step_*/meta.json")
        )

    def log(self, rank: int = 0) -> str:
        path = self.run_dir / f"submitit/{self.job}_{rank}_log.out"
        return path.read_text() if path.exists() else "(no log)"

    def wait_for_life(self, life: int, *, steps: int = 4) -> None:
        """Wait until the life of this number has made some steps."""

        def made() -> bool:
            rows = self.rows()
            begun = [number for number, row in enumerate(rows) if row["event"] == "start"]
            return len(begun) >= life and (
                sum(row["event"] == "train" for row in rows[begun[life - 1] :]) >= steps
            )

        self._wait(made, f"{steps} steps of life {life}")

    def wait_for_checkpoint(self, *, since: int = 0) -> None:
        self._wait(lambda: any(step > since for step in self.checkpoints()), "a checkpoint")

    def wait_until_ended(self, *, seconds: float = LONG) -> dict[str, str]:
        """Wait until the job has left the queue, and return what Slurm says of it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.slurm.wait(self.job, *ends, seconds=seconds)

    def assert_finished(self, *, seconds: float = LONG) -> dict[str, str]:
        facts = self.wait_until_ended(seconds=seconds)
        assert facts["JobState"] == "COMPLETED", f"{facts}\n{self.log()}\n{self.slurm.diary()}"
        assert json.loads((self.run_dir / "summary.json").read_text())["finished"]
        return facts

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        if not wait_until(condition, seconds=LONG):
            raise AssertionError(
                f"no {what}\n{self.slurm.facts(self.job)}\n{self.log()}\n{self.slurm.diary()}"
            )
