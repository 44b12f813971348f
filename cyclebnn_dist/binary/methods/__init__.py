"""Published methods beside those of ``quantizers``, a module each; importing them registers them."""

from cyclebnn_dist.binary.methods.adabin import AdaBin, AdaBinReleased
from cyclebnn_dist.binary.methods.bnext import BNext
from cyclebnn_dist.binary.methods.irnet import IRNet, IRNetReleased
from cyclebnn_dist.binary.methods.reactnet import ReActNet, ReActNetReleased
from cyclebnn_dist.binary.methods.recu import ReCU
from cyclebnn_dist.binary.methods.xnor import XNORNet

__all__ = [
    "AdaBin",
    "AdaBinReleased",
    "BNext",
    "IRNet",
    "IRNetReleased",
    "ReActNet",
    "ReActNetReleased",
    "ReCU",
    "XNORNet",
]
