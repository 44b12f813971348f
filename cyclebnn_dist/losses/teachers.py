"""Teachers: who of a recipe's teachers teaches at a step, and what they say about a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from cyclebnn_dist.config.recipe import DistillConfig
from cyclebnn_dist.losses.distillation import assistant_index
from cyclebnn_dist.models.teacher import Normalization, Teacher

log = logging.getLogger(__name__)


class Teachers:
    """The teachers of a run; those that a step needs are on the device, others in main memory.

    Who teaches is a function of the step: nothing here is part of a checkpoint.
    """

    def __init__(
        self,
        config: DistillConfig,
        teachers: Mapping[str, Teacher],
        *,
        normalization: Normalization,
        total_steps: int,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            teachers: by name, as ``load_teachers`` gives them.
            normalization: that of the images the teachers will be given.
            total_steps: of the run, which the assistants share out among them.
        """
        self._config = config
        self._teachers = teachers
        self._total_steps = total_steps
        self._device = device
        self._dtype = {"bf16": torch.bfloat16, "fp32": None}[config.amp]
        self._teaching: tuple[str, ...] = ()
        self._affine = {
            name: _affine(normalization, teacher.normalization, device) for name, teacher in teachers.items()
        }
        for name, teacher in teachers.items():
            if self._affine[name] is not None:
                log.info("the teacher %s gets images of mean %s, deviation %s", name, *teacher.normalization)
            if channels_last:
                teacher.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def names(self, step: int) -> tuple[str, ...]:
        """Who teaches at ``step``: the assistant whose turn it is, if there are any, and the teacher."""
        assistants = self._config.assistants
        return (*assistants[self._index(step) : self._index(step) + 1], self._config.teacher)

    def place(self, step: int) -> dict[str, float]:
        """What a row of the metrics says about the place in the list of assistants, counted from 0; maybe nothing."""
        return {"assistant": self._index(step)} if self._config.assistants else {}

    @torch.no_grad()
    def logits(self, images: Tensor, *, step: int) -> Tensor:
        """What those who teach at ``step`` say: float32 [n, B, C], in the order of ``names``.

        Args:
            images: [B, 3, S, S] on the device, normalized for the model that learns.
        """
        names = self.names(step)
        if names != self._teaching:
            self._change_to(names, step)
        images = images.float()
        said = {}
        for name in dict.fromkeys(names):
            affine = self._affine[name]
            own_images = images if affine is None else images * affine[0] + affine[1]
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
                said[name] = self._teachers[name].network(own_images).float()
        return torch.stack([said[name] for name in names])

    @property
    def description(self) -> str:
        """Names and digests of the weights of all teachers; the same text means the same teachers."""
        return ", ".join(f"{name} {teacher.digest[:12]}" for name, teacher in self._teachers.items())

    def _index(self, step: int) -> int:
        return assistant_index(
            step, total_steps=self._total_steps, num_assistants=max(1, len(self._config.assistants))
        )

    def _change_to(self, names: tuple[str, ...], step: int) -> None:
        for name in set(self._teaching) - set(names):
            self._teachers[name].network.to("cpu")
        for name in names:
            self._teachers[name].network.to(self._device)
        self._teaching = names
        log.info("taught from step %d on by %s", step, " and ".join(dict.fromkeys(names)))


def _affine(
    given: Normalization, wanted: Normalization, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, [3, 1, 1] each, from images normalized one way to the other; None where they are the same."""
    if tuple(map(tuple, given)) == tuple(map(tuple, wanted)):
        return None
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pair]
        for pair in (given, wanted)
    )
    return tuple(each.float().to(device) for each in (std / other_std, (mean - other_mean) / other_std))  # type: ignore[return-value]
