"""The checkpoint: a folder that is either complete or not there.

    run_dir/checkpoints/
      step_000000500/
        meta.json              step, world size, size and SHA-256 of every file; what makes the folder complete
        recipe.yaml            the resolved recipe
        model.safetensors      weights, and buffers averaged over ranks: what evaluation uses
        ema.safetensors        the same of the averaged weights, where a recipe asks for them
        shared.safetensors     optimizer, loss scale, meters: equal on all ranks
        rank_0.safetensors     a rank's own: buffers, data position, random states, residuals of the all-reduce
        rank_1.safetensors
      .partial_step_000001000/ being written, or left by a kill; never read, removed by the next save

A checkpoint is written beside the others and published by renaming its folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cyclebnn_dist.config import SAVED_NAME, Recipe, save_recipe
from cyclebnn_dist.statefile import read_state, write_state
from cyclebnn_dist.world import World, all_succeed, gather_objects, on_main

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER_NAME = re.compile(r"step_(\d{9})")
PARTIAL = ".partial_"


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, on one rank.

    ``model`` and ``ema`` map names to tensors and need only be filled on rank 0; ``shared`` likewise.
    """

    step: int
    model: dict[str, Any]
    ema: dict[str, Any]
    shared: dict[str, Any]
    own: dict[str, Any]
    facts: dict[str, Any]


def save_checkpoint(run_dir: Path, snapshot: Snapshot, *, recipe: Recipe, world: World, keep: int) -> Path:
    """Collective: every rank calls this. Write, publish, and remove all but the newest ``keep``.

    Raises:
        RuntimeError: on every rank if any could not write (a full disk, say); older checkpoints stay intact.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{snapshot.step:09d}"
    partial = root / f"{PARTIAL}{final.name}"

    def prepare() -> None:
        if world.is_main:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(f"{PARTIAL}*"):
                shutil.rmtree(leftover)
            partial.mkdir()

    written: dict[str, dict[str, Any]] = {}

    def write() -> None:
        write_state(partial / f"rank_{world.rank}.safetensors", snapshot.own)
        names = [f"rank_{world.rank}.safetensors"]
        if world.is_main:
            save_file(snapshot.model, str(partial / "model.safetensors"))
            if snapshot.ema:
                save_file(snapshot.ema, str(partial / "ema.safetensors"))
            write_state(partial / "shared.safetensors", snapshot.shared)
            save_recipe(recipe, partial / SAVED_NAME)
            # Named, not listed: the folder also holds files that other ranks are writing under names of the moment.
            names += ["model.safetensors", "shared.safetensors", SAVED_NAME]
            names += ["ema.safetensors"] if snapshot.ema else []
        for name in names:
            _flush(partial / name)
            written[name] = {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}

    def publish() -> None:
        if not world.is_main:
            return
        meta = {
            "format": FORMAT,
            "step": snapshot.step,
            "world_size": world.size,
            **snapshot.facts,
            "files": {name: facts for of_rank in everything for name, facts in of_rank.items()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        _flush(partial / "meta.json")
        _flush(partial)
        if final.exists():
            final.rename(root / f"{PARTIAL}replaced_{final.name}")
        partial.rename(final)
        _flush(root)
        for path in complete_checkpoints(run_dir)[max(1, keep) :]:
            shutil.rmtree(path)

    all_succeed(world, prepare, what=f"preparing checkpoint {final}")
    all_succeed(world, write, what=f"writing checkpoint {final}")
    everything = gather_objects(world, written)
    all_succeed(world, publish, what=f"publishing checkpoint {final}")
    return final


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of all complete checkpoints of a run, newest first."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if FOLDER_NAME.fullmatch(path.name) and not missing_parts(path)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def missing_parts(folder: Path) -> list[str]:
    """Why a checkpoint folder is not complete: one line a missing or truncated file; empty if it is."""
    try:
        meta = read_meta(folder)
    except (OSError, ValueError) as error:
        return [f"meta.json: {error}"]
    problems = []
    for name, facts in meta["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, {facts['bytes']} written")
    return problems


def damaged_parts(folder: Path) -> list[str]:
    """As ``missing_parts``, but every file is read and its content compared with what was written."""
    return missing_parts(folder) or [
        f"{name}: its content has changed since it was written"
        for name, facts in read_meta(folder)["files"].items()
        if _sha256(folder / name) != facts["sha256"]
    ]


def newest_checkpoint(run_dir: Path, *, world: World) -> Path | None:
    """Collective: every rank calls this. Rank 0's choice of the newest undamaged checkpoint, or None."""

    def choose() -> Path | None:
        for folder in complete_checkpoints(run_dir):
            problems = damaged_parts(folder)
            if not problems:
                return folder
            log.warning("checkpoint %s is passed over: %s", folder, "; ".join(problems))
        return None

    return on_main(world, choose)


def read_meta(folder: Path) -> dict[str, Any]:
    """The facts in a checkpoint's meta.json.

    Raises:
        OSError, ValueError: if it is missing, damaged, or of another format.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"format {meta.get('format')} is not {FORMAT}")
    return meta


def read_shared(folder: Path) -> dict[str, Any]:
    """The state that is equal on all ranks."""
    return read_state(folder / "shared.safetensors")


def read_own(folder: Path, *, rank: int, at: Sequence[str] = ()) -> dict[str, Any]:
    """The state of one rank, or what lies under the keys ``at`` in it."""
    return read_state(folder / f"rank_{rank}.safetensors", at=at)


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
