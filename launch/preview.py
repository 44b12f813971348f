"""The dry run: what a submission would do, shown and not done."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.profile import ClusterProfile, num_tasks_per_node
from launch.submit import choose_gpus, local_environment, python_command, sbatch_text


def submission_text(
    profile: ClusterProfile,
    *,
    folder: Path,
    code: Path | None = None,
    count: int = 1,
    max_parallel: int | None = None,
) -> str:
    """Return the sbatch text (see launch.submit.sbatch_text), or for a local run the processes that would start.

    Raises:
        RecipeError: the profile asks for GPUs that are not there.
    """
    if profile.cluster == "slurm":
        return sbatch_text(profile, folder=folder, code=code, count=count, max_parallel=max_parallel)
    if profile.cluster == "debug":
        return "one rank, in the launcher's own process\n"
    gpus = choose_gpus(profile)
    tasks = num_tasks_per_node(profile, visible_gpus=len(gpus))
    variables = {**local_environment(profile, tasks=tasks), "MASTER_PORT": "(a free port)"}
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    shown = [f"  {name}={value}" for name, value in variables.items() if not name.startswith("CYCLEBNN_")]
    command = f"{python_command(profile)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    lines = [f"{tasks} process{'es' if tasks > 1 else ''} on this machine, each with", *shown]
    lines += [f"  before them: {line}" for line in profile.setup]
    lines += [f"rank {rank}: {command}" for rank in range(tasks)]
    return "\n".join(lines) + "\n"


def layer_table(recipe: str, overrides: Sequence[str]) -> tuple[int, str]:
    """Return (exit status, text) of ``cyclebnn summary`` in a process of its own; without torch, 0 and the reason."""
    if importlib.util.find_spec("torch") is None:
        return (
            0,
            "no layer table: torch is not installed in this Python; `cyclebnn summary` shows it where it is\n",
        )
    command = [sys.executable, "-m", "cyclebnn_dist", "summary", recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    if done.returncode == 0:
        return 0, done.stdout
    reason = "\n".join(done.stderr.strip().splitlines()[-4:])
    return (
        done.returncode,
        f"no layer table: {shlex.join(command[1:4])} ended with {done.returncode}\n{reason}\n",
    )
