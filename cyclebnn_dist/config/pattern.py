"""The pattern: a small JSON file that says which layers of a model are binary and which stay real. Needs no torch.

    {"format": 1, "model": "resnet18", "budget": 0.25, "cost": 0.2417,
     "real": ["layer1.0.conv1", ...], "binary": ["layer1.0.conv2", ...], "found": {...}}

Layers have their full names, so a pattern fits every model with layers of these names: of other widths, for other data,
with another method. ``budget``, ``cost`` (of the model it was found for) and ``found`` are there to be read by people.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe

FORMAT = 1
KEY = "binary.pattern"


@dataclass(frozen=True)
class Pattern:
    """Names of layers in the model's order, and where they come from."""

    model: str
    budget: float
    cost: float
    real: tuple[str, ...]
    binary: tuple[str, ...]
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Literal["real", "binary"]]:
        """As ``binary.layers`` takes them."""
        return {**dict.fromkeys(self.real, "real"), **dict.fromkeys(self.binary, "binary")}  # type: ignore[dict-item]


def read_pattern(path: Path) -> Pattern:
    """Read a pattern; only ``format``, ``real`` and ``binary`` are needed, so one can be written by hand.

    Raises:
        RecipeError: there is no such file, or it is no pattern.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"cannot read {path}: {error.strerror}"
        raise RecipeError(KEY, problem, "`cyclebnn search mixbin RECIPE` writes one") from None
    except (ValueError, RecursionError) as error:
        raise _no_pattern(path, f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _no_pattern(path, "not a mapping")
    if values.get("format") != FORMAT:
        raise _no_pattern(path, f"its format is {values.get('format')!r}, not {FORMAT}")
    for name in ("real", "binary"):
        listed = values.get(name)
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise _no_pattern(path, f"'{name}' is no list of layer names")
    names = [*values["real"], *values["binary"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _no_pattern(path, f"{', '.join(twice[:4])} stands there twice")
    if not names:
        raise _no_pattern(path, "it names no layer")
    for name in ("budget", "cost"):
        if not isinstance(values.get(name, 1.0), int | float):
            raise _no_pattern(path, f"'{name}' is no number")
    return Pattern(
        model=str(values.get("model", "")),
        budget=float(values.get("budget", 1.0)),
        cost=float(values.get("cost", 1.0)),
        real=tuple(values["real"]),
        binary=tuple(values["binary"]),
        found=values.get("found", {}),
    )


def write_pattern(pattern: Pattern, path: Path) -> None:
    """Write a pattern; the file is either the old one or the whole new one."""
    # Tasks of an array end together, and in containers their process ids are often the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(plain_pattern(pattern), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def plain_pattern(pattern: Pattern) -> dict[str, Any]:
    """What the file of a pattern holds."""
    return {"format": FORMAT, **{each.name: getattr(pattern, each.name) for each in fields(pattern)}}


def with_pattern(recipe: Recipe) -> Recipe:
    """``recipe`` with what its ``binary.pattern`` says in ``binary.layers``, and without the file's name.

    Raises:
        RecipeError: as ``read_pattern``.
    """
    if not recipe.binary.pattern:
        return recipe
    pattern = read_pattern(Path(recipe.binary.pattern))
    return replace(recipe, binary=replace(recipe.binary, pattern="", layers=pattern.layers))


def _no_pattern(path: Path, why: str) -> RecipeError:
    return RecipeError(
        KEY, f"{path} is no pattern of layers: {why}", "`cyclebnn search mixbin RECIPE` writes one"
    )
