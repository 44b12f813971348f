"""Processes of this machine as /proc shows them: enough to watch and end the ranks of a local run (Linux)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process; pid and start time together name it for good."""

    pid: int
    parent: int
    start: int
    running: bool
    exit_status: int | None
    """As os.waitpid gives it; known only between a process's end and its parent's look at it."""


def look(pid: int) -> Process | None:
    """Return what /proc says of a process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text[text.rindex(")") + 2 :].split()
    ended = state in "ZX"
    return Process(pid, int(fields[0]), int(fields[18]), not ended, int(fields[48]) if ended else None)


def is_running(process: Process) -> bool:
    """Say whether this very process still runs."""
    now = look(process.pid)
    return now is not None and now.start == process.start and now.running


def started_ns(process: Process) -> int:
    """Return when a process started, in nanoseconds of the wall clock, to a hundredth of a second."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return int(1e9 * (time.time() - uptime + process.start / os.sysconf("SC_CLK_TCK")))


def marked(mark: str) -> list[Process]:
    """Return the running processes whose environment holds ``mark``, a text ``NAME=value``; this process not counted."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and mark in environment(int(entry)):
            process = look(int(entry))
            if process is not None and process.running:
                found.append(process)
    return found


def environment(pid: int) -> list[str]:
    """Return ``NAME=value`` for every variable a process was started with; empty where that may not be read."""
    return _strings(pid, "environ")


def arguments(pid: int) -> list[str]:
    """Return the command line of a process."""
    return _strings(pid, "cmdline")


def _strings(pid: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """Signal those of the processes that still run."""
    for process in processes:
        if is_running(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_for_any(processes: Iterable[Process], *, seconds: float) -> None:
    """Sleep until one of the processes ends, or the time is up."""
    poll = select.poll()
    descriptors = []
    try:
        for process in processes:
            descriptors.append(os.pidfd_open(process.pid))
            poll.register(descriptors[-1], select.POLLIN)
        poll.poll(1000 * seconds)
    except OSError:  # it has ended already, or the kernel has no pidfd
        time.sleep(min(seconds, 0.02))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


_IMAGE = " (if an image was to blame, starting again names it)"
_HINTS = {
    signal.SIGKILL: " (somebody's kill, or the machine is out of memory)",
    signal.SIGSEGV: _IMAGE,
    signal.SIGBUS: _IMAGE,
}


def manner_of_end(exit_status: int | None) -> str:
    """Return how a process ended, as far as it could be seen."""
    if exit_status is None:
        return "ended without a result"
    if os.WIFSIGNALED(exit_status):
        number = signal.Signals(os.WTERMSIG(exit_status))
        return f"was killed by {number.name}{_HINTS.get(number, '')}"
    return f"ended with status {os.waitstatus_to_exitcode(exit_status)}"
