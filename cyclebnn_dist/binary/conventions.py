"""The conventions by which operations of a binary network are added up; published tables differ in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """What one multiply-accumulate, or one elementwise operation, counts in OPs."""

    words: str
    binary_share: float = 1.0 / 64.0
    """Of a multiply-accumulate of two signs."""
    edge_share: float = 1.0
    """Of one in the stem, the classifier, or a squeeze-and-excitation or other gate, where those are real."""
    elementwise: bool = False
    """Whether normalizations (2 for each element), activations (1) and additions of two tensors (1) count."""


CONVENTIONS: Mapping[str, Convention] = {
    "bireal": Convention("BOPs / 64 + FLOPs, multiply-accumulates only (Bi-Real Net, ReActNet)"),
    "elementwise": Convention(
        "BOPs / 64 + FLOPs, with normalizations, activations and additions (BCDNet's second figure)",
        elementwise=True,
    ),
    "bnext": Convention(
        "BOPs / 64 + FLOPs, stem, classifier and gates at 8 bits count 1/8 (BNext)", edge_share=1.0 / 8.0
    ),
    "fvbitcore": Convention("BOPs / 32 + FLOPs, bits / 32 of a layer (fvbitcore)", binary_share=1.0 / 32.0),
}
"""By the name the summary takes. larq charges a product at the wider of its operands; both are signs in every binary layer
here, so its figure is that of ``bireal``."""
