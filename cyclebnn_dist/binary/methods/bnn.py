"""BNN: plain signs."""

from __future__ import annotations

import torch
from torch import Tensor

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import BoxSign, SignWithSurrogate


@method("bnn")
class BNN(Binarizer):
    """Plain signs: w_b = sign(w), a_b = sign(a); both gradients pass where |x| <= 1.

    Source: Courbariaux, Hubara et al., Binarized Neural Networks (2016), equations 1 and 4 (straight-through with hard
    tanh). Weights are not clipped to [-1, 1] here: outside the box their gradient is 0.
    """

    def binarize_weight(self, weight: Tensor) -> Tensor:
        return SignWithSurrogate.apply(weight, "clip")

    def binarize_input(self, x: Tensor) -> Tensor:
        return BoxSign.apply(x, 1.0)

    def input_saturation(self, x: Tensor) -> Tensor:
        return (x.abs() > 1.0).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        return (weight.abs() > 1.0).mean(dtype=torch.float32)
