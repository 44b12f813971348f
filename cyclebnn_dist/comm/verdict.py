"""The verdict: what ``comm.mode: auto`` takes, decided once from measurements, then part of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cyclebnn_dist.comm.breakeven import (
    MODE_BITS,
    CodecCost,
    Link,
    Mode,
    breakeven_bytes_per_second,
    choose,
    codec_seconds,
    schedule_mean,
    step_seconds,
)
from cyclebnn_dist.comm.coding import CodecName
from cyclebnn_dist.comm.layout import Layout
from cyclebnn_dist.comm.measure import measure_codec, measure_link
from cyclebnn_dist.comm.reducer import Reducer
from cyclebnn_dist.comm.traffic import assumed_buckets, bucket_loads
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.world import World, largest_over_ranks, on_main

log = logging.getLogger(__name__)

LARGEST_MESSAGES = 2**25


@dataclass(frozen=True)
class Verdict:
    """A mode, for how many ranks it was decided, and the numbers that decided it.

    Attributes:
        seconds: of all exchanges of a step, predicted, by mode; for ``quantized`` the mean over the schedule.
        link_bytes_per_second, link_latency_seconds: measured.
        codec_seconds: of all elements of a step, by mode.
        pays_below: rates of the link (bytes/s per rank) below which quantized is faster than each plain mode; None where
            it is at any rate.
    """

    mode: Mode
    world_size: int
    elements: int
    seconds: dict[Mode, float]
    codec_seconds: dict[Mode, float]
    link_bytes_per_second: float
    link_latency_seconds: float
    pays_below: dict[Mode, float | None]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Verdict:
        """Take what ``state_dict`` gave.

        Raises:
            RecipeError: for what it did not give.
        """
        try:
            return cls(**state)
        except TypeError as error:
            raise RecipeError(
                "comm.mode",
                f"what auto took is kept with the run in a form this version cannot read ({error})",
                "go on with the version that wrote it, or start afresh with another run.dir",
            ) from None

    def explain(self) -> str:
        """One line: the mode, and why."""
        times = ", ".join(f"{readable_seconds(self.seconds[mode])} {_AS[mode]}" for mode in _AS)
        codec = ", ".join(f"{1e9 * self.codec_seconds[mode] / self.elements:.2g} {_AS[mode]}" for mode in _AS)
        return (
            f"{self.mode}: averaging {self.elements / 1e6:.3g} million gradients over {self.world_size} ranks takes "
            f"about {times} (link {readable_rate(self.link_bytes_per_second)} a rank and "
            f"{1e3 * self.link_latency_seconds:.2g} ms an exchange; codec, in ns a gradient, {codec}); quantized pays "
            f"{' and '.join(f'{_below(self.pays_below[plain])} against {plain}' for plain in MODE_BITS)}"
        )


_AS: dict[Mode, str] = {"quantized": "quantized", "bf16": "as bf16", "fp32": "as fp32"}


def judge(
    layout: Layout,
    widths: Mapping[int, int],
    costs: Mapping[int, CodecCost],
    link: Link,
    *,
    codec_name: CodecName,
    bucket_mb: float,
    overlap: bool,
) -> Verdict:
    """The verdict on a model and a schedule, from what was measured.

    Args:
        widths: how many steps of the run communicate at which bits.
        costs: of these bits, of 16 and 32, and of the layout's small width.
        overlap: whether codec and link overlap, as they do on a CPU.
    """
    size = layout.world_size
    buckets = assumed_buckets(layout, bucket_mb=bucket_mb)
    loads = {
        bits: bucket_loads(layout, buckets, bits=bits, codec=codec_name)
        for bits in {*widths, *MODE_BITS.values()}
    }
    codec = {
        bits: sum(codec_seconds(load, costs, world_size=size) for load in found)
        for bits, found in loads.items()
    }

    def by_mode(values: Mapping[int, float]) -> dict[Mode, float]:
        return {
            **{mode: values[bits] for mode, bits in MODE_BITS.items()},
            "quantized": schedule_mean(values, widths),
        }

    def seconds_at(bytes_per_second: float) -> dict[Mode, float]:
        at_rate = Link(link.latency_seconds, bytes_per_second)
        return by_mode(
            {
                bits: step_seconds(found, costs, at_rate, world_size=size, overlap=overlap)
                for bits, found in loads.items()
            }
        )

    def mode_seconds(mode: Mode, bytes_per_second: float) -> float:
        return seconds_at(bytes_per_second)[mode]

    pays_below: dict[Mode, float | None] = {
        plain: breakeven_bytes_per_second(partial(mode_seconds, "quantized"), partial(mode_seconds, plain))
        for plain in MODE_BITS
    }
    seconds = seconds_at(link.bytes_per_second)
    return Verdict(
        mode=choose(seconds),
        world_size=size,
        elements=sum(parameter.numel for parameter in layout.parameters),
        seconds=seconds,
        codec_seconds=by_mode(codec),
        link_bytes_per_second=link.bytes_per_second,
        link_latency_seconds=link.latency_seconds,
        pays_below=pays_below,
    )


def measure_and_judge(
    reducer: Reducer, widths: Mapping[int, int], *, world: World, bucket_mb: float
) -> Verdict:
    """Collective: every rank calls this, before the first gradient. Rank 0's verdict, on every rank.

    Args:
        widths: how many steps of the run communicate at which bits.
    """

    def slowest(seconds: list[float]) -> list[float]:
        return largest_over_ranks(world, seconds)

    layout = reducer.layout
    needed = sorted({*widths, *MODE_BITS.values(), layout.small_bits})
    costs = measure_codec(
        reducer.codec, needed, device=world.device, scattered=layout.scattered, slowest=slowest
    )
    assert reducer.group is not None
    link = measure_link(
        reducer.group,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        largest_bytes=min(LARGEST_MESSAGES, int(4 * bucket_mb * 2**20)),
        slowest=slowest,
    )
    return on_main(
        world,
        lambda: judge(
            layout,
            widths,
            costs,
            link,
            codec_name=reducer.codec.name,
            bucket_mb=bucket_mb,
            overlap=world.device.type == "cpu",
        ),
    )


def settle(
    *, world: World, stored: Callable[[], list[dict[str, Any]]], measure: Callable[[], Verdict]
) -> Verdict:
    """Collective: every rank calls this. The verdict this run has already where it was for as many ranks, else a new one.

    Args:
        stored: states of verdicts of this run, the one that holds first; rank 0 alone asks.
        measure: collective.
    """

    def known() -> tuple[Verdict | None, int | None]:
        verdicts = [Verdict.from_state(state) for state in stored()]
        fitting = next((verdict for verdict in verdicts if verdict.world_size == world.size), None)
        return fitting, verdicts[0].world_size if verdicts else None

    verdict, earlier_size = on_main(world, known)
    if verdict:
        log.info("comm.mode=auto stays with what this run began with. %s", verdict.explain())
        return verdict
    if earlier_size:
        log.info(
            "comm.mode=auto measures anew: its verdict was for %d ranks, now there are %d",
            earlier_size,
            world.size,
        )
    verdict = measure()
    log.info("comm.mode=auto takes %s", verdict.explain())
    return verdict


def readable_seconds(seconds: float) -> str:
    """In seconds, or milliseconds below one."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def readable_rate(bytes_per_second: float) -> str:
    """In the units of networks: bits a second."""
    bits = 8 * bytes_per_second
    return f"{bits / 1e9:.3g} Gb/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mb/s"


def _below(rate: float | None) -> str:
    if rate is None:
        return "at any rate"
    return f"below {readable_rate(rate)}" if rate else "at no rate"
