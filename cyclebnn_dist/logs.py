"""Logging of a process that is one of many."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever ``sys.stderr`` is at the moment: a progress bar puts itself there, to keep lines apart."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logging(*, rank: int, size: int) -> None:
    """Rank 0 logs from INFO on, the others from WARNING on and with their rank; everything to standard error."""
    prefix = "" if rank == 0 else f"[rank {rank}/{size}] "
    handler = StandardErrorHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for noisy in ("numba", "submitit"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if rank != 0:
        warnings.simplefilter("ignore")
