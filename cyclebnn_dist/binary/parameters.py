"""The parameters of a model by kind: latent binary weights, real weights, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from torch import nn

from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear

ParameterKind = Literal["binary", "real", "other"]


def binary_modules(model: nn.Module) -> Iterator[tuple[str, BinaryConv2d | BinaryLinear]]:
    """Every binary layer with its qualified name; its latent weight is ``module.weight``."""
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d | BinaryLinear):
            yield name, module


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """Kind of every parameter, by the name ``model.named_parameters()`` gives it.

    binary: latent weights of binary layers. real: other weights of two dimensions and more. other: what is not decayed
    by custom: norms, biases, scales, and what the model lists in ``no_weight_decay()`` (position embeddings).
    """
    latent = {id(module.weight) for _, module in binary_modules(model)}
    exempt: Collection[str] = getattr(model, "no_weight_decay", frozenset)()
    kinds: dict[str, ParameterKind] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in latent:
            kinds[name] = "binary"
        elif parameter.dim() < 2 or name in exempt or name.endswith(".bias"):
            kinds[name] = "other"
        else:
            kinds[name] = "real"
    return kinds
