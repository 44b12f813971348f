"""The picture of a pattern: the chosen layers along the depth, and accuracy against cost along the search."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cyclebnn_dist.config.pattern import Pattern
from cyclebnn_dist.search.costs import Costs

REAL, BINARY, LIMIT = "#1f4e79", "#9db7d5", "#c0504d"


def plot_pattern(pattern: Pattern, costs: Costs, path: Path) -> None:
    """Write a PNG, whole or not at all; a display is not needed."""
    rounds = pattern.found["rounds"]
    figure = Figure(figsize=(max(7, 2 + 0.3 * len(costs.names)), 7 if rounds else 4), layout="constrained")
    FigureCanvasAgg(figure)
    depth, *below = figure.subplots(2 if rounds else 1, 1, squeeze=False)[:, 0]
    heights = [100 * layer.real / costs.total for layer in costs.layers.values()]
    colours = [REAL if name in pattern.real else BINARY for name in costs.names]
    bars = depth.bar(range(len(heights)), heights, color=colours)
    if rounds:
        depth.bar_label(bars, labels=chosen_in(pattern, costs), fontsize=6)
    depth.set_xticks(range(len(heights)), costs.names, rotation=90, fontsize=7)
    depth.set_ylabel("% of the real network's cost")
    depth.legend(handles=[Patch(color=REAL, label="real"), Patch(color=BINARY, label="binary")], fontsize=8)
    for panel in below:
        shares, reached = [each["cost"] for each in rounds], [each["top1"] for each in rounds]
        panel.plot(shares, reached, color=REAL, marker="o", markersize=4, linewidth=1)
        for number, at in enumerate(zip(shares, reached, strict=True), start=1):
            panel.annotate(str(number), at, fontsize=6, textcoords="offset points", xytext=(3, 3))
        panel.margins(x=0.05, y=0.12)
        panel.axvline(pattern.budget, color=LIMIT, linewidth=0.8, linestyle="--", label="budget")
        panel.set_xlabel("cost, of the real network's; numbers are rounds, here and above")
        panel.set_ylabel("top-1 on held-out images, %\nafter a short training")
        panel.legend(fontsize=8)
    figure.suptitle(
        f"{pattern.model}, {pattern.found['strategy']}: cost {pattern.cost:.4f}, budget {pattern.budget:g}",
        fontsize=10,
    )
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def chosen_in(pattern: Pattern, costs: Costs) -> list[str]:
    """For each layer, in the model's order, the rounds that chose it, separated by commas."""
    chosen = [each["layer"] for each in pattern.found["rounds"]]
    return [
        ", ".join(str(number) for number, layer in enumerate(chosen, start=1) if layer == name)
        for name in costs.names
    ]
