"""A pool of live rank processes: tests run functions in real Gloo process groups without starting torch each time."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import psutil

CALL_SECONDS = 300.0

MOST_THREADS = 48
"""A process with more is replaced: every Gloo group that something still refers to keeps three, which wake all the time."""


class RankFailure(AssertionError):
    """A function raised, died or did not return in some rank; the message holds every rank's traceback."""


class RankPool:
    """Processes that live as long as the pool; a call gets a fresh default process group of exactly ``n`` ranks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[tuple[Any, Connection]] = []
        self._calls = 0

    def __call__(
        self, n: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = CALL_SECONDS
    ) -> list[Any]:
        """Run module-level ``fn(rank, n, *args)`` in ``n`` ranks and return their results in rank order."""
        answers = self.outcomes(n, fn, *args, timeout_seconds=timeout_seconds)
        failed = {rank: text for rank, (kind, text) in enumerate(answers) if kind != "result"}
        if failed:
            raise RankFailure("\n".join(f"--- rank {rank} of {n}: {text}" for rank, text in failed.items()))
        return [value for _, value in answers]

    def outcomes(
        self, n: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = CALL_SECONDS
    ) -> list[tuple[str, Any]]:
        """As a call, but each rank's ``("result", value)``, ``("error", traceback)`` or ``("lost", why)``.

        Unless all ranks return, their processes are replaced, so that a broken group cannot reach the next call.
        """
        self._calls += 1
        self._grow(n)
        store = Path(self._folder.name) / f"store-{self._calls}"
        workers = self._workers[:n]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((fn, args, rank, n, str(store)))
        outcomes: dict[int, tuple[str, Any]] = {}
        deadline = monotonic() + timeout_seconds
        pending = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        while pending and (remaining := deadline - monotonic()) > 0:
            for pipe in wait(list(pending), timeout=remaining):
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    outcomes[rank] = ("lost", "the process ended")
        for rank in pending.values():
            outcomes[rank] = ("lost", f"no answer within {timeout_seconds:.0f} s")
        if any(kind != "result" for kind, _ in outcomes.values()) or self._threads(n) > MOST_THREADS:
            self._replace(n)
        return [outcomes[rank] for rank in range(n)]

    def close(self) -> None:
        """End all processes."""
        self._replace(len(self._workers))
        self._folder.cleanup()

    def _grow(self, n: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < n:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _threads(self, n: int) -> int:
        """Threads of that of the first ``n`` processes that has most."""
        return max(psutil.Process(process.pid).num_threads() for process, _ in self._workers[:n])

    def _replace(self, n: int) -> None:
        for process, pipe in self._workers[:n]:
            process.kill()
            process.join()
            pipe.close()
        del self._workers[:n]


def serve(pipe: Connection) -> None:
    """What a rank process does: take calls until it is killed or the test run is gone."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            fn, args, rank, n, store = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timedelta(seconds=60)
            )
            answer = ("result", fn(rank, n, *args))
            dist.destroy_process_group()
        except BaseException:
            answer = ("error", traceback.format_exc())
        gc.collect()  # engines and reducers hold their groups in cycles
        pipe.send(answer)
