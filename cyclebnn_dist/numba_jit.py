"""Compiling loops with numba: without the interpreter lock, IEEE arithmetic, kept on disk where that is possible.

Compiled code is kept in numba's cache beside the source, or in the user's cache folder where that is read-only; where
neither can be written, every process compiles for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, reassociate: bool = False) -> Callable[..., Any]:
    """``numba.njit`` of ``function``.

    Args:
        reassociate: let sums be added in another order than the one written, which makes them vectorize. The order is then the machine's: the same on one processor, maybe not on another.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "nsz"} if reassociate else False,
    }
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        log.info("compiled kernels are not kept on disk: %s", error)
        return numba.njit(**options)(function)
