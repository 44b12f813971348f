"""The queue: what Slurm says of jobs, and the end of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cyclebnn_dist.config import RecipeError

SECONDS = 60
"""How long a Slurm command may take."""

ENDED = frozenset(
    [
        "ENDED",
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
        "SPECIAL_EXIT",
    ]
)
"""States of jobs that have left the queue, under squeue's names; ENDED is that of local runs."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job."""

    state: str
    """As squeue or sacct writes it; UNKNOWN where neither knows the job."""
    detail: str = ""
    """The reason it waits, or time used and nodes."""

    @property
    def live(self) -> bool:
        """Whether the job is in the queue: waiting, running, or on its way out of either."""
        return self.state != "UNKNOWN" and self.state not in ENDED


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """Return the state of every job: from squeue, and from sacct for those that squeue has forgotten.

    Raises:
        RecipeError: Slurm's commands are not on this machine, or its controller does not answer.
    """
    if not jobs:
        return {}
    states: dict[str, JobState] = {}
    found = _slurm(
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T|%r|%M|%N",
        f"--jobs={','.join(jobs)}",
    )
    if found.returncode and "Invalid job id" not in found.stderr:
        raise RecipeError("squeue", found.stderr.strip() or f"ended with {found.returncode}")
    for line in found.stdout.splitlines():
        job, state, reason, elapsed, nodes = (part.strip() for part in line.split("|", 4))
        waits = f"({reason})" if state == "PENDING" and reason != "None" else ""
        states[job] = JobState(state, waits or f"{elapsed} {nodes}".strip())
    missing = [job for job in jobs if job not in states]
    if missing and shutil.which("sacct"):
        command = (
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State,ExitCode,Elapsed,NodeList",
        )
        found = _slurm(*command, f"--jobs={','.join(missing)}")
        for line in found.stdout.splitlines() if found.returncode == 0 else []:
            job, state, status, elapsed, nodes = line.split("|", 4)
            states[job] = JobState(state.split()[0], f"exit {status}, {elapsed} {nodes}".strip())
    return {job: states.get(job, JobState("UNKNOWN", "(Slurm has forgotten it)")) for job in jobs}


def cancel(jobs: Sequence[str]) -> None:
    """End jobs for good. They get SIGTERM, so running ranks save as far as Slurm's KillWait lets them.

    A job on its way to a requeue (its time limit is near, say) would ask Slurm for another life: Slurm is told first to
    grant none.

    Raises:
        RecipeError: Slurm's commands are not on this machine, or refuse.
    """
    for job in jobs:
        _slurm("scontrol", "update", f"JobId={job}", "Requeue=0")  # refused for a job that has just ended
    done = _slurm("scancel", *jobs)
    problems = [line for line in done.stderr.splitlines() if "already completing or completed" not in line]
    if done.returncode and problems:
        raise RecipeError("scancel", "\n".join(problems))


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        cure = "ask on a login node of the cluster"
        raise RecipeError(command[0], "Slurm's commands are not on this machine", cure) from None
    except subprocess.TimeoutExpired:
        raise RecipeError(command[0], f"Slurm did not answer within {SECONDS} s", "try again later") from None
    if "Unable to contact slurm controller" in done.stderr:
        raise RecipeError(command[0], re.sub(r"^\w+: error: ", "", done.stderr.strip()), "try again later")
    return done
