"""Image files of every sort that a data set may hold, good and bad, written byte by byte where Pillow would not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


def gradient() -> np.ndarray:
    """Three slopes, uint8 [HEIGHT, WIDTH, 3]."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    slopes = (x / (WIDTH - 1), y / (HEIGHT - 1), (x + y) / (HEIGHT + WIDTH - 2))
    return np.rint(255 * np.stack(slopes, axis=-1)).astype(np.uint8)


def encoded(mode: str = "RGB", *, kind: str = "JPEG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """The gradient in a mode and a format of Pillow's, resized to ``size`` (width, height)."""
    buffer = io.BytesIO()
    Image.fromarray(gradient()).resize(size).convert(mode).save(
        buffer, format=kind, **({"quality": 95} if kind == "JPEG" else {})
    )
    return buffer.getvalue()


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 pixels, [H, W] or [H, W, 3], each written as a 16-bit value of the same brightness."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    colour = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in (pixels.astype(np.uint16) * 257).astype(">u2"))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def good_files() -> dict[str, bytes]:
    """Files that must be read, by name."""
    jpeg, grey = encoded(), np.asarray(Image.fromarray(gradient()).convert("L"))
    return {
        "plain.jpg": jpeg,
        "PLAIN.JPG": jpeg,
        "trailing_bytes.jpg": jpeg + b"more",
        "png_named.JPEG": encoded(kind="PNG"),
        "bmp_named.JPEG": encoded(kind="BMP"),
        "grey.jpg": encoded("L"),
        "cmyk.jpg": encoded("CMYK"),
        "grey.png": encoded("L", kind="PNG"),
        "palette.png": encoded("P", kind="PNG"),
        "transparent.png": encoded("RGBA", kind="PNG"),
        "bilevel.png": encoded("1", kind="PNG"),
        "colour_16_bits.png": png_of_16_bits(gradient()),
        "grey_16_bits.png": png_of_16_bits(grey),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, by name, each with a word that its cause must hold."""
    jpeg, png = encoded(), encoded(kind="PNG")
    return {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"not an image\n" * 40, "not an image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "runcated"),
        "without_end.jpg": (jpeg[:-60], "truncated"),
        "header_only.jpg": (jpeg[:100], "runcated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "gif_named.jpg": (encoded("P", kind="GIF"), "GIF"),
    }


def jpeg_of_impossible_depth() -> bytes:
    """A JPEG whose header gives 120 bits a channel: ``peek_image_shape`` finds its size, and the decoder refuses it."""
    head, frame, rest = encoded(size=(500, 375)).partition(b"\xff\xc0\x00\x11\x08")
    assert rest
    return head + frame[:-1] + b"\x78" + rest


def expected_pixels(name: str, content: bytes) -> np.ndarray:
    """What a good file shows, int64 [HEIGHT, WIDTH, 3], by Pillow."""
    if name == "grey_16_bits.png":  # Pillow cuts these at 255
        content = encoded("L", kind="PNG")
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
