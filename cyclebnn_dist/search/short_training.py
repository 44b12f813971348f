"""Short trainings: a network with given binary layers, trained for some steps by one process alone, and scored.

They have a recipe's data, augmentation, mixing, optimizer, label smoothing, clipping and arithmetic, with precision.*.high
as constant widths; not its averaged weights, further losses, synchronized statistics or compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from cyclebnn_dist.assembly import place_model
from cyclebnn_dist.binary import parameter_kinds, scheduled_precision, set_progress, set_widths
from cyclebnn_dist.config import Recipe
from cyclebnn_dist.config.recipe import ModelConfig
from cyclebnn_dist.data import Batch, EvalLoader, Mixing, Source, TrainLoader
from cyclebnn_dist.engine.ddp import AUTOCAST_DTYPE
from cyclebnn_dist.evaluate import evaluate
from cyclebnn_dist.models import build_model
from cyclebnn_dist.optimizer import build_optimizer, learning_rate, set_learning_rate
from cyclebnn_dist.resume import seed_generators
from cyclebnn_dist.search.selection import Outcome
from cyclebnn_dist.world import World

WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""

Weights = Mapping[str, torch.Tensor]


class ShortTraining:
    """Trains and scores networks of one recipe that differ in which of ``candidates`` are binary.

    Args:
        world: of this process alone (see ``world.alone``).
        train, score: images to train with and to score with.
        leave: called before every step and every batch that is scored; it raises what is to end the work.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        *,
        candidates: tuple[str, ...],
        train: Source,
        score: Source,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        assert world.size == 1
        self._leave = leave
        self._recipe, self._world, self._candidates = recipe, world, candidates
        self._batch_size = recipe.search.batch_size
        place = {"rank": 0, "world_size": 1, "device": world.device}
        reading = {**place, "channels_last": recipe.model.channels_last}
        self._train = TrainLoader(
            train,
            recipe.data,
            batch_size=self._batch_size,
            seed=recipe.run.seed,
            **reading,  # type: ignore[arg-type]
        )
        self._score = EvalLoader(
            score,
            recipe.data,
            batch_size=recipe.eval.batch_size,
            **reading,  # type: ignore[arg-type]
        )
        self._mixing = Mixing(
            recipe.data,
            num_classes=recipe.model.num_classes,
            batch_size=self._batch_size,
            seed=recipe.run.seed,
            rank=0,
        )

    def train(
        self, binary: frozenset[str], weights: Weights | None, *, first_batch: int, steps: int
    ) -> nn.Module:
        """A network with these layers binary, from these weights, after ``steps`` steps.

        The same arguments give the same images, equally augmented, in the same order, and the same random numbers.

        Args:
            weights: state dict of a network with any layers binary; without it, the start that the recipe's model has.
            first_batch: place of the first batch in the order of the whole search.
        """
        recipe = self._recipe
        seed_generators(recipe.run.seed)
        model = self.start(binary) if weights is None else self._build(binary, self._bare())
        model = place_model(model, self._plain_recipe(), self._world)
        if weights is not None:
            carry_over(model, weights)
        precision = scheduled_precision(recipe.precision, model)
        optim = replace(
            recipe.optim,
            lr=recipe.search.peak_lr or recipe.optim.lr,
            schedule="cosine",
            warmup_epochs=WARMUP,
            min_lr=0.0,
        )
        optimizer = build_optimizer(model, optim, kinds=parameter_kinds(model))
        dtype = AUTOCAST_DTYPE.get(recipe.train.amp)
        seed_generators(recipe.run.seed + 1)
        self._train.seek(first_batch)
        model.train()
        for step in range(steps):
            self._leave()
            set_learning_rate(optimizer, learning_rate(step, optim, total_steps=steps, steps_per_epoch=steps))
            set_progress(model, step / steps)
            set_widths(
                model,
                forward_bits=precision.forward.high,
                backward_bits=precision.backward.high,
                step=first_batch + step,
                seed=recipe.run.seed,
            )
            batch = self._train.next()
            images, targets = self._mixing(batch.images, batch.labels, step=first_batch + step)
            with torch.autocast(self._world.device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(images)
            loss = nn.functional.cross_entropy(
                logits.float(), targets, label_smoothing=recipe.train.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            clip = recipe.train.clip_norm or float("inf")
            if torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), clip)):
                optimizer.step()
        return model

    def score(self, model: nn.Module) -> Outcome:
        """What a network reaches on the images to score with."""
        precision = scheduled_precision(self._recipe.precision, model)
        found = evaluate(
            model,
            self._batches(),
            world=self._world,
            forward_bits=self._recipe.eval.forward_bits or precision.forward.high,
            amp=self._recipe.train.amp,
        )
        return Outcome(accuracy=found.top1, loss=found.loss)

    def _batches(self) -> Iterator[Batch]:
        for batch in self._score:
            self._leave()
            yield batch

    def close(self) -> None:
        """Stop DALI's threads and free its buffers."""
        self._train.close()
        self._score.close()

    def start(self, binary: frozenset[str]) -> nn.Module:
        """A network with these layers binary, with the weights that the recipe's model starts from.

        Raises:
            RecipeError: as ``build_model``.
        """
        return self._build(binary, self._recipe.model)

    def _bare(self) -> ModelConfig:
        return replace(self._recipe.model, pretrained=False, weights="")

    def _build(self, binary: frozenset[str], model: ModelConfig) -> nn.Module:
        layers = {name: "binary" if name in binary else "real" for name in self._candidates}
        rules = replace(self._recipe.binary, layers=layers)  # type: ignore[arg-type]
        return build_model(model, rules, image_size=self._recipe.data.image_size)[0]

    def _plain_recipe(self) -> Recipe:
        model = replace(self._recipe.model, sync_bn=False, compile=False)
        return replace(self._recipe, model=model)


def carry_over(model: nn.Module, weights: Weights) -> None:
    """Load weights of the same network with other layers binary: what their binarizers learned beside is left out."""
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert all(".binarizer." in key for key in (*missing, *unexpected)), (missing, unexpected)
