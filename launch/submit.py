"""Submission: a profile and a job become a submitit executor, and with it a submitted job."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import submitit
from submitit.helpers import clean_env

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.meeting import free_port
from launch import snapshot
from launch.job import LAUNCHER_PID, MARK
from launch.profile import ClusterProfile, num_tasks_per_node

NO_TIME_LIMIT_MIN = 60 * 24 * 3650


class PreviewExecutor(submitit.SlurmExecutor):
    """A Slurm executor for machines without Slurm: it writes the sbatch text and never submits."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def slurm_executor(
    profile: ClusterProfile,
    *,
    folder: Path,
    code: Path | None = None,
    max_parallel: int | None = None,
    preview: bool = False,
) -> submitit.SlurmExecutor:
    """Return the executor that submits under this profile; ``preview`` needs no Slurm and only shows the text.

    Args:
        profile: the cluster profile.
        folder: the launcher's folder in the run folder (of a grid: in the grid's).
        code: snapshot the job imports from.
        max_parallel: of an array, how many tasks may run at a time.
        preview: see above.

    Raises:
        RecipeError: there is no Slurm on this machine.
    """
    make = PreviewExecutor if preview else submitit.SlurmExecutor
    try:
        executor = make(
            folder, max_num_timeout=profile.max_num_timeout, python=slurm_python(profile, folder=folder)
        )
    except RuntimeError as error:
        cure = "submit from a login node, show the text with --dry-run, or train here with --local"
        raise RecipeError("--cluster", f"there is no Slurm on this machine ({error})", cure) from None
    parameters = slurm_parameters(profile, name=profile.name or folder.parent.name, folder=folder)
    if code is not None:
        parameters["setup"] = [*(parameters["setup"] or []), *snapshot.setup_lines(code)]
    if max_parallel is not None:
        parameters["array_parallelism"] = max_parallel
    executor.update_parameters(**parameters)
    return executor


def slurm_parameters(profile: ClusterProfile, *, name: str, folder: Path) -> dict[str, Any]:
    """Return the sbatch options of a profile under submitit's names; what the profile leaves open is left out."""
    srun_args = list(profile.srun_args)
    if profile.cpus_per_task is not None:
        # since Slurm 22.05 srun no longer takes this over from sbatch
        srun_args.insert(0, f"--cpus-per-task={profile.cpus_per_task}")
    if profile.container.image and profile.container.runtime == "pyxis":
        mounts = [m if ":" in m else f"{m}:{m}" for m in container_mounts(profile, folder=folder)]
        srun_args += [
            f"--container-image={profile.container.image}",
            f"--container-mounts={','.join(mounts)}",
        ]
    options = {
        "job_name": name,
        "time": profile.timeout_min,
        "nodes": profile.nodes,
        "ntasks_per_node": num_tasks_per_node(profile),
        "gpus_per_node": profile.gpus_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "mem": None if profile.mem_gb is None else f"{round(1024 * profile.mem_gb)}M",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    return {
        **{option: value for option, value in options.items() if value is not None},
        "signal_delay_s": profile.signal_delay_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": [*exports, *profile.setup] or None,
        "srun_args": srun_args or None,
        "additional_parameters": {
            ("requeue" if profile.requeue else "no-requeue"): True,
            **profile.additional_parameters,
        },
    }


def after(profile: ClusterProfile, jobs: Sequence[str]) -> ClusterProfile:
    """Return the profile of a job that starts when these have ended, however they end.

    Raises:
        RecipeError: the profile has a dependency of its own.
    """
    if not jobs:
        return profile
    if "dependency" in profile.additional_parameters:
        problem = f"is set, and so is --again, which waits for job {', '.join(jobs)}"
        raise RecipeError("additional_parameters.dependency", problem, "leave one of them out")
    waiting = {**profile.additional_parameters, "dependency": f"afterany:{':'.join(jobs)}"}
    return dataclasses.replace(profile, additional_parameters=waiting)


def container_mounts(profile: ClusterProfile, *, folder: Path) -> list[str]:
    """Return what a container sees of the cluster's disks: the submitting folder, the run folder, the profile's mounts."""
    return list(dict.fromkeys([os.getcwd(), str(folder.parent.absolute()), *profile.container.mounts]))


def slurm_python(profile: ClusterProfile, *, folder: Path) -> str:
    """Return the command that srun starts on the nodes in place of Python."""
    if not profile.container.image:
        return python_command(profile)
    python = profile.python or "python3"
    if profile.container.runtime == "pyxis":
        return python
    gpus = ["--nv"] if profile.gpus_per_node else []
    mounts = ",".join(container_mounts(profile, folder=folder))
    return f"{shlex.join([profile.container.runtime, 'exec', *gpus, '--bind', mounts, profile.container.image])} {python}"


def sbatch_text(
    profile: ClusterProfile,
    *,
    folder: Path,
    code: Path | None = None,
    count: int = 1,
    max_parallel: int | None = None,
) -> str:
    """Return the batch file that submit_slurm would submit for ``count`` jobs; nothing is written."""
    executor = slurm_executor(profile, folder=folder, code=code, max_parallel=max_parallel, preview=True)
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, uid="preview")


def submit_slurm(
    jobs: Sequence[Callable[[], Any]],
    *,
    profile: ClusterProfile,
    folder: Path,
    with_code: bool = True,
    max_parallel: int | None = None,
) -> tuple[list[submitit.Job[Any]], Path | None]:
    """Submit with sbatch, several jobs as one array, and return at once: the jobs, and the snapshot they import from.

    Raises:
        RecipeError: no Slurm here, or sbatch refused.
    """
    slurm_executor(profile, folder=folder)  # refuses before anything is written
    code = snapshot.take_snapshot(folder) if with_code else None
    executor = slurm_executor(profile, folder=folder, code=code, max_parallel=max_parallel)
    folder.mkdir(parents=True, exist_ok=True)
    inside_a_job = clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    try:
        with inside_a_job, environ(stale_ranks()):
            return submit_all(executor, jobs), code
    except submitit.core.utils.FailedJobError as error:
        raise RecipeError(
            "--cluster", f"sbatch refused: {str(error).strip()}", "change the profile"
        ) from None


def submit_all(
    executor: submitit.SlurmExecutor | submitit.LocalExecutor, jobs: Sequence[Callable[[], Any]]
) -> list[submitit.Job[Any]]:
    """Submit jobs with an executor: several become one array, each requeued by itself."""
    with executor.batch():
        return [executor.submit(job) for job in jobs]


def start_local(
    job: Callable[[], Any], *, profile: ClusterProfile, folder: Path, mark: str, tasks: int
) -> submitit.LocalJob[Any]:
    """Start the ranks on this machine under submitit's local executor and return at once.

    Every process of the run carries ``CYCLEBNN_LAUNCH=mark`` in its environment. The ranks ignore Ctrl-C: it reaches
    the launcher, which ends them in order.
    """
    executor = submitit.LocalExecutor(
        folder, max_num_timeout=profile.max_num_timeout, python=profile.python or None
    )
    executor.update_parameters(
        tasks_per_node=tasks,
        timeout_min=NO_TIME_LIMIT_MIN,
        signal_delay_s=profile.signal_delay_s,
        stderr_to_stdout=True,
        setup=list(profile.setup),
    )
    variables = {**stale_ranks(), **local_environment(profile, tasks=tasks), MARK: mark}
    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
    try:
        with environ(variables):
            return cast("submitit.LocalJob[Any]", executor.submit(job))
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, previous)


def local_environment(profile: ClusterProfile, *, tasks: int) -> dict[str, str | None]:
    """Return the variables of a local run's ranks: a free port to meet at, cores shared evenly, those of the profile."""
    cores = profile.cpus_per_task or max(1, len(os.sched_getaffinity(0)) // tasks)
    return {
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
        LAUNCHER_PID: str(os.getpid()),
        **profile.environment,
    }


def stale_ranks() -> dict[str, str | None]:
    """Return, as variables to unset, what a shell inside torchrun or a job would pass on to ranks."""
    # PYTHONPATH may still name that job's snapshot; one of this submission comes before it.
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    names |= {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"}
    names |= {snapshot.CODE, snapshot.WORKING_FOLDER}
    return {name: None for name in os.environ if name in names or name.startswith("TORCHELASTIC_")}


def local_gpus() -> list[str]:
    """Return the GPUs a local run may use: CUDA_VISIBLE_DEVICES, else the NVIDIA devices of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    return sorted((p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()), key=int)


def choose_gpus(profile: ClusterProfile) -> list[str]:
    """Return the GPUs of a local run under this profile.

    Raises:
        RecipeError: the profile asks for more than there are.
    """
    gpus = local_gpus()
    if profile.gpus_per_node is None:
        return gpus
    if profile.gpus_per_node > len(gpus):
        problem = f"{profile.gpus_per_node} GPUs asked for, {len(gpus)} here"
        raise RecipeError("gpus_per_node", problem, "ask for fewer, or leave it out to use what there is")
    return gpus[: profile.gpus_per_node]


@contextmanager
def environ(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set (or, for None, unset) environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _apply(variables)
        yield
    finally:
        _apply(before)


def _apply(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def python_command(profile: ClusterProfile) -> str:
    """Return the command that starts Python for a rank."""
    return profile.python or shlex.quote(sys.executable)
