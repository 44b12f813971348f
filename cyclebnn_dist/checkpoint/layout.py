"""The layout of a run's checkpoints: names, which are complete, which are intact, and what lies in them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclebnn_dist import disk
from cyclebnn_dist.checkpoint.statefile import digest_of, read_state
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.world import World, on_main

log = logging.getLogger(__name__)

FORMAT = 2
FOLDER, META = "checkpoints", "meta.json"
FOLDER_NAME = re.compile(r"step_(\d{9,})")
PARTIAL, REMOVED = ".partial_", ".removed_"


def folder_name(step: int) -> str:
    """Name of the published folder of a step."""
    return f"step_{step:09d}"


def step_of(folder: Path) -> int:
    """Step of a published folder, by its name."""
    return int(folder.name.removeprefix("step_"))


def published_checkpoints(run_dir: Path) -> list[Path]:
    """All published folders of a run, newest first, whatever has become of them since."""
    root = run_dir / FOLDER
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if FOLDER_NAME.fullmatch(p.name)), key=step_of, reverse=True)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of all complete checkpoints of a run, newest first."""
    return [path for path in published_checkpoints(run_dir) if not missing_parts(path)]


def missing_parts(folder: Path) -> list[str]:
    """Why a checkpoint folder is not complete: one line a missing or truncated file; empty if it is."""
    try:
        files = read_meta(folder)["files"]
    except (OSError, ValueError) as error:
        return [f"{META}: {disk.cause(error) if isinstance(error, OSError) else error}"]
    problems = []
    for name, facts in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            problems.append(
                f"{name}: {'missing' if isinstance(error, FileNotFoundError) else disk.cause(error)}"
            )
            continue
        if found != facts["bytes"]:
            problems.append(f"{name}: {found} bytes, {facts['bytes']} written")
    return problems


def damaged_parts(folder: Path) -> list[str]:
    """As ``missing_parts``, but every file is read and its content compared with what was written."""
    problems = missing_parts(folder)
    if problems:
        return problems
    for name, facts in read_meta(folder)["files"].items():
        try:
            if digest_of(folder / name).sha256 != facts["sha256"]:
                problems.append(f"{name}: its content has changed since it was written")
        except OSError as error:
            problems.append(f"{name}: {disk.cause(error)}")
    return problems


def newest_checkpoint(run_dir: Path, *, world: World) -> Path | None:
    """Collective: every rank calls this. Rank 0's choice of the newest undamaged checkpoint; None if none was published.

    Raises:
        RecipeError: on every rank, if there are checkpoints and every one of them is damaged: starting over would
            throw away what can be saved of them.
    """

    def choose() -> Path | None:
        published = published_checkpoints(run_dir)
        damaged = {}
        for folder in published:
            problems = damaged_parts(folder)
            if not problems:
                return folder
            log.warning("checkpoint %s is passed over: %s", folder, "; ".join(problems))
            damaged[folder.name] = problems[0]
        if damaged:
            told = ", ".join(f"{name} ({problem})" for name, problem in damaged.items())
            raise RecipeError(
                "run.dir",
                f"no checkpoint in {run_dir / FOLDER} is intact: {told}",
                f"put an intact copy back, or start from the first step by moving {run_dir / FOLDER} away",
            )
        return None

    return on_main(world, choose)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the best top-1 of an evaluation at its own step (see ``evaluated_top1``), or None."""
    scores = {
        folder: top1
        for folder in complete_checkpoints(run_dir)
        if (top1 := evaluated_top1(folder)) is not None
    }
    return max(scores, key=lambda folder: (scores[folder], -step_of(folder)), default=None)


def evaluated_top1(folder: Path) -> float | None:
    """Top-1 in percent of the model in a complete checkpoint, if it was evaluated at that step, with binary weights."""
    evaluation = read_meta(folder).get("evaluation")
    return evaluation["top1"] if evaluation and not has_real_weights(folder) else None


def has_real_weights(folder: Path) -> bool:
    """Whether a complete checkpoint is of a first phase, whose latent weights are used as they are."""
    return read_meta(folder).get("weights") == "real"


def read_meta(folder: Path) -> dict[str, Any]:
    """The facts in a checkpoint's meta.json.

    Raises:
        OSError, ValueError: if it is missing, damaged, or of another format.
    """
    meta = json.loads((folder / META).read_text())
    if not isinstance(meta, dict):
        raise ValueError("is not a JSON object")
    if meta.get("format") != FORMAT:
        raise ValueError(f"format {meta.get('format')} is not {FORMAT}")
    if meta.pop("sha256", None) != _meta_digest(meta):
        raise ValueError("its content has changed since it was written")
    return meta


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Complete a folder with its meta.json.

    Raises:
        OSError: if it cannot be written.
    """
    whole = {"format": FORMAT, **meta}
    # What is read back is what the digest is of: JSON turns tuples into lists, for one.
    whole = json.loads(json.dumps(whole))
    text = json.dumps({**whole, "sha256": _meta_digest(whole)}, indent=2) + "\n"
    with (folder / META).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_shared(folder: Path) -> dict[str, Any]:
    """The state that is equal on all ranks."""
    return read_state(folder / "shared.safetensors")


def read_own(folder: Path, *, rank: int, at: Sequence[str] = ()) -> dict[str, Any]:
    """The state of one rank, or what lies under the keys ``at`` in it."""
    return read_state(folder / f"rank_{rank}.safetensors", at=at)


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
