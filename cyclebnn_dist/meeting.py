"""Meeting point: the port where the ranks of a job find each other."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

PORTS = range(10000, 30000)
"""Below those that systems give to outgoing connections (Linux from 32768, others from 49152), which come and go."""

RESTART_STRIDE = 7919
"""By how many ports a job moves at a restart, away from whatever was in its way."""


def slurm_port(environ: Mapping[str, str]) -> int:
    """The port of a Slurm job: every rank reckons the same, two jobs on a node differ, a requeued job has another one.

    Raises:
        KeyError: this is no Slurm job.
    """
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return PORTS[(int(environ["SLURM_JOB_ID"]) + RESTART_STRIDE * restarts) % len(PORTS)]


def free_port() -> int:
    """A port of the loopback that nothing uses now, and that no outgoing connection will be given before it is used.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")
