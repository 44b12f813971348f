"""The record of submissions: which jobs were started for a run folder, one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.run_folder import LAUNCHER_FOLDER
from launch import processes

RECORD = "submissions.jsonl"


@dataclass(frozen=True)
class Submission:
    """One job that was started for a run."""

    job: str
    """Slurm's number (of an array: 123_4), or for a local run the process id of submitit's controller."""
    cluster: str
    """slurm or local."""
    ranks: int
    logs: str
    """Folder of the ranks' logs."""
    code: str = ""
    """Snapshot the job imports from; empty for none."""
    submitted: str = dataclasses.field(
        default_factory=lambda: datetime.now().astimezone().isoformat("T", "seconds")
    )
    host: str = dataclasses.field(default_factory=socket.gethostname)
    command: str = dataclasses.field(
        default_factory=lambda: shlex.join(["python", "-m", "launch", *sys.argv[1:]])
    )
    folder: str = dataclasses.field(default_factory=os.getcwd)
    """Where the command was typed."""
    launcher: int = 0
    """Process id of the launcher of a local run."""
    launcher_start: int = 0
    """When that process started, in the kernel's ticks: a process id alone may be another's by now."""

    def log(self, rank: int) -> Path:
        """Return where a rank's log is, or will be."""
        return Path(self.logs) / f"{self.job}_{rank}_log.out"

    def describe(self) -> str:
        """Return the job in words."""
        return f"job {self.job}" if self.cluster == "slurm" else f"local run {self.job} on {self.host}"


def local_submission(job: str, *, ranks: int, logs: Path) -> Submission:
    """Return the record of a local run that this process looks after."""
    myself = processes.look(os.getpid())
    assert myself is not None
    return Submission(job, "local", ranks, str(logs), launcher=myself.pid, launcher_start=myself.start)


def local_launcher(submission: Submission) -> processes.Process | None:
    """Return the running launcher of a local run; None when it has ended.

    Raises:
        RecipeError: it was started on another machine.
    """
    if submission.host != socket.gethostname():
        raise RecipeError(
            submission.describe(), f"this machine is {socket.gethostname()}", f"ask on {submission.host}"
        )
    process = processes.look(submission.launcher)
    same = process is not None and process.start == submission.launcher_start and process.running
    return process if same else None


def add(run_dir: Path, submission: Submission) -> None:
    """Append a submission to a run's record."""
    path = run_dir / LAUNCHER_FOLDER / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(submission)) + "\n"
    with open(path, "ab", buffering=0) as stream:
        stream.write(line.encode())


def read(run_dir: Path) -> list[Submission]:
    """Return the submissions of a run, the newest last; lines that cannot be read, and fields not known, are left out."""
    try:
        lines = (run_dir / LAUNCHER_FOLDER / RECORD).read_text().splitlines()
    except FileNotFoundError:
        return []
    known = {field.name for field in dataclasses.fields(Submission)}
    found = []
    for line in lines:
        try:
            found.append(Submission(**{k: v for k, v in json.loads(line).items() if k in known}))
        except (ValueError, TypeError, AttributeError):
            continue
    return found
