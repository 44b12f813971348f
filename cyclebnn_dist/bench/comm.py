"""``cyclebnn bench comm``: what averaging gradients takes at every width, on shaped, local or real networks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from cyclebnn_dist.bench.comm_rounds import Settings, measure_launch
from cyclebnn_dist.bench.comm_summary import summarize
from cyclebnn_dist.bench.gradients import LEAST_NUMEL, RESNET50_NUMEL
from cyclebnn_dist.bench.layers import describe_machine
from cyclebnn_dist.bench.local_ranks import launch_ranks
from cyclebnn_dist.bench.namespaces import INTERFACE, shaped_networks
from cyclebnn_dist.bench.variants import choose_variants
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.world import World, discover_world, gather_objects, join_world, leave_world, on_main

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 600.0
SPARE = 1.25
"""Another launch begins while all of them together are expected to take at most this many times the seconds asked for."""


def bench_comm(
    *,
    ranks: int | None = None,
    rate: str | None = None,
    unshaped: bool = False,
    variants: Sequence[str] | None = None,
    numel: int = RESNET50_NUMEL,
    bucket_mb: float = 25.0,
    launches: int = 3,
    seconds: float = 600.0,
) -> dict[str, Any] | None:
    """Measure every variant, in turn. Under torchrun or srun it is collective: every rank calls this.

    Args:
        ranks: processes to start on this machine, 4 without it; under torchrun or srun there are some already.
        rate: of the link of each of them, as ``tc`` writes it (1gbit); needs root.
        unshaped: connect them as this machine does.
        variants: names (see ``variants``); without them all.
        numel: gradients.
        bucket_mb: size of a bucket in MiB, as in ``engine.bucket_mb``.
        launches: how often to start anew: processes here, process groups under torchrun or srun.
        seconds: about how long to measure, in all; three rounds of one launch are done in any case.

    Returns:
        plain values, as ``summarize`` gives them, with ``network``, ``ranks`` and ``machine``; None on ranks but 0.

    Raises:
        RecipeError: an argument that cannot be measured with.
        RuntimeError: a rank failed.
    """
    chosen = choose_variants(variants)
    _check(numel=numel, bucket_mb=bucket_mb, launches=launches, seconds=seconds)
    names = tuple(variant.name for variant in chosen)
    settings = [
        Settings(numel=numel, variants=names, bucket_mb=bucket_mb, launch=launch)
        for launch in range(launches)
    ]
    world = discover_world()
    if world.source == "alone":
        described, measured = _on_this_machine(
            settings, seconds=seconds, ranks=4 if ranks is None else ranks, rate=rate, unshaped=unshaped
        )
    elif ranks is not None or rate is not None or unshaped:
        raise RecipeError(
            "--ranks, --rate, --unshaped",
            "the ranks and their network are there already",
            "leave these out under torchrun or srun",
        )
    else:
        described, measured = _on_real_network(world, settings, seconds=seconds)
    if not world.is_main:
        return None
    machine = {**describe_machine(world.device.type), "cores": os.cpu_count()}
    return {**described, "machine": machine, **summarize(measured, chosen, numel=numel)}


def _check(*, numel: int, bucket_mb: float, launches: int, seconds: float) -> None:
    if numel < LEAST_NUMEL:
        raise RecipeError(
            "--numel", f"{numel} is too small for a ResNet-50's parameters", f"ask for {LEAST_NUMEL} or more"
        )
    for key, value in (("--bucket-mb", bucket_mb), ("--launches", launches), ("--seconds", seconds)):
        if not value > 0:
            raise RecipeError(key, f"{value:g} is not possible", "make it more than 0")


def _on_this_machine(
    settings: Sequence[Settings], *, seconds: float, ranks: int, rate: str | None, unshaped: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Launches of processes here, with a shaped network each or none."""
    if (rate is None) == (not unshaped):
        raise RecipeError(
            "--rate, --unshaped",
            "nothing says which network is to be measured"
            if rate is None
            else "there can be only one of them",
            "--rate 1gbit makes one; --unshaped takes this machine's loopback; torchrun or srun, the real one",
        )
    if ranks < 2:
        raise RecipeError("--ranks", f"{ranks} cannot exchange anything", "ask for 2 or more")
    configure_logging(rank=0, size=1)
    with ExitStack() as stack:
        network = stack.enter_context(shaped_networks(ranks, rate)) if rate else None
        interface = INTERFACE if network else None

        def launch(each: Settings) -> dict[str, Any]:
            return launch_ranks(replace(each, interface=interface), ranks=ranks, network=network)

        measured = list(_launched(settings, launch, seconds=seconds, agree=lambda going: going))
    return {"network": f"a link of {rate} each" if rate else "loopback", "ranks": ranks}, measured


def _on_real_network(
    world: World, settings: Sequence[Settings], *, seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Collective: every rank calls this. Launches of process groups among the ranks there are."""
    if world.size == 1:
        raise RecipeError("WORLD_SIZE", "one rank alone sends nothing", "start two or more")
    configure_logging(rank=world.rank, size=world.size)
    world = join_world(world, timeout_seconds=TIMEOUT_SECONDS)
    measured = list(
        _launched(
            settings,
            lambda each: measure_launch(world, each),
            seconds=seconds,
            agree=lambda going: on_main(world, lambda: going),
        )
    )
    hosts = len(set(gather_objects(world, os.uname().nodename)))
    backend = "NCCL" if world.device.type == "cuda" else "Gloo"
    leave_world()
    return {
        "network": f"{backend} on {hosts} host{'s' if hosts > 1 else ''}",
        "ranks": world.size,
    }, measured


def _launched(
    settings: Sequence[Settings],
    launch: Callable[[Settings], dict[str, Any]],
    *,
    seconds: float,
    agree: Callable[[bool], bool],
) -> Iterator[dict[str, Any]]:
    """What each launch measured; fewer launches than asked for where they would take much longer than the time there is."""
    begun = time.perf_counter()
    for done, each in enumerate(settings):
        expected = (time.perf_counter() - begun) * (done + 1) / max(1, done)
        if not agree(expected <= SPARE * seconds or done == 0):
            log.warning(
                "--seconds %.0f leaves no time for more than %d of %d launches",
                seconds,
                done,
                len(settings),
            )
            return
        log.info("launch %d of %d", done + 1, len(settings))
        yield launch(replace(each, until=time.time() + seconds / len(settings)))
