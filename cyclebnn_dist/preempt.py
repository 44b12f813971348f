"""Pre-emption: a flag that a signal sets, and the hand-over to whoever was listening before."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class PreemptionFlag:
    """Set by SIGUSR2 (submitit's warning), SIGTERM and Ctrl-C; read by the loop at step boundaries.

    The handlers only set the flag: saving needs all ranks, and a signal may reach only one of them.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def install(self) -> PreemptionFlag:
        """Replace the handlers, remembering those that were there; a signal that is ignored stays so."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._set)
        return self

    def uninstall(self) -> None:
        """Put the remembered handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def hand_over(self) -> None:
        """Let the handler that was installed before ours act: submitit's requeues the job and exits."""
        if self.signal is None or self.signal != signal.SIGUSR2:
            return
        previous = self._previous.get(self.signal)
        if callable(previous):
            previous(int(self.signal), None)

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number)
            log.warning("%s received: a checkpoint follows at the end of this step", self.signal.name)
