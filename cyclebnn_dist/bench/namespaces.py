"""Shaped networks: a network namespace a rank on this machine, each behind a link of limited rate (Linux, as root).

A bridge in a namespace of its own joins them, so nothing is added to the machine's own network. Links are limited in
both directions by a token bucket. All names begin with ``cyclebnn-`` and this process's id.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cyclebnn_dist.config import RecipeError

log = logging.getLogger(__name__)

INTERFACE = "eth0"
MOST_RANKS = 64
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
FOLDER = Path("/run/netns")


@dataclass(frozen=True)
class ShapedNetwork:
    """Namespaces in rank order; rank ``i`` is ``addresses[i]`` on ``INTERFACE``."""

    namespaces: tuple[str, ...]
    addresses: tuple[str, ...]

    def inside(self, rank: int) -> list[str]:
        """What to put before a command so that it runs with the network of ``rank``."""
        return [_tool("ip"), "netns", "exec", self.namespaces[rank]]


def parse_rate(text: str) -> float:
    """Bits a second of a rate as ``tc`` writes it: ``100mbit``, ``2.5gbit``.

    Raises:
        RecipeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.lower())
    if match is None or float(match[1]) == 0:
        raise RecipeError("--rate", f"'{text}' is no rate", "write it like 100mbit, 1gbit or 2.5gbit")
    return float(match[1]) * UNITS[match[2]]


def check_possible() -> None:
    """Raise a RecipeError where this process cannot make shaped networks."""
    instead = "use --unshaped, or start it with torchrun or srun on the network that is to be measured"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2")):
        if not _tool(tool):
            raise RecipeError("--rate", f"there is no '{tool}' here", f"install {package}, or {instead}")
    if os.geteuid() != 0:
        raise RecipeError(
            "--rate", "only root may make shaped networks", f"run the command with sudo, or {instead}"
        )


@contextlib.contextmanager
def shaped_networks(ranks: int, rate: str) -> Iterator[ShapedNetwork]:
    """Networks for ``ranks`` processes, gone when the context is left, also by Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        RecipeError: this machine does not let us; nothing is left behind.
    """
    bits = parse_rate(rate)
    if not 2 <= ranks <= MOST_RANKS:
        raise RecipeError(
            "--ranks",
            f"{ranks} shaped networks cannot be made",
            f"ask for 2 to {MOST_RANKS}",
        )
    check_possible()
    switch = f"cyclebnn-{os.getpid()}-switch"
    network = ShapedNetwork(
        namespaces=tuple(f"cyclebnn-{os.getpid()}-{rank}" for rank in range(ranks)),
        addresses=tuple(f"10.78.0.{rank + 1}" for rank in range(ranks)),
    )
    with _signals_raise():
        try:
            _build(network, switch, bits)
            yield network
        finally:
            _remove((*network.namespaces, switch))


def _build(network: ShapedNetwork, switch: str, bits: float) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "br0", "up")
    for rank, (namespace, address) in enumerate(zip(network.namespaces, network.addresses, strict=True)):
        port = f"port{rank}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        link = ("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _run("ip", "-n", switch, *link)
        _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _run("ip", "-n", namespace, "link", "set", INTERFACE, "up")
        for place, device in ((namespace, INTERFACE), (switch, port)):  # what it sends, what it receives
            _shape(place, device, bits)


def _shape(namespace: str, device: str, bits: float) -> None:
    """A bucket of at least two packets of 64 kB, and of a millisecond at high rates, or it would not keep up with them."""
    burst = max(131_072, round(bits / 8 * 1e-3))
    limit = ("rate", f"{bits:.0f}bit", "burst", f"{burst}b", "latency", "50ms")
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limit)


def _remove(namespaces: tuple[str, ...]) -> None:
    """Delete those of our namespaces that exist; nothing interrupts it."""
    with _signals_ignored():
        for namespace in namespaces:
            if (FOLDER / namespace).exists():
                try:
                    _run("ip", "netns", "del", namespace)
                except RecipeError as error:
                    log.warning("namespace %s is left over: %s", namespace, error.problem)


def _run(tool: str, *arguments: str) -> None:
    # In a session of its own, so that a Ctrl-C at the terminal reaches this process only.
    done = subprocess.run(
        [_tool(tool), *arguments], capture_output=True, text=True, start_new_session=True, check=False
    )
    if done.returncode != 0:
        raise RecipeError(
            "--rate",
            f"'{tool} {' '.join(arguments)}' failed: {done.stderr.strip()}",
            "network namespaces and tbf shaping need CAP_NET_ADMIN and CAP_SYS_ADMIN, and a kernel with veth, bridge "
            "and sch_tbf; elsewhere use --unshaped, or torchrun or srun",
        )


def _tool(name: str) -> str:
    return shutil.which(name, path=SEARCHED) or ""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind this process as an exception, as SIGINT does."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handlers(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    with _handlers(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _handlers(handler: object, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's alone
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
