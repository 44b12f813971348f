"""Real runs for tests: a tiny recipe, started as a user starts it, watched, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]

TINY_RECIPE = """\
run: {{dir: {run_dir}, deterministic: true, log_every: 1, health_every: 2, save_every: 1}}
model: {{name: resnet18, num_classes: 10, kwargs: {{channels: [16, 32, 32, 64]}}}}
data: {{path: {data}, image_size: 32, threads: 1}}
train: {{epochs: 2.0, global_batch_size: 16, ema_decay: 0.9, clip_norm: 5.0}}
optim: {{lr: 1e-3}}
precision:
  forward: {{cycles: 2}}
  communication: {{low: 1, high: 8, cycles: 2}}
comm: {{mode: quantized, error_feedback: true, check_every: 1}}
engine: {{bucket_mb: 0.1}}
eval: {{every_epochs: 1.0, batch_size: 16}}
wandb: {{mode: offline}}
"""


class Launched:
    """A ``python -m launch --local`` process and the rank processes below it."""

    def __init__(self, recipe: Path, run_dir: Path, *, ranks: int, overrides: tuple[str, ...] = ()) -> None:
        self.run_dir = run_dir
        self._rows = run_dir / "metrics.jsonl"
        self._earlier_rows = len(self._read_rows())
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "launch",
                str(recipe),
                *overrides,
                "--local",
                "--tasks-per-node",
                str(ranks),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, *, seconds: float) -> tuple[int, str]:
        """Exit status and everything printed."""
        try:
            output, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            output, _ = self._process.communicate()
            raise AssertionError(f"still running after {seconds} s\n{output}") from None
        return self._process.returncode, output

    def wait_for_step(self, step: int, *, seconds: float) -> None:
        """Return as soon as a row of ``step`` or a later one, written by this start, is in metrics.jsonl."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if self._process.poll() is not None:
                raise AssertionError(f"ended before step {step}\n{self._process.communicate()[0]}")
            for row in self._read_rows()[self._earlier_rows :]:
                if row["event"] == "train" and row["step"] >= step:
                    return
            time.sleep(0.005)
        raise AssertionError(f"no row of step {step} after {seconds} s")

    def _read_rows(self) -> list[dict[str, Any]]:
        lines = self._rows.read_text().splitlines() if self._rows.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rank_pids(self) -> dict[int, int]:
        """Process id of every rank that is alive."""
        pids = {}
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                environment = child.environ()
                if "submitit.core._submit" in child.cmdline() and "SUBMITIT_LOCAL_LOCALID" in environment:
                    pids[int(environment["SUBMITIT_LOCAL_LOCALID"])] = child.pid
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return pids

    def kill_rank(self, rank: int) -> set[int]:
        """SIGKILL one rank; returns the process ids of all ranks as they were before."""
        pids = self.rank_pids()
        os.kill(pids[rank], signal.SIGKILL)
        return set(pids.values())

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Kill what is left of it."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()


def alive(pids: set[int]) -> set[int]:
    """Those of ``pids`` that are running (a zombie is not)."""
    return {pid for pid in pids if _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether ``condition`` came true within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
