"""The plot of ``bench comm``: seconds of each variant beside its limits, and error against time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cyclebnn_dist.bench.comm_text import readable_rate
from cyclebnn_dist.config import RecipeError

INK, BAR, WIRE, CODEC = "#1f4e79", "#9db7d5", "#c0504d", "#222222"


def check_plot(path: Path) -> None:
    """Raise a RecipeError where a plot cannot be written, before anything is measured for it."""
    if path.suffix.lower() != ".png":
        raise RecipeError("--plot", f"{path} is no PNG file", f"use {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise RecipeError("--plot", f"there is no folder {path.parent}", "make it, or name another file")


def plot_comm(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG; a display is not needed.

    Raises:
        RecipeError: the file cannot be written.
    """
    rows = result["variants"]
    names = [row["variant"] for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(10, 1.5 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, errors = figure.subplots(1, 2)
    bars.barh(places, [row["median_seconds"] for row in rows], color=BAR, height=0.6, label="all-reduce")
    bars.scatter([row["wire_seconds"] for row in rows], places, color=WIRE, marker="|", s=140, label="wire")
    coded = [(row["codec_seconds"], place) for row, place in zip(rows, places, strict=True) if row["codec"]]
    bars.scatter(*zip(*coded, strict=True), color=CODEC, marker="|", s=140, label="codec alone")
    bars.set_yticks(places, names)
    bars.invert_yaxis()
    bars.set_xlabel("seconds")
    bars.legend(fontsize=8)
    for row in rows:
        if row["bits"] <= 16:
            errors.scatter(row["median_seconds"], row["nmse"], color=INK, s=14)
            errors.annotate(
                row["variant"],
                (row["median_seconds"], row["nmse"]),
                fontsize=8,
                textcoords="offset points",
                xytext=(4, 3),
            )
    errors.set_yscale("log")
    errors.set_xlabel("seconds")
    errors.set_ylabel("relative squared error of the mean")
    figure.suptitle(
        f"averaging {result['numel']:,} gradients over {result['ranks']} ranks, {result['network']} "
        f"({readable_rate(result['link_bits_per_second'])} a rank)",
        fontsize=10,
    )
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RecipeError("--plot", f"cannot write {path}: {error.strerror}", "name another file") from None
