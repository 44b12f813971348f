"""The world: which ranks there are, on which device each works, and the small collectives they share."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.meeting import slurm_port

log = logging.getLogger(__name__)
T = TypeVar("T")

ALONE_SECONDS = 60.0
"""What collectives of a single process may take."""

LISTEN_SECONDS = 60.0
"""How long rank 0 waits for its port when another process holds it."""

STRAGGLER_SECONDS = 2.0
"""How long ranks that have found a difference wait for others to come and hear of it."""


@dataclass(frozen=True)
class World:
    """One rank's view of the job.

    ``control`` is a Gloo group of all ranks for small exchanges on the CPU; gradients never travel on it. ``hosts`` are the
    names of the ranks' machines, and ``store`` is where ranks met; a world that was not joined has neither.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    source: str
    control: dist.ProcessGroup | None = None
    hosts: tuple[str, ...] = ()
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def name(self, rank: int) -> str:
        """A rank as a person finds it: its number and its machine."""
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"


def discover_world(*, environ: dict[str, str] | None = None) -> World:
    """Find this process's place from torchrun's variables, Slurm's, or alone, without communicating.

    Raises:
        RecipeError: if some of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set and others are not.
    """
    env = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in env]
    if len(present) == len(names):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            if not env.get(name, "0").isdigit():
                raise RecipeError(
                    f"environment variable {name}", f"{env[name]!r} is not a number", "unset or mend it"
                )
        rank, size, source = int(env["RANK"]), int(env["WORLD_SIZE"]), "environment"
        local_rank = int(env.get("LOCAL_RANK", rank))
    elif {"RANK", "WORLD_SIZE"} & set(present):
        missing = ", ".join(name for name in names if name not in present)
        raise RecipeError(
            "environment",
            f"{', '.join(present)} set but not {missing}",
            "start with torchrun, srun or python -m launch, or unset them for a single process",
        )
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        rank, size, source = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), "slurm"
        local_rank = int(env.get("SLURM_LOCALID", rank))
    else:
        rank, size, local_rank, source = 0, 1, 0, "alone"
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    else:
        device = torch.device("cpu")
    return World(rank=rank, size=size, local_rank=local_rank, device=device, source=source)


def join_world(world: World, *, timeout_seconds: float) -> World:
    """Collective: every rank calls this. Set up the default process group and the control group.

    NCCL on GPUs, Gloo on CPUs; a world of one makes a group of one, so that everything after takes one path.

    Raises:
        RuntimeError: on every rank that came, if they differ in the size of the world, kind of device or libraries.
    """
    if world.source == "slurm":
        import submitit.helpers

        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store: dist.Store | None = None
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store = open_store(world, timeout=timeout)
        compare_at_the_door(world, dist.PrefixStore("door", store), timeout_seconds=timeout_seconds)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    world = replace(world, control=dist.new_group(backend="gloo", timeout=timeout), store=store)
    return replace(world, hosts=tuple(gather_objects(world, socket.gethostname())))


def alone(world: World) -> World:
    """This process as a world of one on its device, for work that it does by itself. No other rank needs to call this.

    Where there are no process groups yet, it makes them.
    """
    if world.size == 1 and world.control is not None:
        return world
    single = replace(world, rank=0, size=1, source="alone", hosts=(), store=None)
    if not dist.is_initialized():
        return join_world(single, timeout_seconds=ALONE_SECONDS)
    control = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return replace(single, control=control)


def open_store(world: World, *, timeout: timedelta) -> dist.Store:
    """The key-value store at MASTER_ADDR and MASTER_PORT, which rank 0 hosts unless torchrun's agent does.

    Unlike torch's own rendezvous it does not wait for a full world, whose size ranks may have been told differently.

    Raises:
        RuntimeError: on rank 0, if another process holds the port and does not let go of it.
        torch.distributed.DistError: nothing listens there within ``timeout``, or it cannot be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = world.rank == 0 and not hosted_by_agent
    until, told = time.monotonic() + LISTEN_SECONDS, False
    store = None
    while store is None:
        try:
            store = dist.TCPStore(
                address, port, is_master=is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
        except dist.DistNetworkError as error:
            if not is_host or "EADDRINUSE" not in str(error):
                raise
            if time.monotonic() > until:
                raise RuntimeError(
                    f"port {port} of {socket.gethostname()}, where the ranks are to meet, has been taken by another process "
                    f"for {LISTEN_SECONDS:.0f} s: start again, or choose another with MASTER_PORT"
                ) from error
            if not told:
                log.warning(
                    "port %d of this machine is taken; waiting for up to %.0f s", port, LISTEN_SECONDS
                )
            told = True
            time.sleep(1.0)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cyclebnn_dist/{attempt}", store)


def compare_at_the_door(world: World, store: dist.Store, *, timeout_seconds: float) -> None:
    """Collective: every rank calls this. Compare what must be the same before ranks can form a group at all.

    Raises:
        RuntimeError: on every rank that came, naming who differs from rank 0 and in what; or if one does not come.
    """
    facts = {"world size": world.size, "device": world.device.type, "libraries": library_versions()}
    store.set(f"facts/{world.rank}", json.dumps(facts))
    if not world.is_main:
        verdict = store.get("verdict").decode()
        store.add("told", 1)
    else:
        absent, lines, deadline = set(range(1, world.size)), [], time.monotonic() + timeout_seconds
        while absent and time.monotonic() < deadline:
            arrived = {rank for rank in absent if store.check([f"facts/{rank}"])}
            for rank in sorted(arrived):
                theirs = json.loads(store.get(f"facts/{rank}"))
                lines += [
                    f"  {name}: {value} on rank 0, {theirs[name]} on rank {rank}"
                    for name, value in facts.items()
                    if theirs[name] != value
                ]
            absent -= arrived
            if lines and deadline > time.monotonic() + STRAGGLER_SECONDS:
                deadline = time.monotonic() + STRAGGLER_SECONDS
            if absent:
                time.sleep(0.02)
        if lines:
            lines.insert(0, "ranks cannot form one world; all of them stop")
        elif absent:
            lines.append(f"rank {', '.join(map(str, sorted(absent)))} of {world.size} did not come")
        verdict = "\n".join(lines)
        store.set("verdict", verdict)
        if verdict:
            # Others lose the store, and the message in it, when this process ends.
            told_by = time.monotonic() + STRAGGLER_SECONDS
            while store.add("told", 0) < world.size - 1 - len(absent) and time.monotonic() < told_by:
                time.sleep(0.02)
    if verdict:
        raise RuntimeError(verdict)


@cache
def library_versions() -> str:
    """Versions of the libraries whose arithmetic must match between ranks, as one line of text."""
    names = ("torch", "numpy", "numba", "timm", "cyclebnn-dist")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def ranks_per_node(world: World) -> int:
    """Collective: every rank calls this. How many ranks each node holds, from LOCAL_WORLD_SIZE or Slurm.

    Raises:
        RecipeError: on every rank, if that is unknown, differs between nodes, or nodes do not hold consecutive ranks.
    """
    local_size = local_world_size()
    facts = gather_objects(world, (local_size, world.local_rank))
    if 0 in {size for size, _ in facts}:
        raise RecipeError(
            "comm.hierarchical",
            "how many ranks a node holds is not known",
            "start with torchrun or python -m launch, or set LOCAL_WORLD_SIZE on every rank",
        )
    if any(fact != (local_size, rank % local_size) for rank, fact in enumerate(facts)) or (
        world.size % local_size
    ):
        raise RecipeError(
            "comm.hierarchical",
            f"ranks are not spread evenly over nodes, consecutive ones on each: (ranks of its node, place) is {facts}",
            "give every node the same number of ranks, in order, or set it to false",
        )
    return local_size


def local_world_size(*, environ: dict[str, str] | None = None) -> int:
    """Ranks of this node as LOCAL_WORLD_SIZE or SLURM_NTASKS_PER_NODE says; 0 if neither does."""
    env = os.environ if environ is None else environ
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if env.get(name, "").isdigit():
            return int(env[name])
    return 0


def leave_world() -> None:
    """Tear the process groups down, at the end of a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(world: World, value: T) -> list[T]:
    """Collective: every rank calls this. Every rank's ``value``, in rank order, on every rank."""
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value, group=world.control)
    return gathered


def on_main(world: World, function: Callable[[], T]) -> T:
    """Collective: every rank calls this. Run ``function`` on rank 0 and return its value on every rank.

    Raises:
        Exception: whatever ``function`` raised on rank 0, on every rank.
    """
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box = [function(), None]
        except Exception as error:
            box = [None, error]
    dist.broadcast_object_list(box, src=0, group=world.control)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_succeed(world: World, function: Callable[[], None], *, what: str) -> None:
    """Collective: every rank calls this. Run ``function`` everywhere; fail everywhere if it failed anywhere.

    Raises:
        RecipeError: on every rank, the first rank's own, where every failure was one.
        RuntimeError: on every rank, naming the ranks that failed and why.
    """
    failure: Exception | None = None
    try:
        function()
    except Exception as error:
        failure = error
    reports = gather_objects(
        world,
        None
        if failure is None
        else (isinstance(failure, RecipeError), f"{type(failure).__name__}: {failure}"),
    )
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if isinstance(failure, RecipeError):
        raise failure
    message = "; ".join(f"rank {rank}: {report[1]}" for rank, report in failed)
    raise RuntimeError(f"{what} failed on {len(failed)} of {world.size} ranks: {message}") from failure


def share_refusal(world: World, refusal: RecipeError | None) -> None:
    """Collective: every rank calls this. Let what one rank has to refuse end all of them, and in the same words.

    Raises:
        RecipeError: on every rank, the one of the first rank that gives one.
    """
    for each in gather_objects(world, refusal):
        if each is not None:
            raise each


def mean_in_rank_order(world: World, values: torch.Tensor) -> torch.Tensor:
    """Collective: every rank calls this. Mean over ranks of a CPU float tensor, summed in rank order in fp64.

    The value does not depend on how a ring would have cut the tensor, so a resumed run computes the same.
    """
    gathered = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(gathered, values.contiguous(), group=world.control)
    total = torch.zeros_like(values, dtype=torch.float64)
    for part in gathered:
        total += part.double()
    return (total / world.size).to(values.dtype)


def largest_over_ranks(world: World, values: Sequence[float]) -> list[float]:
    """Collective: every rank calls this. The largest over ranks of each of some numbers, alike on every rank."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world.control)
    return largest.tolist()


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Collective: every rank calls this. Sum over ranks of a CPU integer tensor (exact in any order)."""
    assert not values.is_floating_point()
    total = values.clone()
    dist.all_reduce(total, group=world.control)
    return total
