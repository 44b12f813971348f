"""The DeepSpeed engine: ZeRO stages 0, 1 and 2, with the quantized all-reduce or reduce-scatter in place of its own reduction."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.comm import Reducer, Slot
from cyclebnn_dist.comm.traffic import trained_buckets
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig
from cyclebnn_dist.engine import zero
from cyclebnn_dist.engine.ddp import AUTOCAST_DTYPE, lower_loss_scale, refuse_fp16_on_cpu
from cyclebnn_dist.engine.deepspeed_config import check_by_deepspeed, deepspeed_config
from cyclebnn_dist.engine.departures import Departures
from cyclebnn_dist.engine.partition import gather_state_by_name, load_state_by_name
from cyclebnn_dist.engine.zero_groups import numels_of, slots_of_optimizer, split_groups, weight_bytes
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
"""Copies of buckets that exist at a time at stage 2, the one that is being made among them."""


class DeepSpeedEngine:
    """See ``Engine``. Gradients are averaged once a step, bucket by bucket during the last of its backward passes.

    From stage 1 on a rank updates its partition alone. If ``reducer`` scatters, it sees the averaged gradient of that
    partition alone, and what it becomes is

    - with 32 bits, element for element that of an all-reduce, and so of DDP: the mean is never encoded, and fp32 holds it;
    - with 16 bits and fewer, another and more exact one: it lacks the second of an all-reduce's two roundings;
    - at any width the same for any size of buckets, and for any borders of partitions.

    Its norm is summed over ranks in fp64, exactly, and agrees with DDP's to the precision of fp32. If ``reducer``
    does not scatter, everything is DDP's to the last bit. At stage 0 every rank sees the whole averaged gradient.
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
        slots: dict[str, Slot] = {}
        if self._stage > 0:
            slots = slots_of_optimizer(model, optimizer, bucket_mb=config.bucket_mb, world_size=world.size)
            split_groups(optimizer, numels_of(model), bucket_mb=config.bucket_mb)
        with zero.in_existing_groups(deepspeed, local_rank=world.device.index or 0):
            for parameter in model.parameters():
                # Of the weights of 1x1 convolutions in channels_last, contiguous() would keep the strides.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=told)[0]
        zero.autocast_forward(self._engine, AUTOCAST_DTYPE.get(amp))
        if self._stage == 0:
            for parameter, stride in zip(model.parameters(), layouts, strict=True):
                strided = torch.empty_strided(parameter.shape, stride, device=parameter.device)
                parameter.data = strided.copy_(parameter.data)
        zero.leave_reduction_to_caller(self._engine)
        named = dict(model.named_parameters())
        self._parameters = [named[parameter.name] for parameter in reducer.layout.parameters]
        self._trained = [p.index for p in reducer.layout.parameters if named[p.name].requires_grad]
        self._groups = zero.partitioned_groups(self._engine, rank=world.rank) if self._stage > 0 else []
        if self._stage > 0:
            by_group: list[dict[nn.Parameter, Slot]] = [{} for _ in self._groups]
            for name, slot in slots.items():
                by_group[slot.group][named[name]] = slot
            zero.check_slots(self._groups, by_group)
        assert not reducer.layout.scattered or self._stage > 0
        self._slots = [slots.get(parameter.name) for parameter in reducer.layout.parameters]
        self._departures = Departures(
            reducer,
            self._parameters,
            trained_buckets(
                reducer.layout,
                bucket_mb=config.bucket_mb,
                trained={n for n, p in named.items() if p.requires_grad},
            ),
            deliver=self._keep_part if self._stage > 0 else self._keep_whole,
            most_under_way=BUCKETS_UNDER_WAY if self._stage == 2 else None,
        )
        self._norms: dict[int, torch.Tensor] = {}
        self._parts: list[torch.Tensor] = []
        if self._stage > 0 and world.is_main and world.size > 1:
            log.info(
                "ZeRO stage %d: gradients are %s; beside them each rank sends %.1f MB of updated weights a step, in fp32",
                self._stage,
                "reduce-scattered"
                if reducer.layout.scattered
                else "all-reduced (engine.reduce_scatter=false)",
                1e-6 * weight_bytes(slots.values(), world_size=world.size),
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
            loss = self._scaler.scale(loss)
            if self._accumulating:
                self._engine.backward(loss, scale_wrt_gas=False)
                return
            if self._stage > 0:
                self._parts = [torch.zeros_like(group.partition) for group in self._groups]
            with self._departures.leaving():
                self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> torch.Tensor:
        norm = self._gradient_norm() / self._scaler.get_scale()
        unscale(self._scaler, self._own_gradients())
        if max_norm > 0:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for gradient in self._own_gradients():
                gradient.mul_(factor)
        return norm

    def step(self, *, skip: bool) -> None:
        self._reducer.finish_step(applied=not skip)
        if not skip:
            self._take_over_weights()
            zero.hand_over_gradients(self._engine, self._parts)
        self._parts = []  # DeepSpeed frees one after the other
        if not skip:
            self._engine.step()
            self._scaler.update()
        else:
            lower_loss_scale(self._scaler)

    def state_dict(self) -> dict[str, Any]:
        if self._stage == 0:
            state = optimizer_state_by_name(self._optimizer)
        else:
            state = gather_state_by_name(self._optimizer, self._groups, world=self._world)
        return {"optimizer": state, "loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The weights of the model must have been restored before: from stage 1 on each rank keeps a copy of its part."""
        self._scaler.load_state_dict(state["loss_scale"])
        if self._stage == 0:
            load_optimizer_state_by_name(self._optimizer, state["optimizer"])
            return
        self._take_over_weights()
        load_state_by_name(self._optimizer, self._groups, state["optimizer"], world=self._world)

    def _take_over_weights(self) -> None:
        """Update from the weights the model has now: a layer may have clamped its own in place (BNext)."""
        for group in self._groups:
            group.partition.data.copy_(group.weights)

    def _own_gradients(self) -> list[torch.Tensor]:
        if self._stage > 0:
            return self._parts
        return [p.grad for p in self._parameters if p.grad is not None]

    def _gradient_norm(self) -> torch.Tensor:
        """Collective: every rank calls this. Norm of the whole averaged gradient, the same on all ranks."""
        if not self._reducer.layout.scattered or self._world.size == 1:
            return torch.linalg.vector_norm(torch.stack([self._norms[index] for index in self._trained]))
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in self._parts]
        squares = torch.stack(parts).square().sum()
        return fsum_over_ranks(squares, world=self._world).sqrt().float()

    def _keep_whole(self, index: int, average: torch.Tensor, shaped: torch.Tensor) -> None:
        """Stage 0: the averaged gradient becomes ``grad`` again."""
        self._parameters[index].grad = shaped
        self._norms[index] = torch.linalg.vector_norm(shaped)

    def _keep_part(self, index: int, average: torch.Tensor, shaped: torch.Tensor) -> None:
        """Stages 1 and 2: what of it falls into this rank's partition is kept, for ``hand_over_gradients``."""
        layout, slot = self._reducer.layout, self._slots[index]
        assert slot is not None
        if not layout.scattered or self._world.size == 1:
            self._norms[index] = torch.linalg.vector_norm(average)
        needed = replace(layout.parameters[index], slot=slot).needed_elements(self._world.rank)
        start = slot.offset + needed.start - self._world.rank * slot.part_numel
        self._parts[slot.group][start : start + len(needed)] = average[needed.start : needed.stop]


def fsum_over_ranks(value: torch.Tensor, *, world: World) -> torch.Tensor:
    """Collective: every rank calls this. Sum of a scalar of every rank, rounded once, so the same on all of them."""
    values = [torch.empty_like(value) for _ in range(world.size)]
    dist.all_gather(values, value)
    return torch.tensor(math.fsum(torch.stack(values).tolist()), dtype=value.dtype, device=value.device)


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
