"""The objective: all of the loss of a training step, from labels, teachers and penalties."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.losses.distillation import cross_entropies, weighted_mean
from cyclebnn_dist.losses.kurtosis import kurtosis_penalty
from cyclebnn_dist.losses.teachers import Teachers
from cyclebnn_dist.models import load_teachers


def build_objective(
    recipe: Recipe, *, total_steps: int, device: torch.device, trained: bool = True
) -> Objective:
    """What a recipe minimizes, with its teachers loaded, if it has any.

    Args:
        total_steps: of the run.
        trained: false for teachers that know nothing, to time them.

    Raises:
        RecipeError: a teacher cannot be had (see ``load_teachers``).
    """
    if not recipe.distill.teacher:
        return Objective(recipe)
    teachers = Teachers(
        recipe.distill,
        load_teachers(recipe, trained=trained),
        normalization=(recipe.data.mean, recipe.data.std),
        total_steps=total_steps,
        device=device,
        channels_last=recipe.model.channels_last,
    )
    return Objective(recipe, teachers=teachers)


class Objective:
    """What a recipe minimizes. Without a teacher: the cross-entropy with the labels; and the penalties it asks for.

    It carries nothing over a restart but what it has noted for the next row of the metrics.
    """

    def __init__(self, recipe: Recipe, *, teachers: Teachers | None = None) -> None:
        """
        Args:
            teachers: those of ``recipe.distill``; None only where it has none.
        """
        assert (teachers is not None) == bool(recipe.distill.teacher)
        self._label_smoothing = recipe.train.label_smoothing
        self._loss = recipe.loss
        self._distill = recipe.distill
        self._teachers = teachers
        self._roles = ("assistant_loss", "teacher_loss") if recipe.distill.assistants else ("teacher_loss",)
        self._sums: dict[str, Tensor] = {}
        self._calls = 0

    @property
    def teachers(self) -> str:
        """Names and digests of the teachers, alike on every rank; "none" without."""
        return self._teachers.description if self._teachers else "none"

    def __call__(
        self, model: nn.Module, images: Tensor, logits: Tensor, targets: Tensor, *, step: int
    ) -> Tensor:
        """The loss of one micro-batch, a scalar.

        Args:
            model: whose weights are penalized.
            images: what the model was given, [B, 3, S, S].
            logits: what it made of them, float32 [B, C].
            targets: int64 [B], or probabilities [B, C].
            step: of the run.
        """
        if self._teachers is None:
            loss = self._with_labels(logits, targets)
        else:
            loss = self._with_teachers(self._teachers.logits(images, step=step), logits, targets)
        return loss + kurtosis_penalty(
            model, weight=self._loss.kurtosis_weight, target=self._loss.kurtosis_target
        )

    def take_means(self) -> dict[str, Tensor]:
        """Means over the calls since this was asked last, of the cross-entropies with teacher, assistant and labels.

        Scalars on the device, of this rank; the same names on every rank, and none without a teacher.
        """
        means = {name: total / self._calls for name, total in self._sums.items()}
        self._sums, self._calls = {}, 0
        return means

    def place(self, step: int) -> Mapping[str, float]:
        """What else a row of the metrics says of ``step``: whose turn it is in the list of assistants."""
        return self._teachers.place(step) if self._teachers else {}

    def _with_teachers(self, of_teachers: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        config = self._distill
        losses = cross_entropies(logits, of_teachers, temperature=config.temperature)
        loss = config.temperature**2 * weighted_mean(losses, weighting=config.weighting)
        terms = dict(zip(self._roles, losses.mean(dim=1), strict=True))
        if config.label_loss:
            terms["label_loss"] = self._with_labels(logits, targets)
            loss = loss + config.label_loss * terms["label_loss"]
        self._note(terms)
        return loss

    def _with_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets, label_smoothing=self._label_smoothing)

    def _note(self, terms: Mapping[str, Tensor]) -> None:
        self._calls += 1
        for name, value in terms.items():
            noted = value.detach()
            self._sums[name] = self._sums[name] + noted if name in self._sums else noted.clone()
