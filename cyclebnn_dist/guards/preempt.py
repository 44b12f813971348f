"""Pre-emption: what signals asked for, the hand-over to whoever listened before, and the way out of a start that hangs.

Needs no torch, so that a command can listen before it imports any.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from cyclebnn_dist.guards.exit_status import INTERRUPTED, PREEMPTED

log = logging.getLogger(__name__)
T = TypeVar("T")

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

START_SECONDS = 20.0
"""How long a start may take, after a signal, to come to a place where all ranks can leave it together. Slurm's shortest
usual time between SIGTERM and SIGKILL (KillWait) is 30 s."""

REQUEUE_SECONDS = 10.0
"""How much longer ranks other than 0 stay, because their end may end rank 0 while it puts the job back into the queue."""

AT_START = "before the first step: leaving, there is nothing new to save"

INTERRUPT_SECONDS = 5.0
"""How long a process may take to end after the second Ctrl-C."""


class Preempted(Exception):
    """A signal asked to leave what was going on, which had nothing to save; raised on every rank."""


class PreemptionFlag:
    """Set by SIGUSR2 (submitit's warning), SIGTERM and Ctrl-C; read where all ranks can leave together.

    The handlers only set the flag: saving needs all ranks, and a signal may reach only one of them. A second signal
    changes nothing, but for the second Ctrl-C, which ends this process without saving. A thread hears signals as well,
    through a pipe, because handlers do not run while the main thread is inside a library. It says what was received, and
    ends a process that has not come to its first step and stays where it is.

    Attributes:
        received: by this process, in order.
        of_others: signals that other ranks have told of.
    """

    def __init__(self, *, at_start: str = AT_START) -> None:
        """
        Args:
            at_start: what follows a signal that comes before the first step, in words.
        """
        self._at_start = at_start
        self.received: list[signal.Signals] = []
        self.of_others: frozenset[signal.Signals] = frozenset()
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._interruptible = False
        self._begun = threading.Event()
        self._leaving = threading.Lock()
        self._rank = 0
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._last_resort = threading.Timer(INTERRUPT_SECONDS, os._exit, args=(INTERRUPTED,))
        self._last_resort.daemon = True

    def install(self) -> PreemptionFlag:
        """Replace the handlers, remembering those that were there; a signal that is ignored stays so."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._hear, name="signals", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._set)
        return self

    def uninstall(self) -> None:
        """Put the remembered handlers back."""
        if self._pipe is None or self._thread is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self.first_step_done()
        self._last_resort.cancel()
        signal.set_wakeup_fd(self._previous_pipe)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for descriptor in self._pipe:
            os.close(descriptor)
        self._pipe = None

    @property
    def requested(self) -> bool:
        return bool(self.received or self.of_others)

    @property
    def in_start(self) -> bool:
        """Whether a signal came and the first step has not: there is nothing to save."""
        return self.requested and not self._begun.is_set()

    @property
    def status(self) -> int:
        """The exit status that goes with the signals: INTERRUPTED where Ctrl-C was the only one."""
        return _status([*self.received, *self.of_others])

    def belongs_to(self, rank: int) -> None:
        """Say which rank this process is; only rank 0 can have a job put back into its queue."""
        self._rank = rank

    def interruptible(self, function: Callable[[], T]) -> Callable[[], T]:
        """``function``, out of which a signal raises ``Preempted``; it must leave nothing half done and call no collective.

        Only for the main thread and for what a rank does while the others wait for its answer or its error.
        """

        def run() -> T:
            self._interruptible = True
            try:
                if self.received:
                    raise Preempted
                return function()
            finally:
                self._interruptible = False

        return run

    def first_step_done(self) -> None:
        """From now on there is something to save: wait for the ranks to agree, however long it takes."""
        with self._leaving:
            self._begun.set()

    def hand_over(self) -> None:
        """Let the handler that was installed before ours act on SIGUSR2: submitit's requeues the job and exits."""
        previous = self._previous.get(signal.SIGUSR2)
        if callable(previous):
            previous(int(signal.SIGUSR2), None)

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = number == signal.SIGINT and signal.SIGINT in self.received
        self.received.append(signal.Signals(number))
        if again:
            raise KeyboardInterrupt
        if self._interruptible:
            self._interruptible = False
            raise Preempted

    def _hear(self) -> None:
        """What the thread does until ``uninstall``."""
        assert self._pipe is not None
        heard: list[signal.Signals] = []
        while (number := os.read(self._pipe[0], 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            told = number in heard and number != signal.SIGINT
            heard.append(signal.Signals(number))
            if not told:
                log.warning("%s", self._what_follows(heard))
            if heard.count(signal.SIGINT) == 2 and number == signal.SIGINT:
                self._last_resort.start()
            elif len(heard) == 1 and not self._begun.is_set():
                threading.Thread(target=self._leave_start, args=(heard,), daemon=True).start()

    def _what_follows(self, heard: list[signal.Signals]) -> str:
        if heard.count(signal.SIGINT) > 1:
            return "Ctrl-C again: ending at once, without saving"
        name = heard[-1].name
        if len(heard) > 1:
            return f"{name} received, too: stopping already"
        if not self._begun.is_set():
            return f"{name} received {self._at_start}"
        return f"{name} received: a checkpoint follows at the end of this step, or of this batch of an evaluation"

    def _leave_start(self, heard: list[signal.Signals]) -> None:
        """End this process, unless it ends by itself or comes to its first step in time."""
        patience = START_SECONDS + (REQUEUE_SECONDS if self._rank else 0.0)
        if self._begun.wait(patience):
            return
        with self._leaving:
            if self._begun.is_set():
                return
            log.warning(
                "%.0f s after the signal the start is still not over: this rank ends where it is", patience
            )
            status = _status(heard)
            if self._rank == 0 and signal.SIGUSR2 in heard:
                try:
                    self.hand_over()
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else status
                except Exception as error:
                    log.error("the job could not be put back into the queue: %s", error)
            logging.shutdown()
            os._exit(status & 0xFF)


def _status(signals: Iterable[signal.Signals]) -> int:
    return INTERRUPTED if set(signals) == {signal.SIGINT} else PREEMPTED


@contextmanager
def listening(flag: PreemptionFlag | None = None, *, at_start: str = AT_START) -> Iterator[PreemptionFlag]:
    """A flag that listens: the one given, or else one of its own, which stops listening at the end."""
    if flag is not None:
        yield flag
        return
    flag = PreemptionFlag(at_start=at_start).install()
    try:
        yield flag
    finally:
        flag.uninstall()
