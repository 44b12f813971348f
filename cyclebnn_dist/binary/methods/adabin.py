"""AdaBin: weights and inputs take the two values that suit their distribution, not -1 and +1."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import hard_sign, surrogate_times
from cyclebnn_dist.binary.layouts import at_least_fp32
from cyclebnn_dist.binary.methods.centred import filter_statistics, inner_dims
from cyclebnn_dist.binary.methods.ede import ede_at, ede_gradient, ede_saturation
from cyclebnn_dist.binary.product import Operands


class BinarySetWeight(torch.autograd.Function):
    """mean + deviation sign(u), u = (w - mean) / deviation, per filter; EDE's gradient at the sign, exact elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mean: Tensor, deviation: Tensor, phase: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mean, deviation, phase.clone())
        # Two distinct numbers, so that rounding cannot make more than two values of a filter.
        low, high = (mean - deviation).to(weight.dtype), (mean + deviation).to(weight.dtype)
        return torch.where(weight >= mean, high, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, mean, deviation, phase = ctx.saved_tensors
        dims = inner_dims(weight)
        u, grad = (at_least_fp32(weight) - mean) / deviation, at_least_fp32(grad)
        inner = ede_gradient(u, phase).mul_(grad)
        signs = torch.where(u >= 0.0, 1.0, -1.0)
        # d mean / dw_i = 1 / n, d deviation / dw_i = u_i / n; u depends on both.
        by_mean = (grad - inner).mean(dims, keepdim=True)
        by_deviation = (grad * signs - inner * u).mean(dims, keepdim=True)
        return inner.add_(by_mean).addcmul_(u, by_deviation).to(weight.dtype), None, None, None


class BinarySetInput(torch.autograd.Function):
    """alpha sign(u) + beta, u = (x - beta) / alpha; Bi-Real's polynomial gradient at the sign, exact elsewhere.

    ``centre_scaled``: alpha (sign(u) + beta) instead, as released. alpha and beta are [1].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, centre_scaled: bool) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.centre_scaled = centre_scaled
        centre = alpha * beta if centre_scaled else beta
        signs = hard_sign((x - beta) / alpha)
        return torch.where(signs > 0.0, centre + alpha, centre - alpha).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, alpha, beta = ctx.saved_tensors
        u = (at_least_fp32(x) - beta) / alpha
        x_grad = surrogate_times(u, "polynomial", grad)
        total, through = grad.sum(dtype=alpha.dtype), x_grad.sum(dtype=alpha.dtype)
        alpha_grad = (hard_sign(u) * grad).sum(dtype=alpha.dtype) - (u * x_grad).sum(dtype=alpha.dtype)
        if ctx.centre_scaled:
            alpha_grad, beta_grad = alpha_grad + beta * total, alpha * total - through
        else:
            alpha_grad, beta_grad = alpha_grad.reshape(1), (total - through).reshape(1)
        return x_grad.to(x.dtype), alpha_grad, beta_grad, None


@method("adabin")
class AdaBin(Binarizer):
    """AdaBin: adaptive binary sets.

    - weights, per filter: mu = mean(w), sigma = sqrt(mean((w - mu)^2)), w_b = sigma sign((w - mu) / sigma) + mu, with EDE's
      gradient at the sign (t from 0.001 to 10 over the run, see ``ede_at``) and the exact one through mu and sigma. The
      sigma of a constant filter counts as 1.
    - inputs: a_b = alpha sign((a - beta) / alpha) + beta with learned alpha and beta, one of each a layer, started at 1 and
      0; Bi-Real's polynomial gradient at the sign.

    Two values a filter, but not opposite ones: a network in use needs the sum of each window beside its bit count. The
    method's nonlinearity is ``binary.activation=maxout``.

    Source: Tu et al., AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets (ECCV 2022).
    The authors' released code gives alpha (sign(.) + beta) for inputs; ``adabin_released`` is that.
    """

    LOWEST_T: ClassVar[float] = 0.001
    centre_scaled: ClassVar[bool] = False

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__(weight, channel_dim=channel_dim, groups=groups)
        self.alpha = nn.Parameter(torch.ones(1, device=weight.device))
        self.beta = nn.Parameter(torch.zeros(1, device=weight.device))

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        return ede_at(progress, lowest_t=cls.LOWEST_T)

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "two_valued"

    def binarize_weight(self, weight: Tensor) -> Tensor:
        mean, deviation = filter_statistics(weight, unbiased=False)
        return BinarySetWeight.apply(weight, mean, deviation, self.phase)

    def binarize_input(self, x: Tensor) -> Tensor:
        return BinarySetInput.apply(x, self.alpha, self.beta, self.centre_scaled)

    def input_saturation(self, x: Tensor) -> Tensor:
        u = (at_least_fp32(x) - self.beta) / self.alpha
        return (u.abs() >= 1.0).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        mean, deviation = filter_statistics(weight, unbiased=False)
        return ede_saturation((at_least_fp32(weight) - mean) / deviation, self.phase)

    def weight_signs(self, weight: Tensor) -> Tensor:
        mean, _ = filter_statistics(weight, unbiased=False)
        return weight >= mean


@method("adabin_released")
class AdaBinReleased(AdaBin):
    """AdaBin as its authors released it: a_b = alpha (sign((a - beta) / alpha) + beta)."""

    centre_scaled: ClassVar[bool] = True
