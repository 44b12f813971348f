"""Local ranks: the processes of one launch on this machine, with or without a shaped network each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from cyclebnn_dist.bench.namespaces import INTERFACE, ShapedNetwork
from cyclebnn_dist.meeting import free_port

PORT = 29500
"""Of the meeting point, where rank 0 has a network of its own."""

LAST_LINES = 15


class Settings(Protocol):
    """Settings of a benchmark: a dataclass of plain values that names the benchmark it is for (see ``rank``)."""

    benchmark: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


def launch_ranks(
    settings: Settings,
    *,
    ranks: int,
    network: ShapedNetwork | None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Start ``ranks`` processes, wait for them, and return what rank 0 measured; none is left when this returns.

    Args:
        progress: called again and again while they run.

    Raises:
        RuntimeError: a rank failed, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="cyclebnn-") as folder:
        result = Path(folder) / "result.json"
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() if network is None else PORT)}
        if network is not None:
            meeting["MASTER_ADDR"] = network.addresses[0]
        processes: list[subprocess.Popen[str]] = []
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", "cyclebnn_dist.bench.rank", settings.benchmark, str(result)]
                with log.open("w") as output:
                    process = subprocess.Popen(
                        [*(network.inside(rank) if network else []), *command],
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        text=True,
                        env={**_environment(rank, ranks, shaped=network is not None), **meeting},
                        start_new_session=True,  # a Ctrl-C at the terminal is for this process, which ends them
                    )
                processes.append(process)
                assert process.stdin is not None
                process.stdin.write(json.dumps(asdict(settings)) + "\n")
                process.stdin.flush()
            _wait(processes, logs, progress)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        return json.loads(result.read_text())


def _environment(rank: int, ranks: int, *, shaped: bool) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": INTERFACE if shaped else "lo",
    }
    if shaped or torch.cuda.device_count() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = (
            ""  # NCCL would go past the network, or has no GPU for every rank
        )
    return environment


def _wait(processes: list[subprocess.Popen[str]], logs: list[Path], progress: Callable[[], None]) -> None:
    running = True
    while running:
        time.sleep(0.05)
        progress()
        running = any(process.poll() is None for process in processes)
        for rank, process in enumerate(processes):
            if process.poll():
                last = logs[rank].read_text().splitlines()[-LAST_LINES:]
                raise RuntimeError(
                    f"rank {rank} of {len(processes)} ended with status {process.returncode}; the last it said:\n"
                    + "\n".join(last)
                )
