"""The buffers of a model: local to a rank while it trains, averaged over ranks wherever it is evaluated or kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from cyclebnn_dist.world import World, mean_in_rank_order


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of the model's state (normalization statistics, activation ranges), by name."""
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def averaged_buffers(model: nn.Module, *, world: World) -> dict[str, torch.Tensor]:
    """Collective: every rank calls this. Mean over ranks of every floating buffer; integer ones are rank-equal.

    The model is not changed.
    """
    buffers = persistent_buffers(model)
    floating = {name: b for name, b in buffers.items() if b.is_floating_point()}
    result = {name: b.detach().clone() for name, b in buffers.items() if name not in floating}
    if floating:
        flat = torch.cat([b.detach().float().cpu().reshape(-1) for b in floating.values()])
        mean = mean_in_rank_order(world, flat)
        for (name, b), part in zip(
            floating.items(), mean.split([b.numel() for b in floating.values()]), strict=True
        ):
            result[name] = part.reshape(b.shape).to(device=b.device, dtype=b.dtype)
    return result


def load_buffers(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy ``values`` into the model's buffers of the same names."""
    for name, buffer in persistent_buffers(model).items():
        buffer.detach().copy_(values[name])


@contextmanager
def using_buffers(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it the model has ``values`` for buffers; afterwards it has its own again."""
    own = {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()}
    load_buffers(model, values)
    try:
        yield
    finally:
        load_buffers(model, own)


def model_state(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state dict, not copied, with ``buffers`` in place of its own."""
    return {name: buffers.get(name, tensor).detach() for name, tensor in model.state_dict().items()}
