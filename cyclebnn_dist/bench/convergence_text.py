"""The table of ``bench convergence`` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyclebnn_dist.bench.convergence_variants import BASELINE

STOPPED = {"seconds": "--seconds ran out", "interrupt": "interrupted"}


def render_convergence(result: Mapping[str, Any]) -> str:
    """Tables of variants, one a set, and what they show."""
    machine = result["machine"]
    lines = [
        f"a binary network of {result['parameters']:,} parameters, {100 * result['wide_share']:.1f} % of them sent at "
        f"the width of the step; {result['steps']} steps of {result['batch']} images over {result['ranks']} ranks",
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}; "
        f"{result['runs']} of {result['asked_runs']} runs",
    ]
    for name, images in result["sets"].items():
        lines += ["", f"{name}: {images['train']:,} images to train with, {images['test']:,} to test with"]
        lines.append(
            f"{'variant':<10}{'bits':>6}{'accuracy %':>12}{'less fp32, points (95 %)':>30}{'of a pair':>11}"
            f"{'seeds':>7}{'sent MB':>9}{'s a run':>9}  verdict"
        )
        lines += [_line(row, result) for row in result["variants"] if row["set"] == name]
    return "\n".join([*lines, "", *_remarks(result)])


def _line(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    low, high = row["low_bits"], row["high_bits"]
    bits = str(high) if low == high else f"{low}-{high}"
    difference = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
    if row["interval"]:
        difference += f" ({row['interval']['low']:+.2f} to {row['interval']['high']:+.2f})"
    deviation = "-" if row["deviation"] is None else f"{row['deviation']:.2f}"
    return (
        f"{row['variant']:<10}{bits:>6}{row['accuracy']:>12.2f}{difference:>30}{deviation:>11}{row['seeds']:>7}"
        f"{row['sent_bytes'] / 1e6:>9.1f}{row['seconds']:>9.1f}  {verdict(row, result)}"
    )


def verdict(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What a row shows, in words."""
    if row["variant"] == BASELINE:
        return "what the others are compared with"
    if row["non_inferior"] is not None:
        return "non-inferior" if row["non_inferior"] else "not shown"
    if row["seeds"] < result["least_seeds"]:
        return f"none: fewer than {result['least_seeds']} pairs"
    return "none"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    low, high = result["unsaturated_percent"]
    lines = [
        "less fp32     mean over seeds of the accuracy less that of the fp32 all-reduce, in percentage points; same initial",
        "              weights, same images in the same order. of a pair: standard deviation. _ef: with error feedback",
        f"non-inferior  the lower end of the two-sided 95 % t interval lies above -{result['margin_points']} points; "
        "digits: reported, nothing claimed",
    ]
    baseline = [
        row["accuracy"] for row in result["variants"] if (row["set"], row["variant"]) == ("shapes", BASELINE)
    ]
    if baseline and not low <= baseline[0] <= high:
        lines.append(
            f"saturated     fp32 reaches {baseline[0]:.1f} %, outside {low:g} to {high:g}: these runs show nothing"
        )
    claim = {True: "shown", False: "not shown", None: "these runs do not say"}[result["claim"]]
    lines.append(f"claim         4 bits and the cycle, with feedback and without, are non-inferior: {claim}")
    if result["stopped"]:
        more = f"; the same line goes on from {result['out']}" if result["out"] else ""
        lines.append(f"incomplete    {STOPPED[result['stopped']]}{more}")
    return lines
