"""Messages of the codec outside of a reducer: their tables of pieces, a whole exchange of one rank, golden bytes.

python -m tests.exchanges       writes tests/golden_codec.json anew, which needs a new FORMAT_VERSION
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from cyclebnn_dist.comm import Codec
from cyclebnn_dist.comm.codec import FORMAT_VERSION
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.comm.randomness import step_words

GOLDEN = Path(__file__).with_name("golden_codec.json")
CODECS = [(name, unbiased) for name in ("hadamard", "absmax", "minmax") for unbiased in (True, False)]


def message_of(counts, *, bits, size, scale_bytes=2):
    """Pieces of consecutive blocks with these element counts, and the bytes of their message."""
    blocks, count = torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)
    if bits > 8:
        nbytes = count * (bits // 8)
        codes_at, total = nbytes.cumsum(0) - nbytes, int(nbytes.sum())
    else:
        codes_at = scale_bytes * len(counts) + blocks * (size * bits // 8)
        total = len(counts) * (scale_bytes + size * bits // 8)
    pieces = Pieces(blocks * size, count, blocks % 3, blocks, scale_bytes * blocks, codes_at)
    return pieces, torch.zeros(-(-total // 8) * 8, dtype=torch.uint8)


def awkward_blocks(size, *, full):
    """Element counts, the last two short, and values of all magnitudes, some of them as awkward as can be."""
    counts = [size] * full + [size // 2 + 1, 1]
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(len(counts) * size, generator=generator) * 10.0 ** torch.randint(
        -20, 20, (len(counts) * size,), generator=generator
    )
    x[:size], x[size : 2 * size], x[2 * size : 3 * size] = 0.0, 1e-30, 1e30
    x[3 * size + 5], x[4 * size + 1], x[5 * size] = float("inf"), 3e38, 1e-44
    return counts, x


def exchange(backend, *, name, unbiased, bits, size, full, device="cpu"):
    """What a rank computes in an all-reduce with itself, back on the CPU, by name."""
    counts, x = awkward_blocks(size, full=full)
    codec, words = Codec(name, block_size=size, unbiased=unbiased, backend=backend), step_words(1, 2)
    pieces, message = message_of(counts, bits=bits, size=size, scale_bytes=codec.scale_bytes(bits))
    pieces, message, x = pieces.to(torch.device(device)), message.to(device), x.to(device)
    rows, answer, decoded = x.new_zeros(len(counts), size), torch.zeros_like(message), torch.zeros_like(x)
    codec.encode_pieces(x, pieces, message, bits=bits, words=words, phase=1)
    codec.add_pieces(message, pieces, rows, bits=bits)
    codec.add_pieces(message, pieces, rows, bits=bits)
    codec.encode_pieces(
        rows.view(-1),
        pieces.as_rows(size, whole=name == "hadamard" and bits <= 8),
        answer,
        bits=bits,
        words=words,
        phase=2,
        rotated=True,
    )
    codec.decode_pieces(answer, pieces, decoded, bits=bits, words=words)
    there, back = rows.clone(), rows.clone()
    codec.rotate_rows(there, pieces, bits=bits, words=words)
    codec.rotate_rows(back, pieces, bits=bits, words=words, inverse=True)
    results = {"message": message, "rows": rows, "answer": answer, "decoded": decoded}
    return {key: value.cpu() for key, value in (results | {"there": there, "back": back}).items()}


def assert_same(found, expected):
    """Two exchanges agree to the last bit, whatever the bits of a NaN."""
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
        )


def encoded_bytes(backend, *, name, unbiased, bits, size, counts, device="cpu"):
    index = torch.arange(len(counts) * size)
    x = ((index * 7919) % 1009 - 504).float() / 64 * (1 + (index % 7 == 0) * 9)
    codec = Codec(name, block_size=size, unbiased=unbiased, backend=backend)
    pieces, message = message_of(counts, bits=bits, size=size, scale_bytes=codec.scale_bytes(bits))
    message = message.to(device)
    words = step_words(11, 22)
    codec.encode_pieces(
        x.to(device), pieces.to(torch.device(device)), message, bits=bits, words=words, phase=1
    )
    return message.cpu().numpy().tobytes()


def golden(backend, device="cpu") -> dict[str, Any]:
    """Digests of messages of blocks of 256, and whole messages of one block of 16, of every codec at every width."""
    result: dict[str, Any] = {"format_version": FORMAT_VERSION, "digests": {}, "messages": {}}
    for name, unbiased in CODECS:
        key = f"{name}, {'unbiased' if unbiased else 'least squares'}"
        settings: dict[str, Any] = {"name": name, "unbiased": unbiased, "device": device}
        result["digests"][key], result["messages"][key] = {}, {}
        for bits in range(1, 9):
            large = encoded_bytes(backend, bits=bits, size=256, counts=[256, 256, 256, 100], **settings)
            result["digests"][key][str(bits)] = hashlib.sha256(large).hexdigest()[:16]
            small = encoded_bytes(backend, bits=bits, size=16, counts=[16], **settings)
            result["messages"][key][str(bits)] = small.hex()
    return result


if __name__ == "__main__":
    new = golden("torch")
    if GOLDEN.exists():
        old = json.loads(GOLDEN.read_text())
        assert new == old or new["format_version"] > old["format_version"], (
            "other bytes need a new FORMAT_VERSION"
        )
    GOLDEN.write_text(json.dumps(new, indent=1) + "\n")
