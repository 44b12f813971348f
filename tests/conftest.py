"""Fixtures that tests of several modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks(n, fn, *args)``: results of module-level ``fn(rank, n, *args)`` from ``n`` real Gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()
