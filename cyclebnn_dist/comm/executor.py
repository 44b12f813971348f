"""The executor: where exchanges run, one after the other in the order they were handed in.

On a CPU that is a thread of its own, because a Gloo collective blocks its caller, and collectives started from
callbacks of futures run in a different order on each rank. On a GPU it is a stream of its own: the host only
enqueues, in the caller's thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], torch.Tensor]


class Executor(Protocol):
    """``error`` is the first exception an exchange raised; after it every further exchange fails alike."""

    error: Exception | None

    def submit(self, work: Work, flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Run ``work``, which reads and writes ``flat``, after all that were submitted before."""

    def close(self) -> None:
        """Take no more work."""


class ThreadExecutor:
    """One first-in-first-out thread."""

    def __init__(self, name: str) -> None:
        self.error: Exception | None = None
        self._queue: queue.SimpleQueue[tuple[Work, torch.futures.Future[torch.Tensor]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Work, flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._queue.put((work, future))
        return future

    def close(self) -> None:
        self._queue.put(None)
        if self.error is None:
            self._thread.join()

    @torch.no_grad()
    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            if self.error is None:
                try:
                    result = work()
                except Exception as error:
                    self.error = error
            if self.error is None:
                future.set_result(result)
            else:
                future.set_exception(self.error)  # type: ignore[arg-type]


class StreamExecutor:
    """One CUDA stream of high priority."""

    def __init__(self, device: torch.device) -> None:
        self.error: Exception | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    @torch.no_grad()
    def submit(self, work: Work, flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        if self.error is not None:
            raise self.error
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[self._device])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        flat.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            try:
                future.set_result(work())
            except Exception as error:
                self.error = error
                raise
        return future

    def close(self) -> None:
        self._stream.synchronize()


class InlineExecutor:
    """For a world of one: there is nothing to exchange, and the gradient is its own mean."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def submit(self, work: Work, flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        devices: list[int | str | torch.device] | None = [flat.device] if flat.device.type == "cuda" else None
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        future.set_result(flat)
        return future

    def close(self) -> None:
        pass


def build_executor(device: torch.device, *, world_size: int) -> Executor:
    """The executor for gradients on ``device``."""
    if world_size == 1:
        return InlineExecutor()
    if device.type == "cuda":
        return StreamExecutor(device)
    return ThreadExecutor("gradient-exchange")
