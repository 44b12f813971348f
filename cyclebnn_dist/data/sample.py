"""The sample data set: generated JPEG files in the ImageNet layout, small enough to learn in minutes.

Ten classes: five shapes, each striped or checked. Hues, scale, place, rotation, texture period and phase,
lighting, noise and clutter are random, so a class is told neither by colour nor by place, and a linear model
on the pixels gets fewer than half of the images right. Shapes lie or stand, give or take 20 degrees, and are
brighter than what surrounds them, which keeps the set learnable in a few hundred steps.

Image ``i`` of a split is a pure function of (seed, split, i), whatever the number of workers.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cyclebnn_dist.config import RecipeError

log = logging.getLogger(__name__)

SHAPES = ("bar", "cross", "disc", "ring", "triangle")
TEXTURES = ("checked", "striped")
CLASSES = tuple(sorted(f"{texture}_{shape}" for texture in TEXTURES for shape in SHAPES))
MARKER = "sample_data.json"
_VERSION = 1
_CHUNK = 100
_TURN = np.pi / 9


def generate_sample(
    path: str | Path,
    *,
    num_train: int = 6000,
    num_val: int = 1000,
    image_size: int = 72,
    seed: int = 0,
    workers: int = 0,
) -> bool:
    """Write ``path/train/<class>/*.JPEG`` and ``path/val/<class>/*.JPEG``, unless they are there already.

    The files are written into a temporary folder beside ``path``, which gets its name only when all are
    complete; a generation that was interrupted is done again.

    Args:
        path: folder to make; may exist if it is empty or holds the same sample set.
        num_train, num_val: images of each split, spread evenly over the classes.
        image_size: side of the square images, in pixels.
        seed: another seed gives other images.
        workers: processes; 0 means one per core this process may use.

    Returns:
        True if files were written, False if the finished set was found.

    Raises:
        RecipeError: if ``path`` holds something else, or a size is out of range.
    """
    for key, value, least in (
        ("--train", num_train, len(CLASSES)),
        ("--val", num_val, len(CLASSES)),
        ("--size", image_size, 16),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise RecipeError(key, f"{value} is too small", f"at least {least}")
    target = Path(path)
    description = {
        "kind": "cyclebnn sample data",
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
    }
    if _finished(target, description):
        return False

    workers = workers or len(os.sched_getaffinity(0))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise RecipeError(
            "DIR", f"cannot write {target}: {error.strerror or error}", "name another folder"
        ) from None
    try:
        for split in ("train", "val"):
            for name in CLASSES:
                (partial / split / name).mkdir(parents=True)
        chunks = [
            (partial, split, range(start, min(start + _CHUNK, count)), image_size, seed)
            for split, count in (("train", num_train), ("val", num_val))
            for start in range(0, count, _CHUNK)
        ]
        if workers == 1:
            for chunk in chunks:
                _write_chunk(chunk)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                list(pool.map(_write_chunk, chunks))
        (partial / MARKER).write_text(json.dumps(description, indent=2) + "\n")
        partial.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise RecipeError(
                "DIR",
                f"cannot write {target}: {error.strerror or error}",
                "make room, or name another folder",
            ) from None
        raise
    log.info("wrote %d training and %d validation images to %s", num_train, num_val, target)
    return True


def _finished(target: Path, description: dict[str, object]) -> bool:
    """Whether ``target`` is this very sample set; RecipeError if it is something else."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise RecipeError("DIR", f"{target} is a file", "name a folder that does not exist yet")
    if not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / MARKER).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != description["kind"]:
        raise RecipeError(
            "DIR", f"{target} holds something else than a sample data set", "name an empty or a new folder"
        )
    differing = [f"{key} {found.get(key)}" for key, value in description.items() if found.get(key) != value]
    if differing:
        raise RecipeError(
            "DIR",
            f"{target} holds another sample data set ({', '.join(differing)})",
            "name another folder, or delete this one first",
        )
    return True


def _write_chunk(chunk: tuple[Path, str, range, int, int]) -> None:
    root, split, indices, image_size, seed = chunk
    for index in indices:
        name = CLASSES[index % len(CLASSES)]
        image = Image.fromarray(draw_image(split, index, image_size=image_size, seed=seed))
        image.save(root / split / name / f"{split}_{index:06d}.JPEG", format="JPEG", quality=92)


def draw_image(split: str, index: int, *, image_size: int, seed: int) -> np.ndarray:
    """Image ``index`` of ``split``, of class ``CLASSES[index % 10]``: uint8 [image_size, image_size, 3]."""
    random = np.random.Generator(np.random.PCG64([seed, ("train", "val").index(split), index]))
    texture, shape = CLASSES[index % len(CLASSES)].split("_")
    ticks = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    pixel = 2 / image_size

    back, second, front = _colours(random)
    slope = random.uniform(-0.15, 0.15, size=2)
    light = 1 + slope[0] * x + slope[1] * y
    image = np.broadcast_to(back, (image_size, image_size, 3)).copy()
    for _ in range(random.integers(1, 5)):
        _draw_clutter(image, x, y, pixel, random)

    scale = random.uniform(0.6, 0.85)
    room = 1 - scale
    angle = random.uniform(-_TURN, _TURN) + np.pi / 2 * random.integers(2)
    u, v = _frame(x, y, random.uniform(-room, room, size=2), angle, scale)
    cover = np.clip(0.5 - _DISTANCES[shape](u, v) * scale / pixel, 0, 1)[..., None]
    period = random.uniform(0.38, 0.55)
    phase = random.uniform(0, 2 * np.pi, size=2)
    wave = np.sin(2 * np.pi * u / period + phase[0])
    if texture == "checked":
        wave = wave * np.sin(2 * np.pi * v / period + phase[1]) * 1.5
    blend = np.clip(0.5 + 2 * wave, 0, 1)[..., None]
    image += cover * (blend * front + (1 - blend) * second - image)

    image = image * light[..., None] + random.normal(0, random.uniform(0.005, 0.03), size=image.shape)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _colours(random: np.random.Generator) -> np.ndarray:
    """Background, first and second texture colour, [3, 3] in [0, 1]: any hues, of rising brightness."""
    hues = random.uniform(0, 1, size=(3, 3))
    brightness = np.array([0.25, 0.45, 0.85])[:, None] + random.uniform(-0.08, 0.08, size=(3, 1))
    return np.clip(brightness + 0.5 * (hues - hues.mean(axis=1, keepdims=True)), 0, 1)


def _frame(
    x: np.ndarray, y: np.ndarray, centre: np.ndarray, angle: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels in the frame of a shape with this centre, rotation and radius."""
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return cos * (x - centre[0]) + sin * (y - centre[1]), cos * (y - centre[1]) - sin * (x - centre[0])


def _draw_clutter(
    image: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: float, random: np.random.Generator
) -> None:
    """Paint a small plain ellipse or bar into ``image``, in place."""
    size = random.uniform(0.08, 0.25)
    u, v = _frame(x, y, random.uniform(-1, 1, size=2), random.uniform(0, 2 * np.pi), size)
    v = v * random.uniform(1, 4)
    distance = np.hypot(u, v) - 1 if random.random() < 0.5 else np.maximum(np.abs(u), np.abs(v)) - 1
    cover = np.clip(0.5 - distance * size / pixel, 0, 1)[..., None]
    image += cover * (random.uniform(0, 0.7, size=3) - image)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.32), np.maximum(u - 0.32, v - 0.95))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u), -v) - 0.5


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bar": lambda u, v: np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.38),
    "cross": _cross,
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.68) - 0.25,
    "triangle": _triangle,
}
