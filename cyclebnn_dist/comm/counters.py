"""The counters: bytes handed to the network and seconds spent on the gradient all-reduce, over the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Literal


@dataclass
class Counters:
    """Totals of one rank.

    Attributes:
        sent_bytes: payload of collectives that left this rank for others, headers and padding included.
        fp32_bytes, bf16_bytes: what a ring all-reduce of the same gradients would have sent: 2 (N - 1) / N * n * 4 or 2;
            where a rank gets its part alone, a ring reduce-scatter: half as much.
        far_bytes: the part of sent_bytes that a hierarchical all-reduce sent to other nodes.
        encode_seconds, decode_seconds: of the communication threads, one of which works at a time.
        wire_seconds: in which they handed messages over, or had nothing to do but wait for some. On a GPU all three are of
            the host, which only enqueues.
        wait_seconds: from handing over the last bucket of a backward pass to its end: what was not hidden by it.
    """

    sent_bytes: int = 0
    fp32_bytes: float = 0.0
    bf16_bytes: float = 0.0
    encode_seconds: float = 0.0
    wire_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    far_bytes: int = 0

    def add_exchange(
        self, *, sent_bytes: int, numel: int, world_size: int, far_bytes: int = 0, phases: Literal[1, 2] = 2
    ) -> None:
        """Count the exchange of ``numel`` elements: an all-reduce (2 phases) or its first half, a reduce-scatter."""
        self.far_bytes += far_bytes
        self.sent_bytes += sent_bytes
        self.fp32_bytes += phases * (world_size - 1) / world_size * numel * 4
        self.bf16_bytes += phases * (world_size - 1) / world_size * numel * 2

    def seconds(self) -> dict[str, float]:
        """Seconds by what they went into: encode, wire, decode, exposed (what the backward pass did not hide)."""
        return {
            "encode": self.encode_seconds,
            "wire": self.wire_seconds,
            "decode": self.decode_seconds,
            "exposed": self.wait_seconds,
        }

    @contextmanager
    def timing(self, kind: Literal["encode", "wire", "decode"]) -> Iterator[None]:
        """Add the seconds spent inside."""
        begun = perf_counter()
        yield
        name = f"{kind}_seconds"
        setattr(self, name, getattr(self, name) + perf_counter() - begun)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in asdict(self):
            setattr(self, name, state.get(name, 0))
