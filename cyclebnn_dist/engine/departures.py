"""The departures: gradients leave to be averaged bucket by bucket, in one order on all ranks, while the backward pass goes on.

A bucket leaves when the last of its gradients is there and all buckets before it have left. What leaves is a copy: a
parameter has no ``grad`` from then on, so that a gradient takes the memory of its bucket alone while it travels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter

import torch
from torch import nn

from cyclebnn_dist.comm import Reducer

Deliver = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the index of a parameter, its averaged gradient in its order in memory (1-D), and its gradient's own view."""


class Departures:
    """Hooks on parameters that have a gradient, and the exchanges of their buckets that are under way.

    Args:
        parameters: of the model, in model order.
        buckets: indices of those that are trained, in the order in which buckets leave.
        deliver: told of every parameter's average, once a step, in the order of buckets.
        most_under_way: copies of buckets that exist at a time, where one more makes the backward pass wait for the first;
            None for any number.
    """

    def __init__(
        self,
        reducer: Reducer,
        parameters: Sequence[nn.Parameter],
        buckets: Sequence[Sequence[int]],
        *,
        deliver: Deliver,
        most_under_way: int | None = None,
    ) -> None:
        self._reducer = reducer
        self._parameters = parameters
        self._buckets = [tuple(bucket) for bucket in buckets]
        self._deliver = deliver
        self._most_under_way = most_under_way
        self._bucket_of = {index: number for number, bucket in enumerate(buckets) for index in bucket}
        self._leaving = False
        self._left = 0
        self._missing: list[set[int]] = []
        self._under_way: deque[_Trip] = deque()
        for index in self._bucket_of:
            parameters[index].register_post_accumulate_grad_hook(partial(self._arrived, index=index))

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Collective: every rank calls this, around the last backward pass of a step. At its end everything is delivered.

        Raises:
            RuntimeError: naming the parameters that have no gradient.
        """
        self._missing = [set(bucket) for bucket in self._buckets]
        self._left = 0
        self._leaving = True
        try:
            yield
            self._leaving = False
            # Those that only earlier passes of the step gave a gradient.
            while self._left < len(self._buckets) and self._is_complete(self._buckets[self._left]):
                self._depart()
            absent = [i for bucket in self._buckets[self._left :] for i in bucket if self._lacks_gradient(i)]
            if absent:
                names = ", ".join(self._reducer.layout.parameters[index].name for index in sorted(absent))
                raise RuntimeError(
                    f"parameters that take no part in the loss: {names}; leave them out of the model, or train with "
                    "engine.name=ddp engine.find_unused_parameters=true"
                )
            while self._under_way:
                self._arrive()
        finally:
            self._leaving = False
            self._under_way.clear()

    def _arrived(self, parameter: torch.Tensor, *, index: int) -> None:
        if not self._leaving:
            return
        number = self._bucket_of[index]
        if number < self._left:
            name = self._reducer.layout.parameters[index].name
            raise RuntimeError(f"the gradient of {name} comes in more than one part within a backward pass")
        self._missing[number].discard(index)
        while self._left < len(self._buckets) and not self._missing[self._left]:
            self._depart()

    def _lacks_gradient(self, index: int) -> bool:
        return self._parameters[index].grad is None

    def _is_complete(self, bucket: Sequence[int]) -> bool:
        return not any(self._lacks_gradient(index) for index in bucket)

    @torch.no_grad()
    def _depart(self) -> None:
        """Collective: every rank calls this. Let the next bucket leave."""
        begun = perf_counter()
        while self._most_under_way is not None and len(self._under_way) >= self._most_under_way:
            self._arrive()
        self._reducer.counters.wait_seconds += perf_counter() - begun
        bucket = self._buckets[self._left]
        self._left += 1
        gradients = [self._parameters[index].grad for index in bucket]
        views = [in_memory_order(gradient) for gradient in gradients if gradient is not None]
        flat = torch.cat([view.reshape(-1) for view in views])
        places = [(g.shape, g.stride()) for g in gradients if g is not None]
        for index in bucket:
            self._parameters[index].grad = None
        self._under_way.append(_Trip(bucket, places, self._reducer.reduce_flat(flat, parameters=bucket)))

    @torch.no_grad()
    def _arrive(self) -> None:
        """Wait for the bucket that has been under way for longest, and deliver it."""
        trip = self._under_way.popleft()
        flat = trip.future.wait()
        start = 0
        for index, (shape, stride) in zip(trip.bucket, trip.places, strict=True):
            part = flat[start : start + shape.numel()]
            start += shape.numel()
            self._deliver(index, part, part.as_strided(shape, stride))


class _Trip:
    """A bucket under way, and shapes and strides of the gradients in it."""

    def __init__(
        self,
        bucket: tuple[int, ...],
        places: list[tuple[torch.Size, tuple[int, ...]]],
        future: torch.futures.Future[torch.Tensor],
    ) -> None:
        self.bucket, self.places, self.future = bucket, places, future


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor whose dimensions go from the widest stride to the narrowest, as DDP lays out its buckets."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
