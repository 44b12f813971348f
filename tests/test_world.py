"""Without these a process would take the wrong place among the ranks, or half of them would go on after a failure."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
import torch
from launching import ROOT
from worlds import make_world

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.meeting import free_port, slurm_port
from cyclebnn_dist.world import all_succeed, discover_world, mean_in_rank_order, on_main, sum_over_ranks

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "9"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TORCHRUN, (5, 8, 1, "environment")),
        (SLURM, (3, 4, 1, "slurm")),
        (SLURM | TORCHRUN, (5, 8, 1, "environment")),
        ({}, (0, 1, 0, "alone")),
        ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}, (0, 1, 0, "alone")),
    ],
)
def test_the_place_is_read_from_whoever_started_the_process(environ, place):
    world = discover_world(environ=environ)
    assert (world.rank, world.size, world.local_rank, world.source) == place


def test_half_an_environment_is_refused():
    with pytest.raises(RecipeError, match="MASTER_ADDR, MASTER_PORT"):
        discover_world(environ={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def share(rank, size):
    world = make_world(rank, size)
    values = torch.tensor([0.1 * (rank + 1), 1e30 if rank == 1 else -1e30 if rank == 2 else 1.0])
    counted = sum_over_ranks(world, torch.tensor([rank, 2**40]))
    told = on_main(world, lambda: f"from {rank}")
    return mean_in_rank_order(world, values).tolist(), counted.tolist(), told


def test_small_collectives_give_every_rank_the_same_values(ranks):
    results = ranks(3, share)
    assert results[0] == results[1] == results[2]
    mean, counted, told = results[0]
    # (1 + 1e30) - 1e30 is 0 in rank order; another order would give 1.
    assert mean == pytest.approx([0.2, 0.0])
    assert counted == [3, 3 * 2**40]
    assert told == "from 0"


def fail(rank, size, failing, kind):
    world = make_world(rank, size)

    def work():
        if rank == failing:
            raise RecipeError("data.path", "gone") if kind == "recipe" else OSError("disk full")

    seen = []
    for attempt in (lambda: all_succeed(world, work, what="saving"), lambda: on_main(world, work)):
        try:
            attempt()
            seen.append("")
        except (RecipeError, RuntimeError, OSError) as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_a_failure_of_one_rank_is_everyones(ranks):
    for seen in ranks(2, fail, 1, "system"):
        assert "saving failed on 1 of 2 ranks: rank 1: OSError: disk full" in seen[0]
        assert seen[1] == ""
    for seen in ranks(2, fail, 0, "recipe"):
        assert "data.path: gone" in seen[0]
        assert seen[1] == "RecipeError: data.path: gone"


JOIN = """
import sys
from cyclebnn_dist import world
if sys.argv[1]:
    world.library_versions = lambda: sys.argv[1]
here = world.join_world(world.discover_world(), timeout_seconds=20)
print("joined", world.gather_objects(here, here.rank))
world.leave_world()
"""


def join(sizes, libraries=("", ""), *, port=None):
    """What processes print that were told these sizes of the world, and stand in for these library versions."""
    port = free_port() if port is None else port
    processes = []
    for rank, (size, versions) in enumerate(zip(sizes, libraries, strict=False)):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-c", JOIN, versions]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, **pipes))
    return [process.communicate(timeout=60)[0] for process in processes]


def test_ranks_that_were_told_the_same_join():
    assert [output.splitlines()[-1] for output in join([2, 2])] == ["joined [0, 1]"] * 2


@pytest.mark.parametrize(
    ("sizes", "libraries", "said"),
    [
        ([2, 3], ("", ""), "world size: 2 on rank 0, 3 on rank 1"),
        ([3, 2], ("", ""), "world size: 3 on rank 0, 2 on rank 1"),
        (
            [2, 2],
            ("torch 2.13.0", "torch 2.12.0"),
            "libraries: torch 2.13.0 on rank 0, torch 2.12.0 on rank 1",
        ),
    ],
)
def test_ranks_that_cannot_form_a_world_end_with_who_differs(sizes, libraries, said):
    for output in join(sizes, libraries):
        assert "ranks cannot form one world" in output
        assert said in output
        assert "joined" not in output


def test_a_port_that_another_process_holds_for_a_while_ends_no_run():
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        Timer(8.0, other.close).start()
        assert [output.splitlines()[-1] for output in join([2, 2], port=other.getsockname()[1])] == [
            "joined [0, 1]"
        ] * 2


def test_a_requeued_job_meets_elsewhere_and_never_among_the_ports_of_outgoing_connections():
    jobs = [{"SLURM_JOB_ID": str(job)} for job in (1, 2, 19_999, 20_000, 4_294_901_759)]
    lives = [slurm_port({**job, "SLURM_RESTART_COUNT": str(life)}) for job in jobs for life in range(50)]
    first, end = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not set(lives) & set(range(first, end + 1))
    assert min(lives) >= 1024
    assert len(set(lives[:50])) == 50
    assert [slurm_port(job) for job in jobs] == lives[::50]
    assert len({slurm_port(job) for job in jobs[:3]}) == 3
