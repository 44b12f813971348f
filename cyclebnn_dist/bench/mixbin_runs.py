"""What a worker of ``bench mixbin`` does: searches layers, and trains the networks that come of it, from every seed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cyclebnn_dist.config import Recipe
from cyclebnn_dist.config.pattern import Pattern
from cyclebnn_dist.config.recipe import (
    BinaryConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SearchConfig,
)
from cyclebnn_dist.data import open_source
from cyclebnn_dist.search.folder import Folder, write_outcome
from cyclebnn_dist.search.mixbin import search
from cyclebnn_dist.search.selection import Strategy
from cyclebnn_dist.search.short_training import ShortTraining
from cyclebnn_dist.world import World, alone

CLAIMED: Strategy = "shrink"
RANDOM: Strategy = "random"
SEARCHED: tuple[Strategy, ...] = (CLAIMED, "grow", "iterative", "sensitivity", "first", "last")
IMAGE_SIZE = 32
FIRST_SEED = 1
"""With seed 0, and a quarter of the steps, it was tried out which strategy to claim something for."""


@dataclass(frozen=True)
class Settings:
    """Of all workers alike."""

    benchmark: ClassVar[str] = "mixbin"

    folder: str
    data: str
    seeds: int
    budget: float
    steps: int
    candidate_steps: int
    random_choices: int
    choices: tuple[str, ...]
    """Of ``SEARCHED``; JSON makes a list of it."""
    eval_images: int
    until: float
    """No seed begins after this moment, in seconds since 1970."""


def recipe_of(settings: Settings, seed: int) -> Recipe:
    """The small network, its data and its training: a ResNet of four blocks behind a narrow stem without a pool."""
    kwargs = {
        "layers": [1, 1, 1, 1],
        "channels": [16, 32, 48, 64],
        "stem_type": "deep",
        "stem_width": 8,
        "zero_init_last": False,
    }
    return Recipe(
        run=RunConfig(dir=f"{settings.folder}/seed_{seed}/run", seed=seed, deterministic=True),
        model=ModelConfig(name="resnet18", num_classes=10, kwargs=kwargs),
        binary=BinaryConfig(method="bireal", activation="prelu", stem_pool="none", keep_deep_stem=True),
        data=DataConfig(
            path=settings.data, format="folder", image_size=IMAGE_SIZE, threads=1, scale=(0.6, 1.0)
        ),
        optim=OptimConfig(name="adamw", lr=3e-3),
        eval=EvalConfig(batch_size=100),
        search=SearchConfig(
            budget=settings.budget,
            score="loss",
            pretrain_steps=5 * settings.candidate_steps,
            steps=settings.candidate_steps,
            finetune_steps=settings.candidate_steps,
            batch_size=64,
            eval_images=settings.eval_images,
        ),
    )


def seeds_of(settings: Settings) -> range:
    """The seeds that are measured."""
    return range(FIRST_SEED, FIRST_SEED + settings.seeds)


def choices_of(settings: Settings) -> dict[str, tuple[Strategy, int]]:
    """Strategy and seed of its randomness by name."""
    several: dict[str, tuple[Strategy, int]] = {
        f"{RANDOM}_{number}": (RANDOM, number) for number in range(settings.random_choices)
    }
    return {**{str(name): (name, 0) for name in SEARCHED if name in settings.choices}, **several}


def measure_choices(world: World, settings: Settings) -> dict[str, Any]:
    """Every choice of every seed searched, trained from the start, and evaluated; workers share the work by its files.

    Returns:
        whether time ran out. What was measured is in the folder (see ``result_file``).
    """
    worker, world = world.rank, alone(world)
    folder = Folder(Path(settings.folder), worker=worker)
    (folder.path / ".locks").mkdir(parents=True, exist_ok=True)
    for seed in seeds_of(settings):
        if time.time() > settings.until:
            return {"stopped": True}
        recipe = recipe_of(settings, seed)
        makers = {}
        for name, (strategy, random_seed) in choices_of(settings).items():
            place = f"{settings.folder}/seed_{seed}/{name}"
            config = replace(
                recipe.search, strategy=strategy, random_seed=100 * seed + random_seed, dir=place
            )
            pattern = search(replace(recipe, search=config), world, worker=worker)
            makers[result_file(seed, name)] = partial(train_choice, recipe, world, pattern, settings.steps)
        folder.make_all(makers, told=lambda done: None)
    return {"stopped": False}


def result_file(seed: int, name: str) -> str:
    """Below the folder: accuracy in percent and loss of a trained choice."""
    return f"seed_{seed}/{name}.json"


def train_choice(recipe: Recipe, world: World, pattern: Pattern, steps: int, path: Path) -> None:
    """Train a choice on all training images and write what it reaches on the validation images, which no search sees."""
    train, score = (open_source(recipe.data, split, num_classes=10) for split in ("train", "val"))
    training = ShortTraining(
        recipe, world, candidates=(*pattern.real, *pattern.binary), train=train, score=score
    )
    model = training.train(frozenset(pattern.binary), None, first_batch=0, steps=steps)
    write_outcome(training.score(model), path)
    training.close()


def read_choices(settings: Settings) -> dict[int, dict[str, dict[str, Any]]]:
    """By seed and name: accuracy, loss and cost of trained choices, for seeds of which all are there."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in seeds_of(settings):
        root, names = Path(settings.folder), choices_of(settings)
        if all((root / result_file(seed, name)).exists() for name in names):
            found[seed] = {name: _read(root, seed, name) for name in names}
    return found


def _read(root: Path, seed: int, name: str) -> dict[str, Any]:
    pattern = json.loads((root / f"seed_{seed}" / name / "pattern.json").read_text())
    outcome = json.loads((root / result_file(seed, name)).read_text())
    return {**outcome, "cost": pattern["cost"], "real": pattern["real"]}
