"""The phases of training: real weights behind binary inputs at first, binary weights afterwards. Pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import OptimConfig, Recipe
from cyclebnn_dist.optimizer import learning_rate

Weights = Literal["real", "binary"]


class Moment(NamedTuple):
    """What the phases say about one step."""

    first_phase: bool
    """Whether the step is of the first phase: its weights are real, and decay as that phase has them."""
    lr: float
    progress: float
    """How far binary methods are: 0 until the last step of a first phase is done, 1 at the end of the run."""
    restarts_optimizer: bool
    """Whether the step begins with a new optimizer."""


@dataclass(frozen=True)
class Phases:
    """A run of ``total_steps`` steps, the first ``first_steps`` of which (0 for none) have real weights.

    Weights are binary from the first step of the second phase on, whose learning rate and progress start anew. A
    checkpoint written at the border belongs to the first phase: who goes on from it begins the second one as an
    undisturbed run does.

    Source: Liu et al., ReActNet (ECCV 2020). Its released code trains in two runs, the second from the last weights of
    the first, with a new optimizer.
    """

    optim: OptimConfig
    first_lr: float
    restart_optimizer: bool
    first_steps: int
    total_steps: int
    steps_per_epoch: int

    def at(self, step: int) -> Moment:
        """The phase's settings at ``step``, counted from 0."""
        first = step < self.first_steps
        begin, end = (0, self.first_steps) if first else (self.first_steps, self.total_steps)
        lr = learning_rate(
            step - begin,
            replace(self.optim, lr=self.first_lr) if first else self.optim,
            total_steps=end - begin,
            steps_per_epoch=self.steps_per_epoch,
        )
        return Moment(
            first_phase=first,
            lr=lr,
            progress=0.0 if first else (step - begin) / (end - begin),
            restarts_optimizer=self.restart_optimizer and 0 < step == self.first_steps,
        )

    def weights_after(self, step: int) -> Weights:
        """Which weights a model is evaluated with after ``step`` finished steps: those that it was trained with last."""
        return "real" if 0 < self.first_steps >= step else "binary"


def build_phases(recipe: Recipe, *, total_steps: int, steps_per_epoch: int) -> Phases:
    """The phases of a recipe.

    Raises:
        RecipeError: one of two phases would have no step.
    """
    first = recipe.first_phase
    first_steps = round(first.epochs * steps_per_epoch)
    if first.epochs and not 0 < first_steps < total_steps:
        raise RecipeError(
            "first_phase.epochs",
            f"{first.epochs:g} epochs are {first_steps} of the run's {total_steps} steps",
            "each phase needs one at least",
        )
    return Phases(
        optim=recipe.optim,
        first_lr=recipe.optim.lr if first.lr is None else first.lr,
        restart_optimizer=first.restart_optimizer,
        first_steps=first_steps,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )
