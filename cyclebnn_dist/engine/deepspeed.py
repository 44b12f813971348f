"""The DeepSpeed engine: ZeRO stages 0, 1 and 2, with the quantized all-reduce in place of DeepSpeed's own reduction."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from cyclebnn_dist.comm import Reducer
from cyclebnn_dist.comm.traffic import assumed_buckets
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig
from cyclebnn_dist.engine import zero
from cyclebnn_dist.engine.ddp import AUTOCAST_DTYPE, lower_loss_scale, refuse_fp16_on_cpu
from cyclebnn_dist.engine.deepspeed_config import check_by_deepspeed, deepspeed_config
from cyclebnn_dist.engine.partition import gather_state_by_name, load_state_by_name
from cyclebnn_dist.optimizer import (
    forget_updates,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    set_learning_rate,
    set_weight_decay,
)
from cyclebnn_dist.world import World, share_refusal

log = logging.getLogger(__name__)

BUCKETS_UNDER_WAY = 2
"""Copies of buckets that exist at a time at stage 0, beside the one that is being made."""


class DeepSpeedEngine:
    """See ``Engine``. Every rank sees the whole averaged gradient; from stage 1 on it updates its partition alone.

    Gradients are averaged once a step, after the last of its backward passes; at stage 2 in the midst of that pass,
    unless gradients of earlier passes wait to be averaged with it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reducer: Reducer,
        *,
        config: EngineConfig,
        amp: Literal["fp32", "bf16", "fp16"],
        world: World,
    ) -> None:
        """Collective: every rank calls this. Weights of rank 0 become everyone's.

        Raises:
            RecipeError: on every rank, for fp16 without a GPU, if one has a DeepSpeed that this has not been tested with,
                or if DeepSpeed refuses ``engine.deepspeed``.
        """
        refuse_fp16_on_cpu(amp, world.device)
        self.module = model
        self._optimizer = optimizer
        self._reducer = reducer
        self._world = world
        self._stage = config.zero_stage
        self._accumulating = False
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=amp == "fp16")
        told = deepspeed_config(config)
        deepspeed = open_everywhere(world, told)
        layouts = [parameter.stride() for parameter in model.parameters()]
        with zero.in_existing_groups(deepspeed, local_rank=world.device.index or 0):
            for parameter in model.parameters():
                parameter.data = parameter.data.contiguous()
            self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=told)[0]
        zero.autocast_forward(self._engine, AUTOCAST_DTYPE.get(amp))
        if self._stage == 0:
            for parameter, stride in zip(model.parameters(), layouts, strict=True):
                strided = torch.empty_strided(parameter.shape, stride, device=parameter.device)
                parameter.data = strided.copy_(parameter.data)
        zero.leave_reduction_to_caller(self._engine, average=self._average_bucket)
        named = dict(model.named_parameters())
        self._parameters = [named[parameter.name] for parameter in reducer.layout.parameters]
        self._index = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._trained = [i for i, parameter in enumerate(self._parameters) if parameter.requires_grad]
        buckets = (
            [index for index in bucket if self._parameters[index].requires_grad]
            for bucket in assumed_buckets(reducer.layout, bucket_mb=config.bucket_mb)
        )
        self._buckets = [bucket for bucket in buckets if bucket]
        self._norms: dict[int, torch.Tensor] = {}
        if self._stage > 0 and world.is_main and world.size > 1:
            numel = sum(self._parameters[index].numel() for index in self._trained)
            log.info(
                "ZeRO stage %d: beside its gradients each rank sends %.1f MB of updated weights a step, in fp32",
                self._stage,
                4e-6 * numel * (world.size - 1) / world.size,
            )

    def restart_optimizer(self) -> None:
        forget_updates(self._optimizer)

    def begin_step(self, step: int, *, lr: float, communication_bits: int, first_phase: bool = False) -> None:
        set_learning_rate(self._optimizer, lr)
        set_weight_decay(self._optimizer, first_phase=first_phase)
        self._reducer.begin_step(step, communication_bits, loss_scale=self._scaler.get_scale())
        self._norms = {}
        for parameter in self._parameters:
            parameter.grad = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._engine(images).float()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def backward(self, loss: torch.Tensor) -> None:
        with self._reducer.reraising():
            if self._stage > 0 and self._accumulating:
                zero.hold_back_reduction(self._engine)
            self._engine.backward(self._scaler.scale(loss), scale_wrt_gas=False)
            if self._accumulating:
                return
            if self._stage > 0:
                zero.reduce_held_back(self._engine)
            else:
                self._average_gradients()
        absent = [self._reducer.layout.parameters[i].name for i in self._trained if i not in self._norms]
        if absent:
            raise RuntimeError(f"parameters that take no part in the loss: {', '.join(absent)}")

    def clip(self, max_norm: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(torch.stack([self._norms[index] for index in self._trained]))
        norm = norm / self._scaler.get_scale()
        unscale(self._scaler, self._own_gradients())
        if max_norm > 0:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for gradient in self._own_gradients():
                gradient.mul_(factor)
        return norm

    def step(self, *, skip: bool) -> None:
        self._reducer.finish_step(applied=not skip)
        if not skip:
            self._engine.step()
            self._scaler.update()
            return
        lower_loss_scale(self._scaler)
        if self._stage > 0:
            zero.discard_gradients(self._engine)

    def state_dict(self) -> dict[str, Any]:
        if self._stage == 0:
            state = optimizer_state_by_name(self._optimizer)
        else:
            groups = zero.partitioned_groups(self._engine, rank=self._world.rank)
            state = gather_state_by_name(self._optimizer, groups, world=self._world)
        return {"optimizer": state, "loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The weights of the model must have been restored before: from stage 1 on each rank keeps a copy of its part."""
        self._scaler.load_state_dict(state["loss_scale"])
        if self._stage == 0:
            load_optimizer_state_by_name(self._optimizer, state["optimizer"])
            return
        groups = zero.partitioned_groups(self._engine, rank=self._world.rank)
        for group in groups:
            group.partition.data.copy_(group.weights)
        load_state_by_name(self._optimizer, groups, state["optimizer"], world=self._world)

    def _own_gradients(self) -> list[torch.Tensor]:
        if self._stage > 0:
            return zero.own_gradients(self._engine)
        return [p.grad for p in self._parameters if p.grad is not None]

    def _average_bucket(self, flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Collective: every rank calls this. Average a bucket of ZeRO's in place."""
        indices = [self._index[id(parameter)] for parameter in parameters]
        self._reducer.reduce_flat(flat, parameters=indices).wait()
        for index, part in zip(indices, flat.split([p.numel() for p in parameters]), strict=True):
            self._norms[index] = torch.linalg.vector_norm(part)

    def _average_gradients(self) -> None:
        """Collective: every rank calls this. Average ``grad`` of all parameters in place; no-one does it at stage 0."""
        under_way: list[tuple[torch.futures.Future[torch.Tensor], list[torch.Tensor]]] = []
        for bucket in self._buckets:
            gradients = [
                in_memory_order(gradient)
                for gradient in (self._parameters[index].grad for index in bucket)
                if gradient is not None
            ]
            if len(gradients) < len(bucket):
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            under_way.append((self._reducer.reduce_flat(flat, parameters=bucket), gradients))
            if len(under_way) > BUCKETS_UNDER_WAY:
                write_back(*under_way.pop(0))
        for future, gradients in under_way:
            write_back(future, gradients)
        for index in self._trained:
            averaged = self._parameters[index].grad
            if averaged is not None:
                self._norms[index] = torch.linalg.vector_norm(averaged)


def open_everywhere(world: World, told: dict[str, Any]) -> Any:
    """Collective: every rank calls this. The package, or the refusal of the first rank that has another one.

    Args:
        told: what ``deepspeed.initialize`` will be told, which the package checks first.

    Raises:
        RecipeError: on every rank.
    """
    deepspeed, refusal = None, None
    try:
        deepspeed = zero.open_deepspeed(world.device)
        check_by_deepspeed(told)
    except RecipeError as error:
        refusal = error
    share_refusal(world, refusal)
    return deepspeed


def write_back(future: torch.futures.Future[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Wait for an averaged bucket and copy it to where its gradients came from."""
    parts = future.wait().split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def unscale(scaler: torch.amp.GradScaler, gradients: Sequence[torch.Tensor]) -> None:
    """Divide gradients by the loss scale in place, and let the scaler note whether they are finite, as for an optimizer's.

    They are those of a rank's own part, which from stage 1 on no parameter of its optimizer has for ``grad``.
    """
    if not scaler.is_enabled():
        return
    holders = []
    for gradient in [*gradients, torch.zeros(1, device=scaler._device)]:
        holder = gradient.detach()
        holder.grad = gradient
        holders.append(holder)
    scaler.unscale_(SimpleNamespace(param_groups=[{"params": holders}]))  # type: ignore[arg-type]


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor whose dimensions go from the widest stride to the narrowest, as DDP lays out its buckets."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
