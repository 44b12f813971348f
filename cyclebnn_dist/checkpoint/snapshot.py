"""The snapshot: the state of a run at one step, on one rank, and the files that will hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cyclebnn_dist.checkpoint.statefile import (
    Encoded,
    Written,
    digest_of,
    encode_state,
    encode_tensors,
    write_encoded,
)
from cyclebnn_dist.config import SAVED_NAME, Recipe, save_recipe

WriteFile = Callable[[Path], Written]


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, on one rank; tensors may be those that training goes on to change.

    ``model`` and ``ema`` map names to tensors and need only be filled on rank 0; ``shared`` likewise.
    """

    step: int
    model: dict[str, Any]
    ema: dict[str, Any]
    shared: dict[str, Any]
    own: dict[str, Any]
    facts: dict[str, Any]


def files_of(snapshot: Snapshot, *, rank: int, recipe: Recipe) -> dict[str, WriteFile]:
    """What writes each of a rank's files, by name; all state is copied here and now (see ``host_copy``).

    Raises:
        TypeError: for state that cannot be stored.
    """
    contents: dict[str, Encoded] = {f"rank_{rank}.safetensors": encode_state(snapshot.own)}
    if rank == 0:
        contents["model.safetensors"] = encode_tensors(snapshot.model)
        if snapshot.ema:
            contents["ema.safetensors"] = encode_tensors(snapshot.ema)
        contents["shared.safetensors"] = encode_state(snapshot.shared)
    files: dict[str, WriteFile] = {
        name: partial(write_encoded, content=content) for name, content in contents.items()
    }
    return {**files, SAVED_NAME: partial(_write_recipe, recipe=recipe)} if rank == 0 else files


def _write_recipe(path: Path, *, recipe: Recipe) -> Written:
    save_recipe(recipe, path)
    return digest_of(path)
