"""The executor: where exchanges run, begun in the order they were handed in.

On a CPU, where a message is waited for in the thread that wants it, several threads have an exchange each, and one of them at
a time works while the others wait for the network: what one encodes or decodes is done while bytes of others travel.
On a GPU it is a stream of its own: the host only enqueues, in the caller's thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from time import perf_counter
from typing import Protocol

import torch

Exchange = Callable[[], None]

UNDER_WAY = 6
"""Exchanges at once: some in either phase, so that ranks need not keep pace with each other."""


class Executor(Protocol):
    """``error`` is the first exception an exchange raised; after it every further exchange fails alike."""

    error: Exception | None

    def submit(self, exchanges: Sequence[Exchange], flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Run ``exchanges``, each of which reads and writes a part of ``flat``, after all that were submitted before.

        Returns:
            a future of ``flat``.
        """

    def waiting(self) -> AbstractContextManager[None]:
        """Around what an exchange does only to wait for the network."""

    def take_idle_seconds(self) -> float:
        """Seconds since the last call in which exchanges were under way and all of them waited."""

    def drain(self) -> None:
        """Return when all that was submitted has ended, well or not; on a GPU, let the caller's stream wait for it."""

    def close(self) -> None:
        """Take no more work: what is submitted from now on fails."""


class _Bucket:
    """Exchanges that are one piece of work to whoever submitted them."""

    def __init__(self, flat: torch.Tensor, *, exchanges: int) -> None:
        self.flat = flat
        self.left = exchanges
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future()


class ThreadExecutor:
    """Threads that take turns. An exchange waits for the same exchange of its peers alone, so ranks need not agree on turns."""

    def __init__(self, name: str) -> None:
        self.error: Exception | None = None
        self._queue: queue.SimpleQueue[tuple[Exchange, _Bucket] | None] = queue.SimpleQueue()
        self._books = threading.Lock()
        self._unfinished: set[_Bucket] = set()
        self._closed = False
        self._turn = threading.Lock()
        self._ended_turn = 0.0
        self._num_waiting = 0
        self._idle_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True)
            for number in range(UNDER_WAY)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, exchanges: Sequence[Exchange], flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        bucket = _Bucket(flat, exchanges=len(exchanges))
        with self._books:
            error = self.error
            if error is None and self._closed:
                error = RuntimeError("gradients were handed over after the reducer was closed")
            if error is None and exchanges:
                self._unfinished.add(bucket)
                # Within the lock, so that nothing comes behind what close() puts there.
                for exchange in exchanges:
                    self._queue.put((exchange, bucket))
        if error is not None:
            bucket.future.set_exception(error)  # type: ignore[arg-type]
        elif not exchanges:
            bucket.future.set_result(flat)
        return bucket.future

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._num_waiting += 1
        self._end_turn()
        try:
            yield
        finally:
            self._take_turn()
            self._num_waiting -= 1

    def take_idle_seconds(self) -> float:
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds

    def drain(self) -> None:
        with self._books:
            unfinished = list(self._unfinished)
        for bucket in unfinished:
            with suppress(Exception):  # of the exchange, which stays in ``error``
                bucket.future.wait()

    def close(self) -> None:
        with self._books:
            if not self._closed:
                for _ in self._threads:
                    self._queue.put(None)
            self._closed = True
        if self.error is None:
            for thread in self._threads:
                thread.join()

    @torch.no_grad()
    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            exchange, bucket = item
            self._take_turn()
            try:
                done = self.error is None and self._run(exchange, bucket)
            finally:
                self._end_turn()
            # Not in its turn: what the caller hung on to the future runs here, and may wait for other exchanges.
            if done:
                bucket.future.set_result(bucket.flat)

    def _run(self, exchange: Exchange, bucket: _Bucket) -> bool:
        """Whether that was the last exchange of a bucket which has not failed."""
        try:
            exchange()
        except Exception as error:
            self._fail(error)
            return False
        bucket.left -= 1
        with self._books:
            done = bucket.left == 0 and bucket in self._unfinished
            self._unfinished -= {bucket} if done else set()
        return done

    def _fail(self, error: Exception) -> None:
        """Let everything that is not finished fail of the first error; what other exchanges wait for may never come."""
        with self._books:
            if self.error is not None:
                return
            self.error = error
            unfinished, self._unfinished = self._unfinished, set()
        for bucket in unfinished:
            bucket.future.set_exception(error)  # type: ignore[arg-type]

    def _take_turn(self) -> None:
        self._turn.acquire()
        if self._num_waiting:
            self._idle_seconds += perf_counter() - self._ended_turn

    def _end_turn(self) -> None:
        self._ended_turn = perf_counter()
        self._turn.release()


class StreamExecutor:
    """One CUDA stream of high priority."""

    def __init__(self, device: torch.device) -> None:
        self.error: Exception | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    @torch.no_grad()
    def submit(self, exchanges: Sequence[Exchange], flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        if self.error is not None:
            raise self.error
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[self._device])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        flat.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            try:
                for exchange in exchanges:
                    exchange()
                future.set_result(flat)
            except Exception as error:
                self.error = error
                raise
        return future

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take_idle_seconds(self) -> float:
        return 0.0

    def drain(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        self._stream.synchronize()


class InlineExecutor:
    """For a world of one: there is nothing to exchange, and the gradient is its own mean."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def submit(self, exchanges: Sequence[Exchange], flat: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        devices: list[int | str | torch.device] | None = [flat.device] if flat.device.type == "cuda" else None
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        future.set_result(flat)
        return future

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take_idle_seconds(self) -> float:
        return 0.0

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def build_executor(device: torch.device, *, world_size: int) -> Executor:
    """The executor for gradients on ``device``."""
    if world_size == 1:
        return InlineExecutor()
    if device.type == "cuda":
        return StreamExecutor(device)
    return ThreadExecutor("gradient-exchange")
