"""The message header: 32 bytes by which a receiver proves that a message is the one it expects."""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER_BYTES = 32
MAGIC = 0x4E42
FORMAT = struct.Struct("<HBBiqqq")


class MismatchError(RuntimeError):
    """A peer sent a message that belongs to another step, width, phase, layout or bucket."""


class Header(NamedTuple):
    """What sender and receiver must agree in; ``layout_and_codec`` and ``bucket`` are 63-bit digests."""

    magic: int
    version: int
    phase: int
    bits: int
    step: int
    layout_and_codec: int
    bucket: int

    def to_bytes(self) -> bytes:
        return FORMAT.pack(*self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Header:
        return cls(*FORMAT.unpack(raw))


def describe_difference(expected: Header, raw: bytes) -> str:
    """What a received header says otherwise, e.g. ``step 7 instead of 8``."""
    received = Header.from_bytes(raw)
    if received.magic != expected.magic:
        return "bytes that are no gradient message (another width or bucket size, or another program)"
    return ", ".join(
        f"{name} {found} instead of {wanted}"
        for name, found, wanted in zip(Header._fields, received, expected, strict=True)
        if found != wanted
    )
