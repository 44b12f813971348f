"""Without this every killed rank would leave a file in /tmp, until there are thousands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from launching import ROOT

LEAVES_AT_ONCE = """
import os, sys
from pathlib import Path
import torch
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import TrainLoader, open_source
config = DataConfig(path=sys.argv[1], image_size=32, threads=1, augment=sys.argv[2])
images = open_source(config, "train", num_classes=10)
loader = TrainLoader(images, config, batch_size=4, rank=0, world_size=1, seed=0, device=torch.device("cpu"))
assert loader.next().images.shape == (4, 3, 32, 32)
loader.close()
assert loader.next().images.shape == (4, 3, 32, 32)
assert any(name.startswith("__autograph_generated_file") for name in sys.modules), "DALI writes no such files any more"
os._exit(0)
"""


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_a_rank_that_leaves_at_once_leaves_no_file_of_dalis(tmp_path, tiny_data, augment):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_AT_ONCE, str(tiny_data), augment],
        cwd=ROOT,
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
