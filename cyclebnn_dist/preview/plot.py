"""The preview as a plot: bits against step, a panel a channel. The one place here that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.preview.text import bits_in_words
from cyclebnn_dist.report import readable_size

INK = "#1f4e79"


def plot_preview(described: dict[str, Any], path: Path, *, title: str) -> None:
    """Write what ``preview`` describes as a PNG; a display is not needed.

    Raises:
        RecipeError: the file cannot be written, or is not a .png.
    """
    if path.suffix.lower() != ".png":
        raise RecipeError("--plot", f"{path} is no PNG file", f"use {path.with_suffix('.png')}")
    steps, channels = described["steps"], described["bits"]
    figure = Figure(figsize=(9, 1.9 * len(channels) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(channels), 1, sharex=True)
    for panel, (name, used) in zip(panels, channels.items(), strict=True):
        starts = [step for step, _ in used["runs"]] + [steps]
        bits = [bits for _, bits in used["runs"]]
        panel.stairs(bits, starts, color=INK, linewidth=1.2, baseline=None)
        panel.axhline(used["mean"], color=INK, linewidth=0.8, linestyle=":")
        panel.set_ylim(0, used["max"] * 1.15)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylabel("bits")
        panel.set_title(f"{name}: {bits_in_words(used)}", fontsize=9)
    epoch_steps = described["steps_per_epoch"]
    panels[-1].set_xlim(0, steps)
    panels[-1].set_xlabel("step")
    epochs = panels[-1].secondary_xaxis(
        -0.45, functions=(lambda step: step / epoch_steps, lambda epoch: epoch * epoch_steps)
    )
    epochs.set_xlabel("epoch")
    sent = "nothing sent"
    if described["sent_bytes"]:
        ratio = described["fp32_bytes"] / described["sent_bytes"]
        sent = f"{readable_size(described['sent_bytes'])} sent per rank of {described['ranks']} ({ratio:.2f}x less than fp32)"
    saved = f"{100 * described['training_saving_model']:.1f} % of training operations saved"
    figure.suptitle(f"{title}\n{sent}, {saved}", fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RecipeError("--plot", f"cannot write {path}: {error.strerror}", "name another file") from None
