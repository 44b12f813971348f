"""Clusters as a user types them: numbers of nodes, rates of links."""

from __future__ import annotations

import math
import re

from cyclebnn_dist.comm.scaling import Cluster
from cyclebnn_dist.config import RecipeError

RATE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[gmk])bit", re.IGNORECASE)
UNIT_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
INTRA_BYTES_PER_SECOND = {"nvlink": 300e9, "pcie": 25e9}
"""Of one GPU in each direction: NVLink 3 as published for an A100, and what a PCIe 4 x16 slot has left in practice."""

MOST_RANKS = 100_000


def parse_clusters(
    *, nodes: str, gpus_per_node: int, network: str, intra: str, message_us: float
) -> list[Cluster]:
    """A cluster for every number in ``nodes``, in the order given.

    Raises:
        RecipeError: naming the flag that cannot be read or be.
    """
    if gpus_per_node < 1:
        raise RecipeError("--gpus-per-node", f"{gpus_per_node} is out of range", "it must be at least 1")
    if not 0 <= message_us < math.inf:
        raise RecipeError("--message-us", f"{message_us:g} is out of range", "it must be 0 or more")
    network_rate = parse_rate("--network", network)
    intra_rate = INTRA_BYTES_PER_SECOND.get(intra.lower()) or parse_rate(
        "--intra", intra, names=tuple(INTRA_BYTES_PER_SECOND)
    )
    return [
        Cluster(
            nodes=count,
            gpus_per_node=gpus_per_node,
            network_bytes_per_second=network_rate,
            intra_bytes_per_second=intra_rate,
            message_seconds=1e-6 * message_us,
        )
        for count in parse_nodes(nodes, gpus_per_node=gpus_per_node)
    ]


def parse_nodes(text: str, *, gpus_per_node: int = 1) -> list[int]:
    """Numbers of nodes, such as ``1,2,8``.

    Raises:
        RecipeError: what is no such list, or more ranks than the model is made for.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise RecipeError(
            "--nodes", f"'{text}' is no list of numbers of nodes", "write for instance 1,2,8,64,512"
        )
    counts = list(dict.fromkeys(int(word) for word in words))
    if max(counts) * gpus_per_node > MOST_RANKS:
        raise RecipeError(
            "--nodes",
            f"{max(counts)} nodes of {gpus_per_node} are {max(counts) * gpus_per_node} ranks",
            f"there may be up to {MOST_RANKS}",
        )
    return counts


def parse_rate(flag: str, text: str, *, names: tuple[str, ...] = ()) -> float:
    """Bytes a second, from ``100gbit`` or the number itself.

    Args:
        names: that the flag also takes, for the message.

    Raises:
        RecipeError: what is no rate.
    """
    match = RATE.fullmatch(text.strip())
    if match:
        rate = float(match["number"]) * UNIT_BITS[match["unit"].lower()] / 8
        if rate > 0:
            return rate
    cure = f"write {''.join(f'{name}, ' for name in names)}100gbit, 25gbit, 1gbit, 100mbit, or bytes a second (12.5e9)"
    return parse_positive(flag, text, what="no rate of a network", cure=cure)


def parse_positive(
    flag: str, text: str, *, what: str = "no number above 0", cure: str = "write a number, or measured"
) -> float:
    """A finite number above 0.

    Raises:
        RecipeError: what is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RecipeError(flag, f"'{text}' is {what}", cure)
    return value
