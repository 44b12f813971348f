"""The journal of ``bench convergence``: finished runs as lines of JSON, from which an interrupted benchmark goes on.

The first line says what all runs have in common; runs of another experiment never come among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclebnn_dist.config import RecipeError

RunKey = tuple[str, str, int]
"""Set, variant, seed."""

Runs = dict[RunKey, dict[str, Any]]


def open_journal(path: Path, experiment: Mapping[str, Any]) -> Runs:
    """The runs in the file at ``path``, which is made where there is none; a line cut short by a kill is taken out.

    Raises:
        RecipeError: it cannot be written, is no such journal, or holds the runs of another experiment.
    """
    try:
        text = path.read_text() if path.exists() else ""
        kept = text[: text.rfind("\n") + 1]
        if text and not kept and not text.startswith('{"experiment"'):
            raise _foreign(path)
        if kept != text or not kept:
            path.write_text(kept or json.dumps({"experiment": experiment}) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RecipeError("--out", f"cannot use {path}: {reason}", "name another file") from None
    first, runs = _parse(path, kept) if kept else (dict(experiment), {})
    differing = [
        f"{key} {first.get(key)}, not {value}" for key, value in experiment.items() if first.get(key) != value
    ]
    if differing:
        raise RecipeError(
            "--out",
            f"{path} holds runs of another experiment: {'; '.join(differing)}",
            "name another file, or ask for the same",
        )
    return runs


def read_runs(path: Path) -> Runs:
    """The finished runs in a journal."""
    text = path.read_text()
    return _parse(path, text[: text.rfind("\n") + 1])[1]


def append_run(path: Path, key: RunKey, result: Mapping[str, Any]) -> None:
    """Add a finished run, so that it outlasts this process."""
    name, variant, seed = key
    with path.open("a") as file:
        file.write(json.dumps({"set": name, "variant": variant, "seed": seed, **result}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, text: str) -> tuple[dict[str, Any], Runs]:
    try:
        first, *rows = map(json.loads, text.splitlines())
        runs = {(row["set"], row["variant"], row["seed"]): row for row in rows}
        return first["experiment"], runs
    except (ValueError, TypeError, KeyError):
        raise _foreign(path) from None


def _foreign(path: Path) -> RecipeError:
    return RecipeError("--out", f"{path} is no journal of this benchmark", "name another file")
