"""Binary layers in any timm model: swapping, widths, counting."""

from cyclebnn_dist.binary import methods as methods
from cyclebnn_dist.binary.binarizer import METHODS, Binarizer
from cyclebnn_dist.binary.conventions import CONVENTIONS
from cyclebnn_dist.binary.count import Counts, LayerCount, count
from cyclebnn_dist.binary.health import Health
from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.parameters import binary_modules, parameter_kinds
from cyclebnn_dist.binary.swap import SwapReport, SwapRow, binarize_
from cyclebnn_dist.binary.two_valued import check_two_valued
from cyclebnn_dist.binary.widths import scheduled_precision, set_progress, set_widths, using_real_weights

__all__ = [
    "CONVENTIONS",
    "METHODS",
    "Binarizer",
    "BinaryConv2d",
    "BinaryLinear",
    "Counts",
    "Health",
    "LayerCount",
    "SwapReport",
    "SwapRow",
    "binarize_",
    "binary_modules",
    "check_two_valued",
    "count",
    "methods",
    "parameter_kinds",
    "scheduled_precision",
    "set_progress",
    "set_widths",
    "using_real_weights",
]
