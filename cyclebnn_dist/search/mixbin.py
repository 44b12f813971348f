"""MixBin: which layers of a recipe's network stay real, so that it costs at most a given share of the real network.

Budgeted greedy mixing, after MixBin (arXiv 2211.06739); ``selection`` says what of it is reconstructed. Every process of
a search, rank of a job or task of an array, runs ``search``, takes the trainings that nobody else has taken (``folder``)
and comes to the same result by itself: choices follow from the finished scores alone, and no process waits for a message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from cyclebnn_dist.config import Recipe
from cyclebnn_dist.config.pattern import Pattern, write_pattern
from cyclebnn_dist.config.search_rules import check_searchable
from cyclebnn_dist.data import open_source
from cyclebnn_dist.guards.exit_status import FINISHED
from cyclebnn_dist.guards.preempt import Preempted, PreemptionFlag
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.search.costs import Costs, count_costs
from cyclebnn_dist.search.folder import (
    PATTERN,
    PICTURE,
    Folder,
    read_outcome,
    read_weights,
    refusing_disk,
    search_dir,
    write_outcome,
    write_weights,
)
from cyclebnn_dist.search.held_out import hold_out
from cyclebnn_dist.search.plot import plot_pattern
from cyclebnn_dist.search.progress import SearchProgress
from cyclebnn_dist.search.selection import UNMEASURED, Outcome, Round, select
from cyclebnn_dist.search.short_training import ShortTraining
from cyclebnn_dist.search.text import render_pattern
from cyclebnn_dist.world import World, alone, discover_world, leave_world

log = logging.getLogger(__name__)

ALGORITHM = "budgeted greedy mixing, after MixBin (arXiv 2211.06739; reconstructed, its code is not public)"
BASELINE = "a baseline of the search"
UNCHANGED = "unchanged"
WEIGHTS = "weights.safetensors"


def main(recipe: Recipe, *, preemption: PreemptionFlag, show: Callable[[Pattern], str] | None = None) -> int:
    """Search to the end, or to a signal, from wherever the search stands, and print what was found.

    Not collective: ranks share the folder of the search and nothing else, and each leaves by itself.

    Returns:
        FINISHED; PREEMPTED or INTERRUPTED after a signal: what is finished stays, and the same command goes on.

    Raises:
        RecipeError: for what the user can mend.
        KeyboardInterrupt: at a second Ctrl-C.
    """
    world = discover_world()
    preemption.belongs_to(world.rank)
    configure_logging(rank=world.rank, size=world.size)
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.run.deterministic)
    try:
        leave = partial(leave_if_asked, preemption)
        pattern = search(recipe, world, worker=worker_number(world), leave=leave)
    except Preempted:
        folder = search_dir(recipe)
        log.warning("stopped; what is finished stays in %s, and the same command goes on from there", folder)
        return preemption.status
    finally:
        leave_world()
    if world.is_main:
        print(show(pattern) if show else render_pattern(pattern, folder=search_dir(recipe)))
    return FINISHED


def leave_if_asked(preemption: PreemptionFlag) -> None:
    """Raise ``Preempted`` if a signal came."""
    if preemption.requested:
        raise Preempted


def worker_number(world: World) -> int:
    """A number that differs between the processes of a job and between the tasks of a Slurm array."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) * world.size + world.rank


def search(
    recipe: Recipe, world: World, *, worker: int = 0, leave: Callable[[], None] = lambda: None
) -> Pattern:
    """Find the layers, and write them into the search's folder as a pattern and as a picture.

    Args:
        world: tells on which device to work; process groups are not used, and made only where there are none.
        worker: a number of this process, another for each that shares the search.
        leave: called again and again; it raises what is to end the search.

    Raises:
        RecipeError: the recipe cannot be searched, the budget is impossible, or the folder is another search's.
    """
    check_searchable(recipe)
    costs = count_costs(recipe)
    costs.limit(recipe.search.budget)
    folder = Folder(search_dir(recipe), worker=worker, leave=leave)
    progress = SearchProgress(enabled=world.is_main)
    trainings = Trainings(recipe, world, costs=costs, folder=folder, progress=progress)
    try:
        if recipe.search.strategy not in UNMEASURED and not folder.claimed:
            # A recipe that is refused leaves no mark: once mended it may have the folder.
            trainings.try_out()
        folder.claim(recipe)
        binary, rounds = select(
            costs,
            budget=recipe.search.budget,
            strategy=recipe.search.strategy,
            metric=recipe.search.score,
            random_seed=recipe.search.random_seed,
            measure=trainings.measure,
            chose=progress.chose,
        )
    finally:
        trainings.close()
        progress.close()
    pattern = describe(recipe, costs, binary, rounds)
    if world.is_main:
        with refusing_disk(folder.path):
            write_pattern(pattern, folder.path / PATTERN)
            plot_pattern(pattern, costs, folder.path / PICTURE)
    return pattern


class Trainings:
    """What candidates reach: read where it is finished, trained where it is not."""

    def __init__(
        self, recipe: Recipe, world: World, *, costs: Costs, folder: Folder, progress: SearchProgress
    ) -> None:
        self._recipe, self._world, self._costs = recipe, world, costs
        self._folder, self._progress = folder, progress
        self._training: ShortTraining | None = None

    def try_out(self) -> None:
        """Look whether there are the images and the network that trainings start with.

        Raises:
            RecipeError: there are not.
        """
        self._short_training().start(frozenset())

    def measure(
        self, number: int, binary: frozenset[str], layers: Sequence[str]
    ) -> tuple[Outcome, Mapping[str, Outcome]]:
        """As ``selection.Measure`` says; ``binary`` must be that of the round before with one layer changed."""
        config = self._recipe.search
        place = f"round_{number:03d}"
        weights = f"{place}/{WEIGHTS}"
        names = {f"{place}/{name}.json": name for name in (UNCHANGED, *layers)}
        missing = [name for name in names if not (self._folder.path / name).exists()]
        if missing:
            before = f"round_{number - 1:03d}/{WEIGHTS}" if number > 1 else ""
            steps = config.finetune_steps if number > 1 else config.pretrain_steps
            self._progress.begin(f"round {number}, weights", total=1)
            self._folder.make_all(
                {weights: partial(self._train_weights, number, binary, before, steps)}, told=self._progress.at
            )
            first = config.pretrain_steps + (number - 1) * config.finetune_steps
            self._progress.begin(f"round {number}, candidates", total=len(names))
            makers = {
                file: partial(self._train_candidate, weights, binary ^ ({name} - {UNCHANGED}), first)
                for file, name in names.items()
            }
            self._folder.make_all(makers, told=self._progress.at)
        outcomes = {name: read_outcome(self._folder.path / file) for file, name in names.items()}
        return outcomes.pop(UNCHANGED), outcomes

    def _train_weights(
        self, number: int, binary: frozenset[str], before: str, steps: int, path: Path
    ) -> None:
        config = self._recipe.search
        start = read_weights(self._folder.path / before) if before else None
        first = config.pretrain_steps + (number - 2) * config.finetune_steps if before else 0
        model = self._short_training().train(binary, start, first_batch=first, steps=steps)
        write_weights(model.state_dict(), path)

    def _train_candidate(self, weights: str, binary: frozenset[str], first: int, path: Path) -> None:
        training = self._short_training()
        start = read_weights(self._folder.path / weights)
        model = training.train(binary, start, first_batch=first, steps=self._recipe.search.steps)
        write_outcome(training.score(model), path)

    def _short_training(self) -> ShortTraining:
        """Made when the first training is needed: a search whose scores are all there looks at no image."""
        if self._training is None:
            recipe = self._recipe
            images = open_source(recipe.data, "train", num_classes=recipe.model.num_classes)
            train, score = hold_out(images, recipe.search)
            self._training = ShortTraining(
                recipe,
                alone(self._world),
                candidates=self._costs.names,
                train=train,
                score=score,
                leave=self._folder.leave,
            )
        return self._training

    def close(self) -> None:
        if self._training is not None:
            self._training.close()


def describe(recipe: Recipe, costs: Costs, binary: frozenset[str], rounds: Sequence[Round]) -> Pattern:
    """The result of a search, as it is written for people and recipes."""
    config = recipe.search
    greedy = config.strategy in ("grow", "shrink")
    found = {
        "by": ALGORITHM if greedy else BASELINE,
        "strategy": config.strategy,
        "score": config.score,
        "method": recipe.binary.method,
        "image_size": recipe.data.image_size,
        "all_binary_cost": round(costs.share(costs.names), 6),
        "rounds": [
            {
                "layer": each.layer,
                "to": each.to,
                "candidates": each.candidates,
                "top1": round(each.outcome.accuracy, 4),
                "top1_unchanged": round(each.unchanged.accuracy, 4),
                "cost": round(each.share, 6),
            }
            for each in rounds
        ],
    }
    if config.strategy == "random":
        found["random_seed"] = config.random_seed
    return Pattern(
        model=recipe.model.name,
        budget=config.budget,
        cost=round(costs.share(binary), 6),
        real=tuple(name for name in costs.names if name not in binary),
        binary=tuple(name for name in costs.names if name in binary),
        found=found,
    )
