"""The summary of ``bench comm``: launches merged into one row a variant, and what they advise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cyclebnn_dist.bench.break_even import Cost, break_even, fit_cost
from cyclebnn_dist.bench.paired import ratio_over_launches
from cyclebnn_dist.bench.variants import Variant

WORTH = 0.95
"""A narrower width is advised while it takes at most this part of the time of the one before."""

MOST_ERROR = 0.5
"""Relative squared error of a mean above which a width is not advised: at 1 sending nothing would be as good."""


def summarize(
    launches: Sequence[Mapping[str, Any]], variants: Sequence[Variant], *, numel: int
) -> dict[str, Any]:
    """Merge what ``measure_launch`` returned, launch by launch.

    Ratios at 32 and at 16 bits refer to the faster of the reducer's and torch's own all-reduce, where both were measured.

    Returns:
        plain values: ``link_bits_per_second``, ``launches``, ``rounds``, ``baselines``, ``variants``, ``auto`` and ``advice``.
    """
    rate = statistics.median(launch["link_bytes_per_second"] for launch in launches)
    baselines = {
        name: _fastest([variant.name for variant in variants if variant.bits == bits], launches)
        for name, bits in (("fp32", 32), ("16bit", 16))
    }
    rows = [_row(variant, launches, baselines, rate=rate, numel=numel) for variant in variants]
    costs = {row["variant"]: _cost(row, rate) for row in rows}
    for row in rows:
        for name, baseline in baselines.items():
            bits_per_second = None
            if row["bits"] <= 8:
                rate_at = break_even(costs[row["variant"]], costs[baseline])
                bits_per_second = None if rate_at is None else 8 * rate_at
            row[f"break_even_bits_per_second_vs_{name}"] = bits_per_second
    return {
        "numel": numel,
        "link_bits_per_second": 8 * rate,
        "launches": len(launches),
        "rounds": sum(launch["rounds"] for launch in launches),
        "baselines": baselines,
        "variants": rows,
        "auto": _auto(launches),
        "advice": advise(rows, baselines),
    }


def _row(
    variant: Variant,
    launches: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, str],
    *,
    rate: float,
    numel: int,
) -> dict[str, Any]:
    """One variant's object in the JSON output."""
    measured = {
        name: [launch["variants"][name] for launch in launches]
        for name in (variant.name, *baselines.values())
    }
    ours = measured[variant.name]
    seconds = {name: [launch["seconds"] for launch in each] for name, each in measured.items()}
    median = _median_seconds(variant.name, launches)
    codec = [each for launch in ours for each in launch["codec_seconds"]]
    core = [each for launch in ours for each in launch["codec_core_seconds"]]
    wire = ours[0]["sent_bytes"] / rate
    codec_seconds = statistics.median(codec) if codec else None
    return {
        "variant": variant.name,
        "bits": variant.bits,
        "codec": variant.comm.codec if variant.comm else None,
        "block_size": variant.comm.block_size if variant.comm else None,
        "error_feedback": variant.comm.error_feedback if variant.comm else False,
        "median_seconds": median,
        "sent_bytes": ours[0]["sent_bytes"],
        "nic_bytes": ours[0]["nic_bytes"],
        "nmse": statistics.mean(launch["nmse"] for launch in ours),
        "speedup_vs_fp32": asdict(ratio_over_launches(seconds[baselines["fp32"]], seconds[variant.name])),
        "speedup_vs_16bit": asdict(ratio_over_launches(seconds[baselines["16bit"]], seconds[variant.name])),
        "wire_seconds": wire,
        "codec_seconds": codec_seconds,
        "codec_bytes_per_core_second": 4 * numel / statistics.median(core) if core else None,
        "times_wire": median / wire,
        "times_limit": median / max(wire, codec_seconds or 0.0),
        "parts": {
            name: statistics.mean(launch["parts"][name] for launch in ours) for name in ours[0]["parts"]
        },
    }


def _auto(launches: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What ``comm.mode: auto`` takes, and the seconds it reckons with beside those measured, by mode."""
    first = launches[0]["auto"]
    if first is None:
        return None
    names = {"fp32": "fp32", "bf16": "bf16", "quantized": first["quantized"]}
    return {
        "quantized": first["quantized"],
        "modes": [launch["auto"]["mode"] for launch in launches],
        "reckoned_seconds": {
            mode: statistics.median(launch["auto"]["reckoned_seconds"][mode] for launch in launches)
            for mode in names
        },
        "measured_seconds": {mode: _median_seconds(name, launches) for mode, name in names.items()},
    }


def _fastest(names: Sequence[str], launches: Sequence[Mapping[str, Any]]) -> str:
    return min(names, key=lambda name: _median_seconds(name, launches))


def _median_seconds(name: str, launches: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(each for launch in launches for each in launch["variants"][name]["seconds"])


def _cost(row: Mapping[str, Any], rate: float) -> Cost:
    return fit_cost(
        seconds=row["median_seconds"],
        sent_bytes=row["sent_bytes"],
        codec_seconds=row["codec_seconds"] or 0.0,
        rate=rate,
    )


def advise(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, str]) -> dict[str, Any]:
    """Which widths to use on this network.

    The highest one is the widest that is faster than 16 bits beyond doubt (its interval lies above 1); below it, widths
    count as long as narrower ones save time and do not err too much.

    Returns:
        ``mode`` (quantized, bf16 or fp32), ``low`` and ``high`` (None unless quantized) and ``why``, in words.
    """
    by_name = {row["variant"]: row for row in rows}
    widths = [by_name[f"q{bits}"] for bits in range(8, 0, -1) if f"q{bits}" in by_name]
    paying = [row for row in widths if row["speedup_vs_16bit"]["low"] > 1 and row["nmse"] < MOST_ERROR]
    if not paying:
        half = by_name[baselines["16bit"]]["speedup_vs_fp32"]["low"] > 1
        return {
            "mode": "bf16" if half else "fp32",
            "low": None,
            "high": None,
            "why": "no width measured is faster than 16 bits beyond doubt"
            + (", which are faster than 32" if half else ", nor are those faster than 32"),
        }
    low, narrower = paying[0], widths[widths.index(paying[0]) + 1 :]
    why = f"narrower ones would not save {100 * (1 - WORTH):.0f} % of the time more"
    for row in narrower:
        if row["nmse"] >= MOST_ERROR:
            why = f"at {row['bits']} bits the mean would err by {row['nmse']:.2g} of its square"
            break
        if row["median_seconds"] <= WORTH * low["median_seconds"]:
            low = row
    if low is widths[-1]:
        why = "narrower ones were not measured"
    return {"mode": "quantized", "low": low["bits"], "high": paying[0]["bits"], "why": why}
