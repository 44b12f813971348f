"""The protocol every engine keeps, so that the loop cannot tell them apart."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Stateful(Protocol):
    """Anything that carries state over a restart."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine(Protocol):
    """One optimizer step, cut into the calls the loop makes in this order."""

    module: nn.Module
    """The model itself, without any wrapper."""

    def restart_optimizer(self) -> None:
        """Forget moments and counts of updates, as if the optimizer were new; weights and settings stay."""

    def begin_step(self, step: int, *, lr: float, communication_bits: int, first_phase: bool = False) -> None:
        """Fix the learning rate, the weight decay of the phase and the all-reduce width of ``step``."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, num_classes], of images [B, 3, S, S]."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Within it, backward passes only add to the local gradient and nothing is communicated."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of ``loss``; outside ``accumulating`` also average it over ranks."""

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scalar float32 global norm of the averaged gradient, clipped to ``max_norm`` if that is above 0."""

    def step(self, *, skip: bool) -> None:
        """Update the weights, or ``skip`` it: on all ranks alike, since a rank's gradient is not finite."""

    def state_dict(self) -> dict[str, Any]:
        """Collective: every rank calls this. What is equal on all ranks: optimizer by parameter name, loss scale.

        Rank 0's is whole; where ranks share out the optimizer's state, the others have none of it.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ``state_dict`` of rank 0 of any engine, after the weights of the model have been restored."""
