"""The own time of a step: what a rank spends before it needs any other rank."""

from __future__ import annotations

from time import perf_counter

import torch


class OwnTime:
    """From the beginning of a step to the loss of its last micro-batch: waiting for images, and forward passes.

    With accumulation also all backward passes but the last, in which gradients are exchanged: from there on every rank
    waits for the slowest. On a GPU the time is the device's, between two events in its stream, so it also holds what the
    stream waited for the host. With ``model.sync_bn`` forward passes exchange statistics, and ranks look alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun, self._ended = 0.0, 0.0
        if self._on_gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def begin(self) -> None:
        if self._on_gpu:
            self._events[0].record()
        self._begun = perf_counter()

    def end(self) -> None:
        if self._on_gpu:
            self._events[1].record()
        self._ended = perf_counter()

    def seconds(self) -> float:
        """Between ``begin`` and ``end``. On a GPU it waits for the device to come to the end."""
        if self._on_gpu:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._ended - self._begun
