"""``cyclebnn bench convergence``: whether a binary network learns as well from narrow gradients, seed by seed."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cyclebnn_dist.bench.convergence_data import NUM_TEST, NUM_TRAIN, check_sets
from cyclebnn_dist.bench.convergence_journal import Runs, open_journal, read_runs
from cyclebnn_dist.bench.convergence_rounds import Settings, draw_order
from cyclebnn_dist.bench.convergence_summary import summarize
from cyclebnn_dist.bench.convergence_variants import choose_variants
from cyclebnn_dist.bench.layers import describe_machine
from cyclebnn_dist.bench.local_ranks import launch_ranks
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.world import discover_world

log = logging.getLogger(__name__)

VERSION = 1
"""Part of what runs have in common; raised whenever the data, the network or its training change."""

BATCH = 128


def bench_convergence(
    *,
    ranks: int = 2,
    seeds: int = 20,
    sets: Sequence[str] = ("shapes",),
    variants: Sequence[str] | None = None,
    steps: int = 400,
    seconds: float = 3600.0,
    out: Path | None = None,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
) -> dict[str, Any]:
    """Train with every variant from every seed, on processes of this machine.

    Args:
        ranks: processes, started once for all runs.
        seeds: from 0 on; each is one pair of a variant and the fp32 all-reduce.
        sets, variants: names (see ``convergence_data`` and ``convergence_variants``).
        steps: optimizer steps of a run.
        seconds: begin no run that would end later than this.
        out: file of finished runs, from which another call goes on; without it they are forgotten.
        num_train, num_test: images of the drawn set.

    Returns:
        plain values, as ``summarize`` gives them, with what was trained on what; ``stopped`` is "seconds", "interrupt"
        (Ctrl-C) or empty, and says why there are fewer runs than asked for.

    Raises:
        RecipeError: an argument that nothing can be trained with.
        RuntimeError: a rank failed.
        KeyboardInterrupt: before any run was finished.
    """
    chosen = choose_variants(variants)
    sets = tuple(dict.fromkeys(sets))
    check_sets(sets)
    _check(ranks=ranks, seeds=seeds, steps=steps, seconds=seconds)
    if discover_world().source != "alone":
        raise RecipeError(
            "WORLD_SIZE", "this benchmark starts its ranks itself", "leave out torchrun or srun"
        )
    configure_logging(rank=0, size=1)
    with tempfile.TemporaryDirectory(prefix="cyclebnn-") as folder:
        journal = out or Path(folder) / "runs.jsonl"
        done = open_journal(journal, _experiment(ranks, steps, num_train, num_test))
        asked = draw_order(sets, [variant.name for variant in chosen], seeds=seeds, done=())
        missing = tuple(key for key in asked if key not in done)
        if len(missing) < len(asked):
            log.info("%d of %d runs are in %s", len(asked) - len(missing), len(asked), journal)
        settings = Settings(
            missing=missing,
            journal=str(journal.absolute()),
            steps=steps,
            batch=BATCH,
            num_train=num_train,
            num_test=num_test,
            until=time.time() + seconds,
        )
        stopped = _train(settings, Progress(journal, done), ranks=ranks) if missing else ""
        every = read_runs(journal)
    runs = {key: every[key] for key in asked if key in every}
    if not runs:
        raise KeyboardInterrupt
    any_run = next(iter(runs.values()))
    images = {name: run["images"] for (name, _, _), run in runs.items()}
    return {
        "ranks": ranks,
        "steps": steps,
        "batch": BATCH,
        "parameters": any_run["parameters"],
        "wide_share": any_run["wide_share"],
        "sets": {name: images[name] for name in sets if name in images},
        "machine": {**describe_machine("cpu"), "cores": os.cpu_count()},
        "runs": len(runs),
        "asked_runs": len(asked),
        "stopped": stopped,
        "out": str(out) if out else None,
        **summarize(runs, sets=sets, variants=chosen),
    }


class Progress:
    """A line in the log for every run that ends."""

    def __init__(self, journal: Path, done: Runs) -> None:
        self._journal, self._seen, self._size = journal, set(done), 0

    def __call__(self) -> None:
        size = self._journal.stat().st_size
        if size == self._size:
            return
        self._size = size
        runs = read_runs(self._journal)
        for name, variant, seed in runs.keys() - self._seen:
            run = runs[name, variant, seed]
            log.info(
                "%s, seed %d, %s: %.2f %% in %.1f s", name, seed, variant, run["accuracy"], run["seconds"]
            )
        self._seen |= runs.keys()


def _train(settings: Settings, progress: Progress, *, ranks: int) -> str:
    """Why it stopped before the last run; empty if it did not."""
    log.info("%d runs to do", len(settings.missing))
    try:
        return (
            "seconds"
            if launch_ranks(settings, ranks=ranks, network=None, progress=progress)["stopped"]
            else ""
        )
    except KeyboardInterrupt:
        return "interrupt"


def _experiment(ranks: int, steps: int, num_train: int, num_test: int) -> dict[str, Any]:
    """What runs must have in common to be compared."""
    return {
        "version": VERSION,
        "ranks": ranks,
        "steps": steps,
        "train_images": num_train,
        "test_images": num_test,
        "torch": torch.__version__,
    }


def _check(*, ranks: int, seeds: int, steps: int, seconds: float) -> None:
    if ranks < 2:
        raise RecipeError("--ranks", f"{ranks} cannot exchange anything", "ask for 2 or more")
    if BATCH % ranks:
        raise RecipeError("--ranks", f"{ranks} cannot share {BATCH} images evenly", "ask for a divisor of it")
    if BATCH // ranks < 2:
        raise RecipeError(
            "--ranks", f"{ranks} leave one image each, which cannot be normalized", "ask for fewer"
        )
    for key, value in (("--seeds", seeds), ("--steps", steps), ("--seconds", seconds)):
        if not value > 0:
            raise RecipeError(key, f"{value:g} is not possible", "make it more than 0")
