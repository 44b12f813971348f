"""The rounds of ``bench comm``: one launch on one rank, every variant once a round, in an order drawn anew."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from cyclebnn_dist.bench.gradients import (
    exact_mean,
    gradient_of,
    group_in_buckets,
    named_parameters,
    relative_error,
)
from cyclebnn_dist.bench.limits import codec_seconds, link_rate, wait_for_device
from cyclebnn_dist.bench.variants import Variant, choose_variants
from cyclebnn_dist.comm import Reducer, build_reducer
from cyclebnn_dist.comm.verdict import measure_and_judge
from cyclebnn_dist.config.recipe import CommConfig
from cyclebnn_dist.world import World, gather_objects, on_main

log = logging.getLogger(__name__)

LEAST_ROUNDS, MOST_ROUNDS, CODEC_REPEATS = 3, 50, 2


@dataclass(frozen=True)
class Settings:
    """What a launch measures.

    Attributes:
        variants: names.
        until: when to end, in seconds of ``time.time``; one round to warm up and three that count are done in any case.
        launch: its place among the launches; orders are drawn from it.
        interface: whose bytes are counted as well, where it carries those of one rank only.
    """

    benchmark: ClassVar[str] = "comm"

    numel: int
    variants: tuple[str, ...]
    bucket_mb: float
    until: float = 0.0
    launch: int = 0
    interface: str | None = None


class Gradients:
    """A rank's gradient and the buckets it is averaged in, which are parts of one flat tensor."""

    def __init__(self, settings: Settings, world: World) -> None:
        self.named = named_parameters(settings.numel)
        sizes = [tensor.numel() for _, tensor in self.named]
        self.bucket_mb = settings.bucket_mb
        self.buckets = group_in_buckets(sizes, bucket_mb=settings.bucket_mb)
        self.flat = torch.empty(settings.numel, device=world.device)
        self.flats = self.flat.split([sum(sizes[index] for index in bucket) for bucket in self.buckets])
        self._source = gradient_of(world.rank, settings.numel).to(world.device)

    def reset(self) -> None:
        """Make the flat tensor this rank's gradient again."""
        self.flat.copy_(self._source)


class Contenders:
    """The variants ready to run: the reducers behind them, one for each codec."""

    def __init__(self, variants: tuple[Variant, ...], gradients: Gradients, world: World) -> None:
        """Collective: every rank calls this."""
        self._gradients, self._world = gradients, world
        self._reducers: dict[CommConfig, Reducer] = {}
        self._ring_bytes = {variant.bits: 0.0 for variant in variants if variant.comm is None}
        self._step = 0
        for variant in variants:
            if variant.comm is not None and variant.comm not in self._reducers:
                self._reducers[variant.comm] = build_reducer(
                    variant.comm,
                    gradients.named,
                    rank=world.rank,
                    world_size=world.size,
                    seed=0,
                    device=world.device,
                )

    def reduce(self, variant: Variant) -> None:
        """Collective: every rank calls this. Average all buckets in place, as many under way as there are."""
        gradients, world = self._gradients, self._world
        if variant.comm is None:
            _torch_all_reduce(gradients.flats, bits=variant.bits, world_size=world.size)
            share = (world.size - 1) / world.size
            self._ring_bytes[variant.bits] += 2 * share * gradients.flat.numel() * variant.bits / 8
        else:
            reducer = self._reducers[variant.comm]
            reducer.begin_step(self._step, variant.bits)
            self._step += 1
            futures = [
                reducer.reduce_flat(flat, parameters=bucket)
                for flat, bucket in zip(gradients.flats, gradients.buckets, strict=True)
            ]
            for future in futures:
                future.wait()
            reducer.check()
        wait_for_device(world.device)

    def judge(self, variants: Sequence[Variant]) -> dict[str, Any] | None:
        """Collective: every rank calls this. The verdict of ``comm.mode: auto`` between casts and the middle width there is."""
        widths = [variant for variant in variants if variant.comm == CommConfig() and variant.bits <= 8]
        if not widths:
            return None
        chosen = widths[len(widths) // 2]
        verdict = measure_and_judge(
            self._reducers[CommConfig()],
            {chosen.bits: 1},
            world=self._world,
            bucket_mb=self._gradients.bucket_mb,
        )
        return {"quantized": chosen.name, "mode": verdict.mode, "reckoned_seconds": verdict.seconds}

    def counters(self, variant: Variant) -> dict[str, float]:
        """Those of the variant's reducer; of torch's all-reduce, which counts nothing, the bytes of a ring."""
        if variant.comm is None:
            return {"sent_bytes": self._ring_bytes[variant.bits]}
        return self._reducers[variant.comm].counters.state_dict()

    def close(self) -> None:
        """Leave the reducers' groups."""
        for reducer in self._reducers.values():
            reducer.close()


def measure_launch(world: World, settings: Settings) -> dict[str, Any]:
    """Collective: every rank calls this. One launch; the same plain values on every rank.

    Returns:
        ``link_bytes_per_second``, ``rounds``, and for each of ``variants``: ``seconds`` of each round (the slowest rank's),
        ``sent_bytes`` (the largest rank's), ``nic_bytes`` (or None), ``nmse``, ``codec_seconds`` (the slowest rank's),
        ``codec_core_seconds`` (the mean; none on GPUs), and ``parts``: seconds of an all-reduce by the reducer's own counters;
        and ``auto``: what ``comm.mode: auto`` takes here, or None where no width of the default codec is measured.
    """
    rate = link_rate(world)
    variants = choose_variants(settings.variants)
    gradients = Gradients(settings, world)
    contenders = Contenders(variants, gradients, world)
    errors = _errors(world, settings, variants, gradients, contenders)
    codec = {
        variant.name: [
            codec_seconds(world, partial(contenders.reduce, variant)) for _ in range(CODEC_REPEATS)
        ]
        for variant in variants
        if variant.comm is not None
    }
    auto = contenders.judge(variants)
    samples: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    order, generator = list(variants), random.Random(settings.launch)
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and not on_main(world, lambda: time.time() < settings.until):
            break
        generator.shuffle(order)
        for variant in order:
            gradients.reset()
            before = contenders.counters(variant)
            seconds, nic = _timed(world, partial(contenders.reduce, variant), settings)
            after = contenders.counters(variant)
            spent = {name: value - before[name] for name, value in after.items()}
            samples[variant.name].append({**spent, "seconds": seconds, "nic_bytes": nic})
    contenders.close()
    if world.is_main:
        log.info("%d rounds of %d variants", len(samples[variants[0].name]), len(variants))
    everyone = gather_objects(world, (samples, codec))
    return {
        "link_bytes_per_second": rate,
        "rounds": len(samples[variants[0].name]),
        "auto": auto,
        "variants": {
            variant.name: {
                **_merge([ours[variant.name] for ours, _ in everyone]),
                **_merge_codec(
                    [ours.get(variant.name) for _, ours in everyone], on_cores=world.device.type == "cpu"
                ),
                "nmse": errors[variant.name],
            }
            for variant in variants
        },
    }


def _errors(
    world: World,
    settings: Settings,
    variants: tuple[Variant, ...],
    gradients: Gradients,
    contenders: Contenders,
) -> dict[str, float]:
    """Collective: every rank calls this. Error of each variant's first result; it also warms every variant up."""
    mean = exact_mean(world.size, settings.numel) if world.is_main else None
    errors = {}
    for variant in variants:
        gradients.reset()
        contenders.reduce(variant)
        if mean is not None:
            errors[variant.name] = relative_error(gradients.flat.cpu(), mean)
    return gather_objects(world, errors)[0]


def _torch_all_reduce(flats: Sequence[torch.Tensor], *, bits: int, world_size: int) -> None:
    """Collective: every rank calls this. Average in place by torch alone, in fp32 or (16 bits) bf16."""
    sent = flats if bits == 32 else [flat.to(torch.bfloat16) for flat in flats]
    works = [dist.all_reduce(flat, async_op=True) for flat in sent]
    for flat, mean, work in zip(flats, sent, works, strict=True):
        work.wait()
        torch.div(mean, world_size, out=flat)


def _timed(world: World, run: Callable[[], None], settings: Settings) -> tuple[float, float]:
    """Collective: every rank calls this. Seconds of ``run`` on this rank, and bytes its interface sent (NaN: not known)."""
    dist.barrier(group=world.control)
    wait_for_device(world.device)
    before = interface_bytes(settings.interface)
    begun = time.perf_counter()
    run()
    seconds = time.perf_counter() - begun
    dist.barrier(group=world.control)
    return seconds, interface_bytes(settings.interface) - before


def interface_bytes(interface: str | None) -> float:
    """Bytes that a network interface has sent so far, frames included; NaN without one."""
    if interface is None:
        return float("nan")
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, fields = line.strip().partition(":")
        if name == interface:
            return float(fields.split()[8])
    raise RuntimeError(f"this process sees no network interface {interface}")


def _merge(ranks: list[list[dict[str, float]]]) -> dict[str, Any]:
    """One variant's samples ``[rank][round]``, over ranks: the slowest one's seconds, the largest one's bytes."""
    rounds = list(zip(*ranks, strict=True))
    nic = [max(rank["nic_bytes"] for rank in each) for each in rounds]
    parts = {name for name in ranks[0][0] if name.endswith("_seconds") and name != "wait_seconds"}
    return {
        "seconds": [max(rank["seconds"] for rank in each) for each in rounds],
        "sent_bytes": max(round(rank["sent_bytes"]) for rank in rounds[0]),
        "nic_bytes": None if nic[0] != nic[0] else sorted(nic)[len(nic) // 2],
        "parts": {
            name: sum(max(rank[name] for rank in each) for each in rounds) / len(rounds)
            for name in sorted(parts)
        },
    }


def _merge_codec(ranks: list[list[tuple[float, float]] | None], *, on_cores: bool) -> dict[str, Any]:
    """One variant's codec times ``[rank][repeat]``, over ranks."""
    measured = [rank for rank in ranks if rank is not None]
    repeats = list(zip(*measured, strict=True))
    return {
        "codec_seconds": [max(clock for clock, _ in each) for each in repeats],
        "codec_core_seconds": [sum(core for _, core in each) / len(each) for each in repeats if on_cores],
    }
