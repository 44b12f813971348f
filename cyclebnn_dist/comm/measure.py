"""The measurement: what the codec of this machine and the link of this world do, in about a second.

All ranks measure at the same time, because they share cores and links in training too, and the slowest one counts. Nothing
here draws from the global random generators, so a run that measured goes on as one that did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from cyclebnn_dist.comm.breakeven import CodecCost, Link
from cyclebnn_dist.comm.codec import Codec
from cyclebnn_dist.comm.pieces import Pieces, piece_bytes
from cyclebnn_dist.comm.transport import Transfer

ELEMENTS = {"cpu": 2**20, "cuda": 2**22}
"""How much is encoded at once: on a CPU more than its caches hold, on a GPU enough to fill it."""
REPEATS = 3

FIRST_BYTES, GROWTH = 2**14, 4
LONG_ENOUGH_SECONDS = 0.06
BUDGET_SECONDS = 0.5

Slowest = Callable[[list[float]], list[float]]


def measure_codec(
    codec: Codec,
    widths: Iterable[int],
    *,
    device: torch.device,
    scattered: bool = False,
    slowest: Slowest = lambda seconds: seconds,
) -> dict[int, CodecCost]:
    """Collective where ``slowest`` is. What each width costs a rank on ``device``.

    Args:
        widths: bits; of those that are casts, too.
        scattered: for a reduce-scatter, after which a rank only takes its own mean out of its rotation.
        slowest: the largest over ranks of each of some seconds.
    """
    size = codec.block_size
    numel = max(1, ELEMENTS[device.type] // size) * size
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(numel, generator=generator).to(device)
    widths = list(widths)
    # In turn, so that what else the machine does falls on all alike; the first time compiles and fetches memory.
    rounds = [[_pass_seconds(codec, flat, bits=bits) for bits in widths] for _ in range(REPEATS + 1)][1:]
    found: list[float] = []
    for bits, *repeats in zip(widths, *rounds, strict=True):
        encode, add, again, decode = (median(parts) for parts in zip(*repeats, strict=True))
        element, owned = encode + add + decode, again
        if scattered:  # a rotation is a little less than a decoding
            element, owned = encode + add, decode
        if not codec.unbiased:  # error feedback decodes a rank's own messages, too, and rotates its own mean
            element, owned = element + decode, owned + (0 if scattered else add + 2 * decode)
        found += [element / numel, owned / numel, _message_seconds(codec, bits=bits, device=device)]
    found = slowest(found)
    return {bits: CodecCost(*found[3 * i : 3 * i + 3]) for i, bits in enumerate(widths)}


def measure_link(
    group: dist.ProcessGroup,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    largest_bytes: int,
    slowest: Slowest,
) -> Link:
    """Collective: every rank calls this. What ``group`` does with both phases of an exchange.

    Messages grow until they take long enough, are as large as those of training, or time is up.

    Args:
        largest_bytes: of all messages of a rank in one phase.
    """

    def seconds_of(size: int) -> float:
        outgoing = torch.zeros(world_size * size, dtype=torch.uint8, device=device)
        incoming = torch.empty_like(outgoing), torch.empty_like(outgoing)
        (agreed,) = slowest([0.0])  # ranks begin together
        begun = _now(device)
        first, second = (Transfer(part, rank=rank, group=group, tag=tag) for tag, part in enumerate(incoming))
        first.send_each(outgoing, [size] * world_size)
        first.wait()
        second.send_all(outgoing[:size])
        second.wait()
        first.finish()
        second.finish()
        (agreed,) = slowest([_now(device) - begun])
        return agreed

    seconds_of(8)
    latency = median(seconds_of(8) for _ in range(2 * REPEATS + 1))
    size, spent = FIRST_BYTES, 0.0
    while (took := seconds_of(size)) < LONG_ENOUGH_SECONDS and size * world_size < largest_bytes:
        spent += took
        size *= GROWTH
    repeats = [took]
    while len(repeats) < REPEATS and sum(repeats) + spent < BUDGET_SECONDS:
        repeats.append(seconds_of(size))
    sent = 2 * (world_size - 1) * size
    return Link(latency, sent / max(median(repeats) - latency, 1e-9))


def _pass_seconds(codec: Codec, flat: torch.Tensor, *, bits: int) -> tuple[float, float, float, float]:
    """Seconds to encode ``flat``, to add it to a sum, to make a mean of the sum and encode it, and to decode it."""
    pieces, message = _one_message(len(flat), size=codec.block_size, bits=bits, device=flat.device)
    rows = torch.zeros(len(pieces), codec.block_size, device=flat.device)
    decoded = torch.empty_like(flat)
    words = (1, 2)
    times = [_now(flat.device)]
    codec.encode_pieces(flat, pieces, message, bits=bits, words=words, phase=1)
    times.append(_now(flat.device))
    codec.add_pieces(message, pieces, rows, bits=bits)
    times.append(_now(flat.device))
    rows.div_(2)
    codec.encode_pieces(rows.view(-1), pieces, message, bits=bits, words=words, phase=2, rotated=True)
    times.append(_now(flat.device))
    codec.decode_pieces(message, pieces, decoded, bits=bits, words=words)
    times.append(_now(flat.device))
    encode, add, again, decode = (after - before for before, after in pairwise(times))
    return encode, add, again, decode


def _message_seconds(codec: Codec, *, bits: int, device: torch.device) -> float:
    """Seconds to add a message of one block."""
    pieces, message = _one_message(codec.block_size, size=codec.block_size, bits=bits, device=device)
    rows = torch.zeros(1, codec.block_size, device=device)
    codec.add_pieces(message, pieces, rows, bits=bits)
    begun = _now(device)
    for _ in range(10):
        codec.add_pieces(message, pieces, rows, bits=bits)
    return (_now(device) - begun) / 10


def _one_message(numel: int, *, size: int, bits: int, device: torch.device) -> tuple[Pieces, torch.Tensor]:
    """Whole blocks in one message: eight bytes for the scales of each, then codes; and the bytes, all zero."""
    block_bytes = int(piece_bytes(torch.tensor(size), bits=bits, block_size=size))
    block = torch.arange(numel // size, device=device)
    pieces = Pieces(
        source=block * size,
        count=torch.full_like(block, size),
        parameter=torch.zeros_like(block),
        block=block,
        scale_at=8 * block,
        codes_at=8 * len(block) + block * block_bytes,
    )
    return pieces, torch.zeros((8 + block_bytes) * len(block), dtype=torch.uint8, device=device)


def _now(device: torch.device) -> float:
    """The clock, after everything that ``device`` was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
