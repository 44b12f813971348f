"""The grid: values of recipe keys become points, each a recipe with a run folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclebnn_dist.config import SAVED_NAME, Recipe, RecipeError, load_recipe, to_dict

MAX_POINTS = 1000
"""Slurm's usual limit of an array (MaxArraySize - 1)."""

LONGEST_VALUE, LONGEST_NAME = 32, 120


@dataclass(frozen=True)
class Point:
    """One recipe of a grid."""

    name: str
    """The varied keys and their values: ``low=2,lr=0.001``. It depends on them alone, not on their order or spelling."""
    overrides: tuple[str, ...]
    """What turns the grid's recipe file into this point."""
    recipe: Recipe
    run_dir: Path


def grid_points(path: str, overrides: Sequence[str], axes: Sequence[str]) -> tuple[Recipe, list[Point]]:
    """Return the grid's own recipe, and its points: the product of all values, the last axis varying fastest.

    A point's run folder lies in the grid's ``run.dir``; its Weights & Biases group, where the recipe names none, is the
    name of that folder. Nothing is written.

    Args:
        path: recipe file.
        overrides: ``key=value`` texts that hold for all points.
        axes: texts ``key=value,value,...``; a comma within brackets or quotes belongs to its value.

    Raises:
        RecipeError: an axis that cannot be read, a key or value that the recipe refuses, two points that are the same.
    """
    base = load_recipe(path, overrides)
    values = dict(_parse_axis(text) for text in axes)
    if len(values) < len(axes):
        raise RecipeError(
            "--grid", "a key is there twice", "give all its values at once, e.g. optim.lr=1e-3,3e-4"
        )
    for key in values:
        if key == "run.dir":
            raise RecipeError("--grid", "run.dir cannot vary", "every point gets a folder in run.dir")
        if any(text.partition("=")[0].strip() == key for text in overrides):
            raise RecipeError("--grid", f"{key} varies, and is also set", "leave one of the two out")
    if (count := math.prod(map(len, values.values()))) > MAX_POINTS:
        raise RecipeError("--grid", f"{count} points", f"at most {MAX_POINTS} in one grid")
    folder = Path(base.run.dir)
    if (folder / SAVED_NAME).exists():
        cure = "name another folder for the grid: run.dir=..."
        raise RecipeError("run.dir", f"{folder} is the folder of a run", cure)
    group = base.wandb.group or folder.absolute().name
    points: dict[str, Point] = {}
    for choice in itertools.product(*values.values()):
        own = [f"{key}={text}" for key, text in zip(values, choice, strict=True)]
        if "wandb.group" not in values:
            own.append(f"wandb.group={group}")
        name = point_name(load_recipe(path, [*overrides, *own]), sorted(values))
        if name in points:
            raise RecipeError(
                "--grid", f"{', '.join(own)}: the point {name} is there already", "give each value once"
            )
        own.append(f"run.dir={folder / name}")
        recipe = load_recipe(path, [*overrides, *own])
        points[name] = Point(name, tuple(own), recipe, Path(recipe.run.dir).absolute())
    return base, list(points.values())


def point_name(recipe: Recipe, keys: Sequence[str]) -> str:
    """Return the values that a recipe has at these keys, fit for a folder's name; keys are shortened where clear."""
    last = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, short in zip(keys, last, strict=True):
        value: Any = to_dict(recipe)
        for part in key.split("."):
            value = value[part]
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        parts.append(f"{short if last.count(short) == 1 else key}={_fit(text, LONGEST_VALUE)}")
    name = ",".join(parts)
    return name if len(name) <= LONGEST_NAME else _fit(name.replace(",", "."), LONGEST_NAME)


def _fit(text: str, longest: int) -> str:
    """Return a text that may stand in a folder's name; where that loses something, a digest keeps it apart."""
    plain = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", text)
    if plain == text and 0 < len(text) <= longest:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[: longest - 7].strip('-.')}-{digest}"


def _parse_axis(text: str) -> tuple[str, list[str]]:
    key, equals, written = text.partition("=")
    values = list(_split(written))
    if not equals or not key.strip() or not all(values):
        cure = "e.g. --grid optim.lr=1e-3,3e-4 precision.communication.low=2,4"
        raise RecipeError("--grid", f"'{text}' is not of the form key=value,value", cure)
    return key.strip(), values


def _split(written: str) -> Iterator[str]:
    """Yield the values between commas; those within brackets or quotes do not count."""
    depth, quote, start = 0, "", 0
    for position, sign in enumerate(written):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth <= 0:
            yield written[start:position].strip()
            start = position + 1
    yield written[start:].strip()
