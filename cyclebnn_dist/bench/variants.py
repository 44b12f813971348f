"""The variants of ``bench comm``: ways to average the same gradients, by name."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import CommConfig

PLAIN_CODEC_BITS = (8, 4, 2)
BLOCK_SIZES = {"minmax": 1024}
"""Of plain codecs as others use them: CGX scales 1024 elements at once. The others have the recipe's default."""

FULL, HALF = "fp32", "bf16"
TORCH = {32: "torch_fp32", 16: "torch_bf16"}


@dataclass(frozen=True)
class Variant:
    """One way to average gradients: by torch's own all-reduce, or by the reducer with this codec at this width."""

    name: str
    bits: int
    comm: CommConfig | None


def all_variants() -> tuple[Variant, ...]:
    """Every variant there is; plain codecs are those that a recipe may name beside the default one."""
    default = CommConfig()
    torch = tuple(Variant(name, bits, None) for bits, name in TORCH.items())
    wide = (Variant(FULL, 32, default), Variant(HALF, 16, default))
    narrow = tuple(Variant(f"q{bits}", bits, default) for bits in range(8, 0, -1))
    feedback = Variant("q1_ef", 1, CommConfig(error_feedback=True))
    codecs = typing.get_args(typing.get_type_hints(CommConfig)["codec"])
    plain = tuple(
        Variant(
            f"{codec}{bits}",
            bits,
            CommConfig(codec=codec, block_size=BLOCK_SIZES.get(codec, default.block_size)),
        )
        for codec in codecs
        if codec != default.codec
        for bits in PLAIN_CODEC_BITS
    )
    return (*torch, *wide, *narrow, feedback, *plain)


def choose_variants(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """The variants of these names, or all; those that ratios refer to, ``fp32`` and ``bf16``, always among them.

    Raises:
        RecipeError: there is no variant of a name.
    """
    variants = {variant.name: variant for variant in all_variants()}
    for name in names or ():
        if name not in variants:
            raise RecipeError(
                "--variants", f"there is no variant '{name}'", f"there are: {', '.join(variants)}"
            )
    chosen = {FULL, HALF, *(names or variants)}
    return tuple(variant for name, variant in variants.items() if name in chosen)
