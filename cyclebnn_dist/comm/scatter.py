"""The reduce-scatter: the first phase of ``reducer`` alone, for ranks that need the mean of their parts only.

It sends half the bytes of the all-reduce, and its result has one quantization error less: the mean is never encoded, so at
32 bits it is the all-reduce's to the last bit, at any other width a better one. As there, an element's value depends on
the seed, the step, its parameter, its block and what the ranks held. A border between two ranks' parts that cuts a block
sends it to both, who add up the same codes in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cyclebnn_dist.comm.plan import Plan, parameter_starts
from cyclebnn_dist.comm.randomness import step_words
from cyclebnn_dist.comm.reducer import Chunk, Reducer
from cyclebnn_dist.comm.scratch import Scratch


class Landing(NamedTuple):
    """Where ``numel`` elements of a rank's mean come from, in its small or wide rows, and go to, in the flat gradient."""

    small: bool
    source: int
    target: int
    numel: int


class ScatterReducer(Reducer):
    """A ``Reducer`` of a scattered layout. Of what it is given, it averages the elements of this rank's parts alone.

    The other elements of a flat gradient are left with what is of no use: this rank's own, and its residuals.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.layout.scattered
        self._landings: dict[tuple[int, ...], tuple[Landing, ...]] = {}

    def _exchange(self, chunk: Chunk, scratch: Scratch) -> None:
        """Collective: every rank calls this. The one phase, for one chunk."""
        flat, plan = chunk.flat, self._plan(chunk.parameters, chunk.bits)
        _, small, wide, gradients = self._collect(chunk, plan, scratch)
        with self.counters.timing("decode"):
            words = step_words(self._seed, chunk.step)
            self.codec.rotate_rows(wide, plan.own.wide, bits=plan.bits, words=words, inverse=True)
            for landing in self._landings_of(chunk.parameters, plan):
                rows = (small if landing.small else wide).view(-1)
                mean = rows[landing.source : landing.source + landing.numel]
                flat[landing.target : landing.target + landing.numel] = mean
                self._feedback.see_result(mean)
        with self._waiting():
            gradients.finish()
        self.counters.add_exchange(
            sent_bytes=gradients.sent_bytes, numel=plan.numel, world_size=self.layout.world_size, phases=1
        )

    def _landings_of(self, indices: tuple[int, ...], plan: Plan) -> tuple[Landing, ...]:
        if indices not in self._landings:
            self._landings[indices] = landings(plan, rank=self._rank, block_size=self.layout.block_size)
        return self._landings[indices]


def landings(plan: Plan, *, rank: int, block_size: int) -> tuple[Landing, ...]:
    """Where the mean of each parameter of a plan lands, of those of which ``rank`` needs an element."""
    found, num_rows = [], {True: 0, False: 0}
    for parameter, start in zip(plan.parameters, parameter_starts(plan.parameters), strict=False):
        owned, needed = parameter.owned_elements(rank), parameter.needed_elements(rank)
        if needed:
            source = num_rows[parameter.small] * block_size + needed.start - owned.start
            found.append(Landing(parameter.small, source, start + needed.start, len(needed)))
        num_rows[parameter.small] += -(-len(owned) // block_size)
    return tuple(found)
