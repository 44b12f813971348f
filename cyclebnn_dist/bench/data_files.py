"""The files of ``cyclebnn bench data``: a folder of the user's, or generated JPEGs of a photograph's size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data.folder import ImageList, scan_folder

HEIGHT, WIDTH = 375, 500
QUALITY = 90
CLASSES = 2


def open_images(path: Path) -> ImageList:
    """The images of ``path/train``, however many classes they have.

    Raises:
        RecipeError: there are none.
    """
    root = path / "train"
    if not root.is_dir():
        raise RecipeError("--data", f"there is no folder {root}", f"expected {root}/<class>/*.JPEG")
    with os.scandir(root) as entries:
        classes = sum(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    return scan_folder(path, "train", num_classes=classes)


def write_photographs(path: Path, *, count: int) -> None:
    """Write ``path/train/<class>/*.JPEG``, ``count`` images of 500x375 pixels and about 110 kB, as ImageNet's are."""
    for index in range(count):
        folder = path / "train" / f"{index % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_photograph(index)).save(folder / f"{index:06d}.JPEG", quality=QUALITY)


def draw_photograph(index: int) -> np.ndarray:
    """An image as a JPEG decoder sees photographs: amplitudes fall with frequency, colours vary slowly; uint8 [H, W, 3].

    Amplitudes proportional to 1 / frequency are those of natural scenes (Field 1987); a little noise is the camera's.
    """
    random = np.random.default_rng(index)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf

    def field(exponent: float) -> np.ndarray:
        spectrum = np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) / frequency**exponent
        values = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        return values / values.std()

    light = 115 + 50 * field(1.0)
    noise = random.normal(0, 4, size=(HEIGHT, WIDTH, 3))
    colours = np.stack([18 * field(1.3) for _ in range(3)], axis=-1)
    return np.clip(light[..., None] + colours + noise, 0, 255).astype(np.uint8)
