"""The rounds of ``bench engines``: on one rank, every variant once a round, in an order drawn anew."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.bench.engine_variants import Variant, choose_variants
from cyclebnn_dist.bench.limits import wait_for_device
from cyclebnn_dist.binary import parameter_kinds, set_widths
from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.config.recipe import BinaryConfig, CommConfig, ModelConfig, OptimConfig
from cyclebnn_dist.engine import DDPEngine, DeepSpeedEngine, Engine
from cyclebnn_dist.engine.zero_groups import scatters, slots_of_optimizer
from cyclebnn_dist.world import World, gather_objects, on_main

LEAST_ROUNDS, MOST_ROUNDS = 3, 50
FORWARD_BITS, BACKWARD_BITS = 4, 8
CLASSES = 1000


@dataclass(frozen=True)
class Settings:
    """What a launch measures.

    Attributes:
        variants: names.
        batch: images of a rank.
        until: when to end, in seconds of ``time.time``; one round to warm up and three that count are done in any case.
    """

    benchmark: ClassVar[str] = "engines"

    variants: tuple[str, ...]
    model: str
    batch: int
    image_size: int
    bucket_mb: float
    until: float


class Contender:
    """A variant ready to run: a model of its own, with the engine, the optimizer and the reducer that train it."""

    def __init__(self, variant: Variant, settings: Settings, world: World) -> None:
        """Collective: every rank calls this."""
        from cyclebnn_dist.models import build_model  # loads timm: only ranks shall wait for it
        from cyclebnn_dist.optimizer import build_optimizer

        self.variant = variant
        self._world, self._step = world, 0
        self._before = _allocated(world.device)
        torch.manual_seed(0)
        model, _ = build_model(
            ModelConfig(name=settings.model, num_classes=CLASSES),
            BinaryConfig(method="cyclebnn"),
            image_size=settings.image_size,
        )
        set_widths(model, forward_bits=FORWARD_BITS, backward_bits=BACKWARD_BITS)
        self.model = model.to(world.device)
        self.optimizer = build_optimizer(self.model, OptimConfig(), kinds=parameter_kinds(self.model))
        self._reducer = build_reducer(
            CommConfig(),
            self.model.named_parameters(),
            rank=world.rank,
            world_size=world.size,
            seed=0,
            device=world.device,
            slots=slots_of_optimizer(
                self.model, self.optimizer, bucket_mb=settings.bucket_mb, world_size=world.size
            )
            if scatters(variant.engine)
            else None,
        )
        self._engine = _build_engine(self.model, self.optimizer, self._reducer, variant=variant, world=world)
        generator = torch.Generator().manual_seed(world.rank)
        shape = (settings.batch, 3, settings.image_size, settings.image_size)
        self._images = torch.randn(shape, generator=generator).to(world.device)
        self._labels = torch.randint(CLASSES, shape[:1], generator=generator).to(world.device)
        self.held: dict[str, int] = {}

    def train(self) -> None:
        """Collective: every rank calls this. A step of each of the variant's widths."""
        for bits in self.variant.widths:
            self._engine.begin_step(self._step, lr=1e-3, communication_bits=bits)
            loss = nn.functional.cross_entropy(self._engine.forward(self._images), self._labels)
            self._engine.backward(loss)
            self._engine.clip(0.0)
            if not self.held and self._step:  # from the second step on there is a state of the optimizer
                self.held = self._held_bytes()
            self._engine.step(skip=False)
            self._step += 1
        wait_for_device(self._world.device)

    @property
    def sent_bytes(self) -> int:
        """Of gradients, so far."""
        return self._reducer.counters.sent_bytes

    @property
    def weight_bytes(self) -> int:
        """Of updated weights, a step: ZeRO's all-gather of the parts that ranks have updated."""
        if self.variant.engine.zero_stage == 0:
            return 0
        parts = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return (self._world.size - 1) * sum(part.numel() * part.element_size() for part in parts)

    @property
    def peak_bytes(self) -> int | None:
        """Most that this variant has had allocated on its GPU, activations included; None on a CPU."""
        if self._world.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._world.device) - self._before

    def close(self) -> None:
        """Leave the reducer's group."""
        self._reducer.close()

    def _held_bytes(self) -> dict[str, int]:
        """Bytes of this rank's storages once gradients are averaged: weights, gradients, and what the optimizer keeps.

        To the last belong the copies of weights that ZeRO updates in place of them.
        """
        seen: set[int] = set()
        weights = _new_bytes(self.model.parameters(), seen)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if isinstance(self._engine, DeepSpeedEngine):
            gradients += self._engine._own_gradients()
        kept = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for state in self.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return {
            "weights": weights,
            "gradients": _new_bytes(gradients, seen),
            "optimizer": _new_bytes(kept, seen),
        }


def _build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, reducer: Any, *, variant: Variant, world: World
) -> Engine:
    config = variant.engine
    if config.name == "ddp":
        return DDPEngine(model, optimizer, reducer, config=config, amp="fp32", device=world.device)
    return DeepSpeedEngine(model, optimizer, reducer, config=config, amp="fp32", world=world)


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages of ``tensors`` that have not been ``seen``; they have then."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def measure_engines(world: World, settings: Settings) -> dict[str, Any]:
    """Collective: every rank calls this. One launch; the same plain values on every rank.

    Returns:
        ``rounds``, ``parameters`` and for each of ``variants``: ``seconds`` a step in each round (the slowest rank's),
        ``sent_bytes`` and ``weight_bytes`` a step, ``held`` and ``peak_bytes`` (the largest rank's).
    """
    variants = choose_variants(settings.variants, bucket_mb=settings.bucket_mb)
    contenders, peaks = [], {}
    for variant in variants:
        contender = Contender(variant, settings, world)
        contender.train()
        contenders.append(contender)
        peaks[variant.name] = contender.peak_bytes
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    sent: dict[str, float] = {}
    order, generator = list(contenders), random.Random(0)
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and not on_main(world, lambda: time.time() < settings.until):
            break
        generator.shuffle(order)
        for contender in order:
            name, steps = contender.variant.name, len(contender.variant.widths)
            before = contender.sent_bytes
            dist.barrier(group=world.control)
            begun = time.perf_counter()
            contender.train()
            seconds[name].append((time.perf_counter() - begun) / steps)
            dist.barrier(group=world.control)
            sent[name] = (contender.sent_bytes - before) / steps
    own = {
        contender.variant.name: {
            "seconds": seconds[contender.variant.name],
            "sent_bytes": sent[contender.variant.name],
            "weight_bytes": contender.weight_bytes,
            "held": contender.held,
            "peak_bytes": peaks[contender.variant.name],
        }
        for contender in contenders
    }
    for contender in contenders:
        contender.close()
    everyone = gather_objects(world, own)
    return {
        "rounds": len(next(iter(seconds.values()))),
        "parameters": sum(parameter.numel() for parameter in contenders[0].model.parameters()),
        "variants": {
            variant.name: _merge([ranks[variant.name] for ranks in everyone]) for variant in variants
        },
    }


def _merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One variant's measurements over ranks: the slowest one's seconds of each round, otherwise the largest."""
    largest = max(ranks, key=lambda rank: sum(rank["held"].values()))
    return {
        "seconds": [max(each) for each in zip(*(rank["seconds"] for rank in ranks), strict=True)],
        "sent_bytes": max(rank["sent_bytes"] for rank in ranks),
        "weight_bytes": max(rank["weight_bytes"] for rank in ranks),
        "held": largest["held"],
        "peak_bytes": None if largest["peak_bytes"] is None else max(rank["peak_bytes"] for rank in ranks),
    }
