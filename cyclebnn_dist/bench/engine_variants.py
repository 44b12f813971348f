"""The variants of ``bench engines``: engines at their stages, with gradients in fp32 and at cycling widths, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig

CYCLE = (2, 5, 8)
"""Widths of the steps that are timed together: a short cycle, with the mean width of a long one from 2 to 8 bits."""

FULL, CYCLIC = "fp32", "cyclic"


@dataclass(frozen=True)
class Variant:
    """One engine with one kind of gradients. ``widths`` are those of the steps that are timed together."""

    name: str
    gradients: str
    widths: tuple[int, ...]
    engine: EngineConfig

    @property
    def baseline(self) -> str:
        """DDP with the same gradients."""
        return f"ddp_{self.gradients}"


def all_variants(*, bucket_mb: float) -> tuple[Variant, ...]:
    """DDP and ZeRO 0 to 2, each with gradients in full precision and at the widths of a cycle."""
    engines = {"ddp": EngineConfig(bucket_mb=bucket_mb)}
    for stage in (0, 1, 2):
        engines[f"zero{stage}"] = EngineConfig(name="deepspeed", zero_stage=stage, bucket_mb=bucket_mb)
    return tuple(
        Variant(f"{name}_{gradients}", gradients, widths, engine)
        for name, engine in engines.items()
        for gradients, widths in ((FULL, (32,) * len(CYCLE)), (CYCLIC, CYCLE))
    )


def choose_variants(names: Sequence[str] | None, *, bucket_mb: float) -> tuple[Variant, ...]:
    """The variants of these names, or all; those that ratios refer to, DDP's, always among them.

    Raises:
        RecipeError: there is no variant of a name.
    """
    variants = {variant.name: variant for variant in all_variants(bucket_mb=bucket_mb)}
    for name in names or ():
        if name not in variants:
            raise RecipeError(
                "--variants", f"there is no variant '{name}'", f"there are: {', '.join(variants)}"
            )
    chosen = {f"ddp_{FULL}", f"ddp_{CYCLIC}", *(names or variants)}
    return tuple(variant for name, variant in variants.items() if name in chosen)
