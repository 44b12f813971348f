"""The watchdog: ends a rank on which nothing is finished for too long, with the stacks of all its threads.

It is no part of a collective and waits for nobody, so it also works where ranks hang in one. Should the interpreter itself
be stuck, ``faulthandler``, which needs no interpreter, does the same a little later.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from cyclebnn_dist.guards.exit_status import FAILED

T = TypeVar("T")

GRACE_SECONDS = 30.0
STDERR = 2

log = logging.getLogger(__name__)


class Watchdog:
    """Begins to watch at the first ``saw``.

    Args:
        seconds: without progress, after which the process ends with status FAILED; 0 watches nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last, self._what = time.monotonic(), "the start"
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def saw(self, what: str) -> None:
        """Note progress, in words that a reader of the log understands, e.g. ``step 17``."""
        if not self._seconds:
            return
        self._last, self._what = time.monotonic(), what
        faulthandler.dump_traceback_later(self._seconds + GRACE_SECONDS, exit=True, file=STDERR)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def over(self, things: Iterable[T], *, what: str) -> Iterator[T]:
        """``things``, each of which is progress."""
        for number, each in enumerate(things, start=1):
            self.saw(f"{what} {number}")
            yield each

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.05, self._last + self._seconds - time.monotonic())):
            silent = time.monotonic() - self._last
            if silent < self._seconds:
                continue
            log.error(
                "nothing was finished for %.0f s (run.progress_timeout_seconds) since %s; this rank, process %d on %s, ends, "
                "where it stood:",
                silent,
                self._what,
                os.getpid(),
                socket.gethostname(),
            )
            logging.shutdown()
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            os._exit(FAILED)
