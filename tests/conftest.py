"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from ranks import RankPool

# Many processes share few cores here; a thread each is fastest, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks(n, fn, *args)``: results of module-level ``fn(rank, n, *args)`` from ``n`` real Gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()
