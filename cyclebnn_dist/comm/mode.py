"""The communication mode: which widths the gradient all-reduce really uses."""

from __future__ import annotations

from dataclasses import replace

from cyclebnn_dist.config.recipe import CommConfig, PrecisionConfig, WidthConfig

FULL_BITS = 32
FIXED_BITS = {"bf16": 16, "fp32": FULL_BITS}


def communicated_precision(
    precision: PrecisionConfig, comm: CommConfig, *, world_size: int
) -> PrecisionConfig:
    """The recipe's widths with the communication channel as ``comm.mode`` decides it.

    With one rank nothing is sent, and gradients stay as they are. ``auto`` is ``quantized`` with more than one.
    """
    if world_size > 1 and comm.mode in ("auto", "quantized"):
        return precision
    bits = FIXED_BITS[comm.mode] if world_size > 1 else FULL_BITS
    return replace(precision, communication=WidthConfig(schedule="constant", low=bits, high=bits))
