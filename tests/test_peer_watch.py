"""Without this the ranks of a job whose GPU waits for a killed one would hold their nodes for half an hour."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from launching import ROOT, TINY_RECIPE

from cyclebnn_dist.meeting import free_port

RANK = """
import os, signal, sys, time
from pathlib import Path
from cyclebnn_dist import train
from cyclebnn_dist.guards import peer_watch
from cyclebnn_dist.config import load_recipe
peer_watch.GRACE_SECONDS = 0.5
def run(recipe, world, **_):
    with peer_watch.watching_peers(world):
        if sys.argv[2] == "lost" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100 if sys.argv[2] == "lost" else world.rank)  # a wait that nothing in here ends
    return 0
train.run_recipe = run
sys.exit(train.main(load_recipe(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("how", ["lost", "over"])
def test_ranks_that_wait_elsewhere_end_when_one_is_gone_and_name_it(tmp_path, tiny_data, how):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(recipe), how],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    if how == "over":
        assert (statuses, said) == ([0] * 3, [""] * 3)
        return
    assert statuses == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert f"nothing is heard of rank 1 on {socket.gethostname()}:" in said[rank]
