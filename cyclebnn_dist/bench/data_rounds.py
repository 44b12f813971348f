"""Rounds of ``cyclebnn bench data``: streams of batches, each timed in its turn while the others rest."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from cyclebnn_dist.bench.data_loaders import STREAMS, Settings, Stream

T = TypeVar("T")

LEAST_BATCHES = 4
TRAINING_STEPS = 2


@dataclass(frozen=True)
class Trained:
    """One turn of training: seconds in all, and those of them that it waited for batches."""

    steps: int
    seconds: float
    waiting: float


@contextmanager
def open_streams(settings: Settings, names: Sequence[str]) -> Iterator[dict[str, Stream]]:
    """The streams of these names, filled; they end with the context."""
    with ExitStack() as stack:
        streams = {}
        for name in sorted(names, key=list(STREAMS).index):
            augment, make = STREAMS[name]
            streams[name] = make(
                replace(settings, config=replace(settings.config, augment=augment))  # type: ignore[arg-type]
            )
            stack.callback(streams[name].close)
        yield streams


def time_streams(
    streams: Mapping[str, Stream], *, threads: int, seconds: float, least_rounds: int = 3
) -> dict[str, list[float]]:
    """Seconds per batch of every stream in every round.

    Args:
        threads: of each stream; a turn takes two batches of each thread, if not more.
        seconds: about how long to go on; ``least_rounds`` are done whatever they take.
    """
    batches = max(LEAST_BATCHES, 2 * threads)

    def turn(name: str) -> float:
        stream = streams[name]
        for _ in range(stream.ahead):  # those were prepared while others had their turn
            stream.next()
        begun = time.perf_counter()
        for _ in range(batches):
            stream.next()
        each = (time.perf_counter() - begun) / batches
        time.sleep(
            1.25 * stream.ahead * each
        )  # until as many are ready again, so that it works in no other's turn
        return each

    return _rounds(turn, tuple(streams), seconds=seconds, least_rounds=least_rounds)


def time_training(
    streams: Mapping[str, Stream],
    step: Callable[[torch.Tensor, torch.Tensor], None],
    *,
    seconds: float,
    least_rounds: int = 2,
) -> dict[str, list[Trained]]:
    """What training takes with the batches of every stream, in every round.

    Args:
        step: of training, with images and labels.
    """

    def turn(name: str) -> Trained:
        stream = streams[name]
        for _ in range(stream.ahead):
            stream.next()
        step(*stream.next())  # what was not prepared yet is now, if batches come faster than steps
        begun, waiting = time.perf_counter(), 0.0
        for _ in range(TRAINING_STEPS):
            asked = time.perf_counter()
            images, labels = stream.next()
            waiting += time.perf_counter() - asked
            step(images, labels)
        trained = Trained(steps=TRAINING_STEPS, seconds=time.perf_counter() - begun, waiting=waiting)
        time.sleep(1.25 * trained.waiting)
        return trained

    return _rounds(turn, tuple(streams), seconds=seconds, least_rounds=least_rounds)


def _rounds(
    turn: Callable[[str], T], names: Sequence[str], *, seconds: float, least_rounds: int
) -> dict[str, list[T]]:
    """Results of ``turn`` by name, in an order drawn anew for each round."""
    generator, order = random.Random(0), list(names)
    results: dict[str, list[T]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    done, longest = 0, 0.0
    while done < least_rounds or time.perf_counter() + longest < end:
        begun = time.perf_counter()
        generator.shuffle(order)
        for name in order:
            results[name].append(turn(name))
        done, longest = done + 1, max(longest, time.perf_counter() - begun)
    return results
