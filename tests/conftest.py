"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import RankPool

from cyclebnn_dist.data.sample import generate_sample

# A shell that runs the tests in the background has them ignore Ctrl-C, and with them all they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Many processes share few cores here; a thread each is fastest, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks(n, fn, *args)``: results of module-level ``fn(rank, n, *args)`` from ``n`` real Gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample data set with 80 training and 30 validation images of 40 pixels."""
    path = tmp_path_factory.mktemp("data") / "tiny"
    generate_sample(path, num_train=80, num_val=30, image_size=40, seed=0)
    return path
