"""The rules of widths: which bits exist, and which schedules of them can be followed."""

from __future__ import annotations

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe, WidthConfig

QUANTIZED_BITS = (1, 8)
"""Lowest and highest width of quantized communication."""
PLAIN_BITS = (16, 32)
"""Widths of communication that is not quantized."""
SCHEDULED_BITS = (2, 16)
"""Lowest and highest quantized width of the forward and the backward pass."""
OFF_BITS = 32
"""Width of a forward or backward pass that is not quantized."""


def check_precision(recipe: Recipe) -> None:
    """Refuse widths that do not exist, and cycles and pieces that cannot be followed.

    Raises:
        RecipeError: naming the key and the cure.
    """
    for name in ("forward", "backward", "communication"):
        lowest, highest = QUANTIZED_BITS if name == "communication" else SCHEDULED_BITS
        plain = PLAIN_BITS if name == "communication" else (OFF_BITS,)
        _check_width(
            f"precision.{name}",
            getattr(recipe.precision, name),
            quantized=range(lowest, highest + 1),
            plain=plain,
            epochs=recipe.train.epochs,
        )


def _check_width(
    key: str, width: WidthConfig, *, quantized: range, plain: tuple[int, ...], epochs: float
) -> None:
    span = f"{quantized[0]} to {quantized[-1]}"
    words = f"from {span}, or {' or '.join(map(str, plain))} (not quantized)"
    for end in ("low", "high"):
        bits = getattr(width, end)
        if bits not in quantized and bits not in plain:
            raise RecipeError(f"{key}.{end}", f"{bits} bits are not possible", f"it must be {words}")
    if width.low > width.high:
        raise RecipeError(
            f"{key}.low",
            f"{width.low} is above {key}.high = {width.high}",
            "low must not be larger than high",
        )
    if width.schedule == "piecewise" or width.pieces:
        _check_pieces(key, width, possible=(*quantized, *plain), words=words, epochs=epochs)
        return
    if width.schedule == "constant":
        return
    if width.low != width.high and width.high not in quantized:
        raise RecipeError(
            f"{key}.high",
            f"a cycle from {width.low} to {width.high} bits passes widths that do not exist",
            f"cycle within {span}, or set {key}.schedule to constant or piecewise",
        )
    if width.warmup_epochs >= epochs:
        raise RecipeError(
            f"{key}.warmup_epochs",
            f"{width.warmup_epochs:g} leaves nothing of train.epochs = {epochs:g}",
            "it must be smaller",
        )


def _check_pieces(
    key: str, width: WidthConfig, *, possible: tuple[int, ...], words: str, epochs: float
) -> None:
    """A piecewise schedule says everything itself, within low to high like any other."""
    if width.schedule != "piecewise":
        raise RecipeError(
            f"{key}.pieces",
            f"stand beside {key}.schedule={width.schedule}",
            f"set {key}.schedule=piecewise, or {key}.pieces=[]",
        )
    starts = [start for start, _ in width.pieces]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise RecipeError(
            f"{key}.pieces",
            f"epochs {starts} do not ascend from 0" if starts else "are missing",
            "give [epoch, bits] pairs in ascending order, the first at epoch 0: [[0, 8], [30, 4]]",
        )
    if starts[-1] >= epochs:
        raise RecipeError(
            f"{key}.pieces",
            f"epoch {starts[-1]:g} is never reached: train.epochs = {epochs:g}",
            "every piece must begin before train.epochs",
        )
    if width.warmup_epochs:
        raise RecipeError(
            f"{key}.warmup_epochs",
            f"{width.warmup_epochs:g} stands beside {key}.schedule=piecewise",
            "leave it at 0: the first piece is the warm-up",
        )
    for start, bits in width.pieces:
        if bits not in possible:
            raise RecipeError(
                f"{key}.pieces",
                f"{bits} bits from epoch {start:g} on are not possible",
                f"it must be {words}",
            )
        if not width.low <= bits <= width.high:
            raise RecipeError(
                f"{key}.pieces",
                f"{bits} bits from epoch {start:g} on lie outside {key}.low = {width.low} to high = {width.high}",
                f"set {key}.low and {key}.high to the lowest and the highest width of the pieces",
            )
