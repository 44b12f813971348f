"""Without these every rank's log would end with a broken connection, and none say whose fault it was."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from launching import ROOT, TINY_RECIPE

from cyclebnn_dist.meeting import free_port

RANK = """
import sys
from pathlib import Path
from cyclebnn_dist import train
from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.world import gather_objects
def run(recipe, world, **_):
    gather_objects(world, None)
    if world.rank == 1:
        raise ValueError("out of memory\\nin some kernel")
    gather_objects(world, None)
train.run_recipe = run
train.main(load_recipe(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_to_fail_is_named_by_the_others_with_its_reason(tmp_path, tiny_data, size):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(recipe)],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1] * size
    host = socket.gethostname()
    for rank in {*range(size)} - {1}:
        assert f"rank 1 on {host} failed first: ValueError: out of memory" in said[rank]
    assert f"rank 1 on {host}, of {size} ranks, ends: out of memory" in said[1]
