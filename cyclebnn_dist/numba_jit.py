"""Compiling: how Python loops become CPU code without the interpreter lock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

log = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any], *, reassociate: bool = False) -> Callable[..., Any]:
    """``numba.njit`` with IEEE arithmetic. Code is kept in numba's cache: beside the file, or in the user's cache folder.

    Where neither can be written, every process compiles for itself. The cache knows changes of the function's own
    file only: what a function calls belongs in the same file.

    Args:
        reassociate: let sums be added in another order than the one written, which makes them vectorize. The order is
            then the machine's: the same on one processor, maybe not on another.
    """
    options = {**OPTIONS, "fastmath": {"reassoc", "nsz"} if reassociate else False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        log.info("compiled kernels are not kept on disk: %s", error)
        return numba.njit(**options)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what compiled functions of its file call: becomes a part of them, specialized to constants."""
    return numba.njit(forceinline=True, fastmath=False, **OPTIONS)(function)
