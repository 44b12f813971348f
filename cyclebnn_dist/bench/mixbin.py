"""``cyclebnn bench mixbin``: whether the layers a search keeps real do better than others within the same budget, seed by seed."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cyclebnn_dist.bench.layers import describe_machine
from cyclebnn_dist.bench.local_ranks import launch_ranks
from cyclebnn_dist.bench.mixbin_runs import CLAIMED, RANDOM, SEARCHED, Settings, read_choices, recipe_of
from cyclebnn_dist.bench.student import mean_interval
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.data import generate_sample
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.search.costs import count_costs
from cyclebnn_dist.world import discover_world

log = logging.getLogger(__name__)

LEAST_SEEDS = 5
"""Pairs that a verdict needs."""

STORED_SIDE = 40


def bench_mixbin(
    *,
    workers: int = 2,
    seeds: int = 5,
    budget: float = 0.4,
    steps: int = 400,
    candidate_steps: int = 40,
    random_choices: int = 3,
    choices: Sequence[str] | None = None,
    seconds: float = 3600.0,
    out: Path | None = None,
    num_train: int = 6000,
    num_val: int = 2000,
) -> dict[str, Any]:
    """Search and train with every strategy from every seed, on processes of this machine.

    Args:
        workers: processes that share the work; how many does not change the result.
        seeds: how many; each is one pair of the search and every other choice.
        budget: of the real network's operations, the same for all choices.
        steps: that train a chosen network from the start.
        candidate_steps: that train a candidate; fine-tuning takes as many, the search's start five times as many.
        random_choices: of each seed; their mean is the baseline.
        choices: names of ``SEARCHED``; the search itself and random choices are always among them.
        seconds: begin no seed later than this.
        out: folder of all that is finished, from which another call goes on; without it, it is forgotten.
        num_train, num_val: generated images.

    Returns:
        plain values, as ``summarize`` gives them, with what was trained on what.

    Raises:
        RecipeError: an argument that nothing can be measured with, or a folder of other settings.
        RuntimeError: a worker failed.
        KeyboardInterrupt: Ctrl-C; what is finished stays in ``out``.
    """
    for key, value in (
        ("--workers", workers),
        ("--seeds", seeds),
        ("--steps", steps),
        ("--candidate-steps", candidate_steps),
        ("--random", random_choices),
        ("--seconds", seconds),
    ):
        if not value > 0:
            raise RecipeError(key, f"{value:g} is not possible", "make it more than 0")
    for name in choices or ():
        if name not in SEARCHED:
            raise RecipeError(
                "--choices", f"there is no choice '{name}'", f"there are: {', '.join(SEARCHED)}"
            )
    if discover_world().source != "alone":
        raise RecipeError(
            "WORLD_SIZE", "this benchmark starts its workers itself", "leave out torchrun or srun"
        )
    configure_logging(rank=0, size=1)
    with tempfile.TemporaryDirectory(prefix="cyclebnn-") as temporary:
        folder = (out or Path(temporary)).absolute()
        settings = Settings(
            folder=str(folder),
            data=str(folder / "data"),
            seeds=seeds,
            budget=budget,
            steps=steps,
            candidate_steps=candidate_steps,
            random_choices=random_choices,
            choices=tuple(name for name in SEARCHED if name == CLAIMED or name in (choices or SEARCHED)),
            eval_images=num_train // 4,
            until=time.time() + seconds,
        )
        costs = count_costs(recipe_of(settings, 0))
        costs.limit(budget)
        _claim(folder, settings)
        generate_sample(
            settings.data, num_train=num_train, num_val=num_val, image_size=STORED_SIDE, workers=workers
        )
        stopped, found = False, read_choices(settings)
        if len(found) < seeds:
            progress = Progress(folder)
            stopped = launch_ranks(settings, ranks=workers, network=None, progress=progress)["stopped"]
            found = read_choices(settings)
    if not found:
        raise RecipeError("--seconds", "ran out before one seed was finished", "allow more")
    return {
        "model": "resnet18 of four blocks",
        "candidates": len(costs.names),
        "budget": budget,
        "all_binary_cost": costs.share(costs.names),
        "steps": steps,
        "candidate_steps": candidate_steps,
        "random_choices": random_choices,
        "images": {"train": num_train, "held_out": settings.eval_images, "test": num_val},
        "machine": {**describe_machine("cpu"), "cores": os.cpu_count()},
        "asked_seeds": seeds,
        "stopped": stopped,
        "out": str(out) if out else None,
        **summarize(found),
    }


def summarize(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What trained choices say, as plain values.

    Args:
        found: accuracy in percent and cost by seed and choice, as ``read_choices`` gives them.

    Returns:
        ``choices``: a row for each strategy. ``difference`` is the mean over seeds of the search's accuracy less that of the
        row (of random choices their mean), in percentage points; ``interval`` its two-sided 95 % t interval, None with one
        seed. ``claim``: whether the search beats random layers, its interval above 0; None with fewer than ``least_seeds``.
    """
    rows: list[dict[str, Any]] = []
    present = {key.partition("_")[0] for choices in found.values() for key in choices}
    for name in (each for each in (*SEARCHED, RANDOM) if each in present):
        accuracies, shares = [], []
        for choices in found.values():
            own = [each for key, each in choices.items() if key.partition("_")[0] == name]
            accuracies.append(statistics.fmean(each["accuracy"] for each in own))
            shares.append(statistics.fmean(each["cost"] for each in own))
        row: dict[str, Any] = {
            "choice": name,
            "accuracy": statistics.fmean(accuracies),
            "cost": statistics.fmean(shares),
            "by_seed": accuracies,
            "difference": None,
            "interval": None,
        }
        if name != CLAIMED:
            pairs = [ours - theirs for ours, theirs in zip(rows[0]["by_seed"], accuracies, strict=True)]
            between = mean_interval(pairs)
            row["difference"] = between.mean
            if not math.isnan(between.low):
                row["interval"] = {"low": between.low, "high": between.high}
        rows.append(row)
    interval = rows[-1]["interval"]
    enough = len(found) >= LEAST_SEEDS and interval is not None
    return {
        "seeds": len(found),
        "least_seeds": LEAST_SEEDS,
        "choices": rows,
        "claim": interval["low"] > 0 if enough else None,
    }


class Progress:
    """A line in the log for every network that is trained."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[Path] = set(folder.glob("seed_*/*.json"))

    def __call__(self) -> None:
        for path in sorted(set(self._folder.glob("seed_*/*.json")) - self._seen):
            self._seen.add(path)
            log.info("%s, %s: %.2f %%", path.parent.name, path.stem, json.loads(path.read_text())["accuracy"])


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder that of these settings; more seeds and more time may be asked for later."""
    marker = folder / "bench.json"
    fixed = {
        key: value
        for key, value in asdict(settings).items()
        if key not in ("folder", "data", "seeds", "until")
    }
    try:
        if marker.exists():
            before = json.loads(marker.read_text())
            before["choices"] = tuple(before.get("choices", ()))
            differing = [
                f"{key} {before.get(key)}, not {value}"
                for key, value in fixed.items()
                if before.get(key) != value
            ]
            if differing:
                raise RecipeError(
                    "--out", f"{folder} is of other settings: {'; '.join(differing)}", "name another folder"
                )
            return
        if folder.exists() and any(folder.iterdir()):
            raise RecipeError(
                "--out", f"{folder} is not empty and no folder of this benchmark", "name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(fixed, indent=2) + "\n")
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError("--out", f"cannot use {folder}: {error}", "name another folder") from None
