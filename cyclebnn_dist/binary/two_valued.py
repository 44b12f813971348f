"""The two values of a binary weight: proof that a model in evaluation has no more of them in any filter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.parameters import binary_modules
from cyclebnn_dist.binary.trial import evaluating

SHOWN_LAYERS, SHOWN_VALUES = 3, 4


@torch.no_grad()
def check_two_valued(model: nn.Module) -> None:
    """Take every weight as evaluation does, at the widths that are set, and count values filter by filter.

    Methods that soften their weights in training (BNext's temperature) must have hardened them here: what is evaluated
    is what is exported. A filter of one value alone is binary too.

    Raises:
        RuntimeError: naming layers, and of each a filter, with more than two distinct values or one that is not finite.
    """
    problems = []
    for name, module in binary_modules(model):
        with evaluating(module.binarizer):
            rows = module.binarizer.weight_in_use(module.weight).flatten(1)
        wrong = ~is_two_valued(rows) | ~module.weight.flatten(1).isfinite().all(1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            values = rows[first].unique()
            shown = ", ".join(f"{value:.6g}" for value in values[:SHOWN_VALUES].tolist())
            more = ", ..." if len(values) > SHOWN_VALUES else ""
            problems.append(
                f"{name} ({type(module.binarizer).__name__}): {int(wrong.sum())} of {len(rows)} filters, "
                f"filter {first} has {len(values)} values: {shown}{more}"
            )
    if problems:
        others = f"; and {len(problems) - SHOWN_LAYERS} layers more" if len(problems) > SHOWN_LAYERS else ""
        raise RuntimeError(
            "binary weights are not two-valued in evaluation: " + "; ".join(problems[:SHOWN_LAYERS]) + others
        )


def is_two_valued(rows: Tensor) -> Tensor:
    """Of each row of a matrix, whether it has at most two distinct values, all finite; bool [rows]."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (((rows == low) | (rows == high)) & rows.isfinite()).all(1)
