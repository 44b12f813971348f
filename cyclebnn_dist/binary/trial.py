"""The trial: images through a model that is afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def trial_forward(model: nn.Module, *, input_size: tuple[int, int, int]) -> torch.Tensor:
    """Logits of one image of noise, in evaluation mode, uncompiled; the model is afterwards as before."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *input_size, generator=generator).to(
        device=parameter.device, dtype=parameter.dtype
    )
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(image)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward passes without gradients within; buffers and torch's random generators are afterwards as before."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.no_grad():
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def first_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """What a module was called with, in order or by name, as its hooks see it."""
    return inputs[0] if inputs else next(iter(named.values()))
