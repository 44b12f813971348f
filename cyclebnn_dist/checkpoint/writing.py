"""The writing: one rank's files of one checkpoint, written by a thread that communicates with nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cyclebnn_dist import disk
from cyclebnn_dist.checkpoint.snapshot import WriteFile
from cyclebnn_dist.checkpoint.statefile import Written


@dataclass(frozen=True)
class Failure:
    """Why something could not be written: where, in the system's words, and the number of its error."""

    what: str
    cause: str
    errno: int | None

    @staticmethod
    def of(error: Exception, what: str) -> Failure:
        if isinstance(error, OSError):
            return Failure(what, disk.cause(error), error.errno)
        return Failure(what, f"{type(error).__name__}: {error}", None)


@dataclass
class Outcome:
    """What a rank has written, or why it has not."""

    files: dict[str, Written] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: float = 0.0


class Writing:
    """Begins to write at once."""

    def __init__(self, folder: Path, files: Mapping[str, WriteFile]) -> None:
        self._folder = folder
        self._files = dict(files)
        self._outcome = Outcome()
        # Copies from a GPU are under way; what training does next to the originals comes after them in its stream.
        self._copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether everything is written, or has failed."""
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """Wait for the end, and return it."""
        self._thread.join()
        return self._outcome

    def _write(self) -> None:
        begun, name = time.perf_counter(), ""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            while self._files:
                name = next(iter(self._files))
                self._outcome.files[name] = self._files.pop(name)(self._folder / name)
        except Exception as error:
            self._outcome.failure = Failure.of(error, name)
        self._files.clear()
        self._outcome.seconds = time.perf_counter() - begun
