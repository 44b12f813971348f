"""The communication mode: which widths the gradient all-reduce really uses."""

from __future__ import annotations

from dataclasses import replace

from cyclebnn_dist.config.recipe import CommConfig, PrecisionConfig, WidthConfig

FIXED_BITS = {"bf16": 16, "fp32": 32}


def communicated_precision(
    precision: PrecisionConfig, comm: CommConfig, *, world_size: int
) -> PrecisionConfig:
    """The recipe's widths with the communication channel as ``comm.mode`` decides it.

    ``auto`` quantizes where there is something to send: with one rank nothing is, and gradients stay as they are.
    """
    mode = comm.mode
    if mode == "auto":
        mode = "quantized" if world_size > 1 else "fp32"
    if mode == "quantized":
        return precision
    bits = FIXED_BITS[mode]
    return replace(precision, communication=WidthConfig(schedule="constant", low=bits, high=bits))
