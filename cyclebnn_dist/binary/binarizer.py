"""The binarizer: how a layer's weights and inputs become signs. Published methods are in ``binary.methods``, a class each.

A binarizer is a module owned by its layer. To add a method, subclass ``Binarizer`` and decorate it with ``@method``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.product import Operands

OFF_BITS = 32
"""The width that means not quantized."""

METHODS: dict[str, type[Binarizer]] = {}
"""Binarizers by the name a recipe calls them."""


def method(name: str) -> Callable[[type[Binarizer]], type[Binarizer]]:
    """Register a binarizer under ``name``."""

    def register(binarizer: type[Binarizer]) -> type[Binarizer]:
        assert name not in METHODS, name
        METHODS[name] = binarizer
        return binarizer

    return register


class Binarizer(nn.Module):
    """One layer's rule: real weights and inputs in, two-valued ones out, and back.

    The layer computes ``scale_output(product(binarize_input(x), binarize_weight(w))) + bias``; in a first phase of training
    (see ``phases``) w itself takes the place of ``binarize_weight(w)``.

    Args:
        weight: the layer's latent weight [filters, channels / groups, ...]; read to size and initialize parameters, not
            kept.
        channel_dim: dimension of the channels in inputs and outputs: 1 for convolutions, -1 for linear layers.
        groups: groups of a convolution.
    """

    follows_schedule: ClassVar[bool] = False
    """Whether operands and gradients have the schedule's widths; others compute in full precision in training."""

    widths: Tensor
    scheduled_phase: Tensor
    final_phase: Tensor

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.num_channels = weight.shape[1] * groups
        self.quantize_forward = False
        self.quantize_backward = False
        self.scheduled_operands = self.operands_at(1.0)
        self.real_weights = False
        widths = torch.tensor([OFF_BITS, OFF_BITS, 1, 0], dtype=torch.int32, device=weight.device)
        self.register_buffer("widths", widths, persistent=False)
        final = torch.tensor(self.phase_at(1.0), device=weight.device)
        self.register_buffer("scheduled_phase", final.clone(), persistent=False)
        self.register_buffer("final_phase", final, persistent=False)

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        """The method's numbers that change over a run: a pure function of its progress, 0 at the start and 1 at the end."""
        return ()

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        """What values ``binarize_input`` and ``binarize_weight`` give at this progress of a run."""
        return "signs"

    @property
    def operands(self) -> Operands:
        """``operands_at`` this step's progress in training, at the end of the run in evaluation; weights may be real."""
        operands = self.scheduled_operands if self.training else self.operands_at(1.0)
        if not self.real_weights:
            return operands
        return "two_valued_inputs" if operands == "two_valued" else "real"

    @property
    def phase(self) -> Tensor:
        """``phase_at`` this step's progress (see ``set_progress``) in training, at the end of the run in evaluation."""
        return self.scheduled_phase if self.training else self.final_phase

    def weight_in_use(self, weight: Tensor) -> Tensor:
        """The weight that inputs are multiplied with: binarized, or the latent one where ``set_progress`` says real."""
        return weight if self.real_weights else self.binarize_weight(weight)

    def binarize_weight(self, weight: Tensor) -> Tensor:
        """Two values a filter, in the shape of ``weight``."""
        raise NotImplementedError

    def binarize_input(self, x: Tensor) -> Tensor:
        """Signs, in the shape of ``x``."""
        raise NotImplementedError

    def scale_output(self, y: Tensor) -> Tensor:
        """What the method does to the product before the bias is added."""
        return y

    def input_magnitude(self, x: Tensor) -> Tensor | None:
        """Magnitudes whose mean over each window multiplies the output, or None for none.

        [batch, groups, ...] for a convolution with as many groups, [..., 1] for a linear layer.
        """
        return None

    def input_saturation(self, x: Tensor) -> Tensor | None:
        """Share of the elements of ``x`` at which the gradient of the sign is 0 in training, a scalar; None: not known."""
        return None

    def weight_saturation(self, weight: Tensor) -> Tensor | None:
        """The same share of the latent weights, or None where the method passes some gradient everywhere."""
        return None

    def weight_signs(self, weight: Tensor) -> Tensor:
        """Which of its filter's two values each weight takes: True for the upper one."""
        return self.binarize_weight(weight) > 0.0
