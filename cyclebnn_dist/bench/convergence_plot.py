"""The plot of ``bench convergence``: differences to the fp32 all-reduce with their intervals, beside the margin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cyclebnn_dist.bench.convergence_variants import BASELINE
from cyclebnn_dist.config import RecipeError

PLAIN, FEEDBACK, MARGIN = "#1f4e79", "#c0504d", "#888888"


def plot_convergence(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG; a display is not needed.

    Raises:
        RecipeError: the file cannot be written.
    """
    sets = list(result["sets"])
    most = max(sum(row["set"] == name for row in result["variants"]) for name in sets)
    figure = Figure(figsize=(5.5 * len(sets) + 1, 1.8 + 0.3 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for name, axes in zip(sets, figure.subplots(1, len(sets), squeeze=False)[0], strict=True):
        rows = [row for row in result["variants"] if row["set"] == name and row["difference"] is not None]
        for place, row in enumerate(rows):
            interval = row["interval"] or {"low": row["difference"], "high": row["difference"]}
            reach = [[row["difference"] - interval["low"]], [interval["high"] - row["difference"]]]
            colour = FEEDBACK if row["error_feedback"] else PLAIN
            axes.errorbar(row["difference"], place, xerr=reach, fmt="o", color=colour, capsize=3)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.axvline(-result["margin_points"], color=MARGIN, linestyle="--", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("accuracy less that of the fp32 all-reduce, points")
        baseline = [row for row in result["variants"] if (row["set"], row["variant"]) == (name, BASELINE)]
        reached = f"fp32 {baseline[0]['accuracy']:.1f} %, " if baseline else ""
        seeds = max((row["seeds"] for row in rows), default=0)
        axes.set_title(f"{name}: {reached}{seeds} seeds, 95 % t intervals", fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RecipeError("--plot", f"cannot write {path}: {error.strerror}", "name another file") from None
