"""The cluster profile: where a run goes and what it asks for, typed and checked like a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cyclebnn_dist.config import RecipeError, load_settings


@dataclass(frozen=True)
class ContainerConfig:
    """The container the ranks run in."""

    image: str = ""
    """Image: a file that all nodes see, or what else the runtime takes; empty means no container."""
    runtime: Literal["apptainer", "singularity", "pyxis"] = "apptainer"
    """apptainer, singularity: started by srun on every node; pyxis: srun's own --container-image."""
    mounts: tuple[str, ...] = ()
    """Folders as SOURCE or SOURCE:TARGET, e.g. the data; the submitting folder and the run folder are always there."""


@dataclass(frozen=True)
class ClusterProfile:
    """What one run asks for. A profile is a YAML file, as slurm/gpu.yaml; ``base:`` inherits from another one."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: submit with sbatch; local: this machine, one process per rank; debug: this very process, one rank."""
    name: str = ""
    """Name of the job; empty means that of the run folder."""
    nodes: int = 1
    """Number of nodes."""
    tasks_per_node: int = 0
    """Ranks per node; 0 means one per GPU, or a single one where there are no GPUs."""
    gpus_per_node: int | None = None
    """GPUs per node. Unset: Slurm is not asked for any; a local run uses all that are visible."""
    cpus_per_task: int | None = None
    """CPU cores per rank; unset leaves it to Slurm. It should cover data.threads and a core for the step itself."""
    mem_gb: float | None = None
    """Memory per node in GB; unset leaves it to Slurm, 0 asks for all of it."""
    timeout_min: int = 720
    """Time limit in minutes. A run that needs longer is requeued and resumes. Local runs have none."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account that is charged."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Node features, as sbatch --constraint takes them."""
    exclude: str | None = None
    """Nodes to avoid, as sbatch --exclude takes them."""
    requeue: bool = True
    """Let Slurm requeue the job after a pre-emption or a node failure."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which the ranks are told to save."""
    max_num_timeout: int = 30
    """How many times a run may meet its time limit and be requeued."""
    setup: tuple[str, ...] = ()
    """Shell lines run before the ranks start, e.g. module load."""
    srun_args: tuple[str, ...] = ()
    """Further arguments of srun, e.g. --kill-on-bad-exit=1."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, e.g. NCCL_SOCKET_IFNAME: ib0."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Any further sbatch option: reservation: mine, or exclusive: true for one without a value."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    python: str = ""
    """Command that starts Python on a node; empty means the one running now, and in a container python3."""


def load_profile(path: str | os.PathLike[str] | None, *, overrides: Sequence[str] = ()) -> ClusterProfile:
    """Read a profile (None: the defaults) and apply ``key=value`` overrides.

    Raises:
        RecipeError: a file that cannot be read, an unknown key, a wrong type, a value that cannot be.
    """
    return load_settings(ClusterProfile, path, overrides=overrides, check=check_profile)


def check_profile(profile: ClusterProfile) -> None:
    """Check ranges and combinations.

    Raises:
        RecipeError: the first rule that is broken.
    """
    lowest = {
        "nodes": 1,
        "tasks_per_node": 0,
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "mem_gb": 0,
        "timeout_min": 1,
    }
    for key, low in {**lowest, "signal_delay_s": 1, "max_num_timeout": 0}.items():
        value = getattr(profile, key)
        if value is not None and value < low:
            raise RecipeError(key, f"{value} is out of range", f"it must be at least {low}")
    if profile.cluster != "slurm" and profile.nodes != 1:
        raise RecipeError(
            "nodes", f"{profile.nodes} nodes, but cluster is {profile.cluster}", "one machine is one node"
        )
    if profile.cluster == "slurm":
        limit = 60 * profile.timeout_min
        if profile.signal_delay_s >= limit or profile.signal_delay_s > max(600, limit // 5):
            raise RecipeError(
                "signal_delay_s",
                f"{profile.signal_delay_s} s is too much for a time limit of {profile.timeout_min} min",
                "stay below the limit and below 10 minutes, or a time-out is taken for a pre-emption",
            )
    if profile.container.image and profile.cluster != "slurm":
        raise RecipeError(
            "container.image",
            f"a container, but cluster is {profile.cluster}",
            "start the launcher within the container",
        )
    for name in profile.environment:
        if not name.isidentifier():
            raise RecipeError(f"environment.{name}", "is not the name of an environment variable")
    for name, value in profile.additional_parameters.items():
        if value is not True and not isinstance(value, str | int | float):
            raise RecipeError(
                f"additional_parameters.{name}",
                f"{value!r} is not a value of an sbatch option",
                "give text, a number or true",
            )


def num_tasks_per_node(profile: ClusterProfile, *, visible_gpus: int = 0) -> int:
    """Return the ranks of one node; ``visible_gpus`` counts for a local run that does not name its GPUs."""
    gpus = profile.gpus_per_node if profile.gpus_per_node is not None else visible_gpus
    return profile.tasks_per_node or gpus or 1
