"""The DDP engine: torch DistributedDataParallel with the quantized all-reduce as its communication hook."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cyclebnn_dist.comm import Reducer, register_hook
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig
from cyclebnn_dist.optimizer import (
    forget_updates,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    set_learning_rate,
    set_weight_decay,
)

AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DDPEngine:
    """See ``Engine``. Buffers stay local to a rank; the reducer averages gradients at the width of the step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reducer: Reducer,
        *,
        config: EngineConfig,
        amp: Literal["fp32", "bf16", "fp16"],
        device: torch.device,
    ) -> None:
        """Collective: every rank calls this. Weights of rank 0 become everyone's.

        Raises:
            RecipeError: for fp16 without a GPU.
        """
        refuse_fp16_on_cpu(amp, device)
        self.module = model
        self._optimizer = optimizer
        self._reducer = reducer
        self._device = device
        self._autocast_dtype = AUTOCAST_DTYPE.get(amp)
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        with warnings.catch_warnings():
            # Torch 2.13 renames the flag, to one that 2.11 does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._wrapped = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.bucket_mb,
                find_unused_parameters=config.find_unused_parameters,
            )
        register_hook(self._wrapped, reducer)

    def restart_optimizer(self) -> None:
        forget_updates(self._optimizer)

    def begin_step(self, step: int, *, lr: float, communication_bits: int, first_phase: bool = False) -> None:
        set_learning_rate(self._optimizer, lr)
        set_weight_decay(self._optimizer, first_phase=first_phase)
        self._reducer.begin_step(step, communication_bits, loss_scale=self._scaler.get_scale())
        self._optimizer.zero_grad(set_to_none=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
        ):
            logits = self._wrapped(images)
        return logits.float()

    def accumulating(self) -> AbstractContextManager[None]:
        return self._wrapped.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        with self._reducer.reraising():
            self._scaler.scale(loss).backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        self._scaler.unscale_(self._optimizer)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, *, skip: bool) -> None:
        self._reducer.finish_step(applied=not skip)
        if skip:
            lower_loss_scale(self._scaler)
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": optimizer_state_by_name(self._optimizer),
            "loss_scale": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer_state_by_name(self._optimizer, state["optimizer"])
        self._scaler.load_state_dict(state["loss_scale"])


def refuse_fp16_on_cpu(amp: str, device: torch.device) -> None:
    """Refuse arithmetic that only GPUs are fast at, and that needs a loss scale.

    Raises:
        RecipeError: for fp16 without a GPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise RecipeError("train.amp", "fp16 needs a GPU", "use train.amp=bf16 or fp32 on a CPU")


def lower_loss_scale(scaler: torch.amp.GradScaler) -> None:
    """Back off as after an overflow, whatever this rank has found itself: scales that differ would part the ranks."""
    if not scaler.is_enabled():
        return
    backed_off = scaler.get_scale() * scaler.get_backoff_factor()
    scaler.update(backed_off)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
