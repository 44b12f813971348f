"""BNext: weights that harden from real values to signs over the run, and wide straight-through activations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import BoxSign, hard_sign
from cyclebnn_dist.binary.product import Operands
from cyclebnn_dist.binary.rebuild import Rebuild, offer

BOUND = 1.5
"""Latent weights stay within it, and the gradient of activations passes within it."""


class TemperedSign(torch.autograd.Function):
    """clamp(w / T, -1, 1), or sign(w) where T is 0; identity gradient. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, temperature: Tensor) -> Tensor:
        warm = temperature > 0.0
        soft = (weight / torch.where(warm, temperature, 1.0)).clamp_(-1.0, 1.0)
        return torch.where(warm, soft, hard_sign(weight)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@method("bnext")
class BNext(Binarizer):
    """BNext: a_b = sign(a), gradient 1 where |a| <= 1.5; w_b = clamp(w / T, -1, 1) with a falling temperature T, then sign(w).

    The weight's gradient is the identity; there is no scale. Before each forward pass in training latent weights are
    clamped to [-1.5, 1.5].

    T = 0.9^(512 progress), and sign(w) as soon as that is below 1e-7: from 30 % of the run on. That is the published rule
    (T times 0.9 an epoch, 512 epochs) as a function of the run's progress. The authors' code counts epochs instead, so a
    run of fewer than 153 never has binary weights, and evaluates with T; here evaluation always takes sign(w).

    Source: Guo et al., Towards Optimization-Friendly Binary Neural Network (TMLR 2023) and its released code. The learned
    shift in front of the sign and the attention behind the convolution belong to the architecture, not to this rule. The
    authors start latent weights at 0.001 times normal noise; here they stay as the model has them.
    """

    DECAY_PER_EPOCH: ClassVar[float] = 0.9
    PUBLISHED_EPOCHS: ClassVar[int] = 512
    LOWEST_TEMPERATURE: ClassVar[float] = 1e-7

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        temperature = cls.DECAY_PER_EPOCH ** (cls.PUBLISHED_EPOCHS * progress)
        return (temperature if temperature >= cls.LOWEST_TEMPERATURE else 0.0,)

    def binarize_weight(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                weight.clamp_(-BOUND, BOUND)
        phase = self.phase.clone()
        soft = TemperedSign.apply(weight, phase)
        if self.operands == "real" and soft.requires_grad and not torch.compiler.is_compiling():
            latent = weight.detach()
            offer(soft, Rebuild(lambda: TemperedSign.apply(latent, phase), reads=[latent]))
        return soft

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "real" if cls.phase_at(progress)[0] > 0.0 else "signs"

    def binarize_input(self, x: Tensor) -> Tensor:
        return BoxSign.apply(x, BOUND)

    def input_saturation(self, x: Tensor) -> Tensor:
        return (x.abs() > BOUND).mean(dtype=torch.float32)
