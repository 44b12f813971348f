"""The variants of ``bench convergence``: kinds of gradient all-reduce to train the same network with, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import CommConfig, PrecisionConfig, WidthConfig

BASELINE = "fp32"
CYCLE = "cycle"
CONSTANT_BITS = (8, 4, 2)
CLAIMED = ("q4", "q4_ef", CYCLE, f"{CYCLE}_ef")
"""The variants that the project says learn as well as the baseline."""


@dataclass(frozen=True)
class Variant:
    """One way to average gradients: how, and at which widths."""

    name: str
    width: WidthConfig
    comm: CommConfig

    @property
    def bits(self) -> tuple[int, int]:
        """The lowest and the highest width of a run."""
        return (self.width.high if self.width.schedule == "constant" else self.width.low), self.width.high


def all_variants() -> tuple[Variant, ...]:
    """Every variant there is; the cycle is that of a recipe that says nothing about it, 2 to 8 bits."""
    widths = {BASELINE: _constant(32), "bf16": _constant(16)}
    narrow = {f"q{bits}": _constant(bits) for bits in CONSTANT_BITS} | {
        CYCLE: PrecisionConfig().communication
    }
    plain, feedback = (CommConfig(mode="quantized", error_feedback=each) for each in (False, True))
    return (
        *(Variant(name, width, plain) for name, width in (widths | narrow).items()),
        *(Variant(f"{name}_ef", width, feedback) for name, width in narrow.items()),
    )


def choose_variants(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """The variants of these names, or all; the baseline always among them.

    Raises:
        RecipeError: there is no variant of a name.
    """
    variants = {variant.name: variant for variant in all_variants()}
    for name in names or ():
        if name not in variants:
            raise RecipeError(
                "--variants", f"there is no variant '{name}'", f"there are: {', '.join(variants)}"
            )
    chosen = {BASELINE, *(names or variants)}
    return tuple(variant for name, variant in variants.items() if name in chosen)


def _constant(bits: int) -> WidthConfig:
    return WidthConfig(schedule="constant", low=bits, high=bits)
