"""The communication mode: which widths the gradient all-reduce really uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cyclebnn_dist.comm.breakeven import MODE_BITS, Mode
from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig

FULL_BITS = 32


def fixed_mode(name: Literal["auto", "quantized", "bf16", "fp32"]) -> Mode:
    """The mode of a recipe that no measurement decides: ``auto`` stands for the widths it would be worth deciding on."""
    return "quantized" if name == "auto" else name


def communicated_precision(precision: PrecisionConfig, mode: Mode, *, world_size: int) -> PrecisionConfig:
    """The recipe's widths with the communication channel as ``mode`` has it.

    With one rank nothing is sent, and gradients stay as they are.
    """
    if world_size > 1 and mode == "quantized":
        return precision
    bits = MODE_BITS[mode] if world_size > 1 else FULL_BITS
    return replace(precision, communication=WidthConfig(schedule="constant", low=bits, high=bits))
