"""The agreement: proof, at every step, that all ranks are about to do the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.world import World, gather_objects, library_versions, share_refusal

FIELDS = (
    "recipe",
    "teachers",
    "schedule",
    "step",
    "widths",
    "communication mode",
    "world size",
    "parameter layout",
    "codec",
    "backend",
    "library versions",
)


class Requests(NamedTuple):
    """What ranks told each other beside the fields: true where it is on at least one."""

    stop: bool
    """A signal asks to stop."""
    writing: bool
    """The files of a checkpoint are still being written."""


class Agreement:
    """One fixed-size control all-reduce per step on its own Gloo group, and a smaller one about its outcome.

    Each field is a 63-bit number; ``+x`` and ``-x`` under MAX give its largest and smallest value over ranks,
    which are equal exactly when all ranks hold the same. The flags of ``Requests`` travel in the same message.

    Attributes:
        seconds: this rank has spent in here, waiting for slower ranks included.
    """

    def __init__(self, world: World, constants: Mapping[str, int | str], *, timeout_seconds: float) -> None:
        """Collective: every rank calls this (it makes a process group).

        Args:
            constants: the fields that do not change during a run: digests, or texts that a person can compare.
            timeout_seconds: after which an exchange with a silent rank fails.
        """
        self.seconds = 0.0
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._message = torch.empty(2 * len(FIELDS) + len(Requests._fields), dtype=torch.int64)
        self._work: dist.Work | None = None
        self._fields: dict[str, int | str] = {
            "step": -1,
            "widths": 0,
            "world size": world.size,
            "library versions": library_versions(),
            "teachers": "none",
            **constants,
        }
        assert set(self._fields) == set(FIELDS)

    def compare_constants(self) -> None:
        """Collective: every rank calls this. Prove that what does not change is the same everywhere, before any step.

        Call it before DDP is built, which would find another model on some ranks only and leave the others waiting.

        Raises:
            RuntimeError: on every rank, naming the fields that differ and the ranks that hold each value.
        """
        self._compare(gather_objects(self._world, self._fields))

    def settle(self, constants: Mapping[str, int | str]) -> None:
        """Collective: every rank calls this. Replace constants by what has been settled since, and compare them.

        Raises:
            RuntimeError: as ``compare_constants``.
        """
        self._fields |= constants
        self.compare_constants()

    def begin(self, step: int, *, widths: int, stop: bool, writing: bool = False) -> None:
        """Collective: every rank calls this. Start the exchange for ``step``; it runs during the forward pass."""
        assert self._work is None
        begun = perf_counter()
        self._fields |= {"step": step, "widths": widths}
        held = (self._fields[name] for name in FIELDS)
        values = torch.tensor([digest(value) if isinstance(value, str) else value for value in held])
        self._message = torch.cat([values, -values, torch.tensor(Requests(stop, writing), dtype=torch.int64)])
        self._work = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self.seconds += perf_counter() - begun

    def finish(self) -> Requests:
        """Collective: every rank calls this. Await the exchange; what any rank asked for or is doing.

        Raises:
            RuntimeError: on every rank, naming the fields that differ and the ranks that hold each value.
        """
        assert self._work is not None
        begun = perf_counter()
        self._work.wait()
        self._work = None
        self.seconds += perf_counter() - begun
        count = len(FIELDS)
        if not torch.equal(self._message[:count], -self._message[count : 2 * count]):
            self._compare(gather_objects(self._world, self._fields))
        return Requests(*map(bool, self._message[2 * count :].tolist()))

    def all_finite(self, finite: bool, *, refusal: RecipeError | None = None) -> bool:
        """Collective: every rank calls this, after the reduction. Whether the averaged gradient is finite on all ranks.

        Averaged gradients are the same bytes everywhere, so ranks find the same by themselves; where one does not
        (a faulty device, say), its update would part it from the others for good.

        Args:
            refusal: why this rank's part of the gradient means nothing, such as an image that cannot be read.

        Raises:
            RecipeError: on every rank, if one gave a refusal; nothing has been updated yet.
        """
        begun = perf_counter()
        flag = torch.tensor([int(finite) if refusal is None else -1])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        self.seconds += perf_counter() - begun
        if flag.item() < 0:
            share_refusal(self._world, refusal)
        return bool(flag.item())

    def _compare(self, everyone: Sequence[Mapping[str, int | str]]) -> None:
        differing = [name for name in FIELDS if len({fields[name] for fields in everyone}) > 1]
        if not differing:
            return
        lines = [f"ranks disagree in {', '.join(differing)}; all ranks stop before any gradient is exchanged"]
        for name in differing:
            holders: dict[int | str, list[int]] = {}
            for rank, fields in enumerate(everyone):
                holders.setdefault(fields[name], []).append(rank)
            held = "; ".join(
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
                for value, ranks in sorted(holders.items(), key=lambda item: item[1])
            )
            lines.append(f"  {name}: {held}")
        raise RuntimeError("\n".join(lines))


def compare_parameters(model: nn.Module, *, world: World, step: int) -> None:
    """Collective: every rank calls this. Prove that all parameters are bit-identical on all ranks.

    Raises:
        RuntimeError: on every rank, naming the ranks that differ and the first parameter they differ in.
    """
    hashes = gather_objects(world, parameter_hash(model))
    if len(set(hashes)) == 1:
        return
    per_parameter = gather_objects(
        world, [(name, hash_tensors([parameter])) for name, parameter in model.named_parameters()]
    )
    reference = per_parameter[0]
    lines = [f"parameters differ between ranks after step {step}; the run stops"]
    for rank, own in enumerate(per_parameter):
        names = [name for (name, a), (_, b) in zip(own, reference, strict=True) if a != b]
        if names:
            lines.append(f"  rank {rank} differs from rank 0 in {len(names)} tensors, first in {names[0]}")
    raise RuntimeError("\n".join(lines))


def parameter_hash(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of the bytes of all parameters, in model order."""
    return hash_tensors(model.parameters())


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest(*parts: object) -> int:
    """63-bit number that is equal on every machine for equal ``parts`` (their ``repr`` is hashed)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
