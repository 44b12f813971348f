"""The stop vote: whether a signal has reached any rank, asked at a moment that all of them come to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from cyclebnn_dist.guards.preempt import SIGNALS, Preempted, PreemptionFlag
from cyclebnn_dist.world import World

T = TypeVar("T")


class StopVote:
    """One message of three numbers on the control group. The outcome is the same on every rank, and is remembered.

    Attributes:
        agreed: whether a vote has found a signal.
    """

    def __init__(self, world: World, preemption: PreemptionFlag) -> None:
        self.agreed = False
        self._world = world
        self._preemption = preemption
        self._message = torch.zeros(len(SIGNALS), dtype=torch.int64)
        self._work: dist.Work | None = None

    def cast(self) -> None:
        """Collective: every rank calls this. Send this rank's vote; others arrive meanwhile."""
        assert self._work is None
        known = {*self._preemption.received, *self._preemption.of_others}
        self._message = torch.tensor([int(number in known) for number in SIGNALS])
        self._work = dist.all_reduce(
            self._message, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True
        )

    def count(self) -> bool:
        """Collective: every rank calls this, after ``cast``. Whether any rank had a signal when it cast its vote."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        found = zip(SIGNALS, self._message.tolist(), strict=True)
        self._preemption.of_others |= {number for number, voted in found if voted}
        self.agreed = self.agreed or bool(self._message.any())
        return self.agreed

    def take(self) -> bool:
        """Collective: every rank calls this. Vote and count at once."""
        self.cast()
        return self.count()

    def leave_if_any(self) -> None:
        """Collective: every rank calls this, while there is nothing to save.

        Raises:
            Preempted: on every rank, if any had a signal.
        """
        if self.take():
            raise Preempted

    def over(self, things: Iterable[T], *, rounds: int) -> Iterator[T]:
        """Collective: every rank exhausts this. ``things``, with a vote before each; it travels while one is worked on.

        Args:
            rounds: as many as any rank has things, the same on every rank; those with fewer go on voting.

        Raises:
            Preempted: on every rank, before the same of the ``rounds``, if any had a signal.
            Exception: what ``things`` raised on this rank, after the last round, so that nobody waits for its votes.
        """
        iterator, error = iter(things), None
        self.cast()
        for _ in range(rounds):
            if self.count():
                raise Preempted
            self.cast()
            try:
                thing = next(iterator) if error is None else None
            except StopIteration:
                continue
            except Exception as raised:
                error = raised
            if error is None and thing is not None:
                yield thing
        self.count()
        if error is not None:
            raise error
