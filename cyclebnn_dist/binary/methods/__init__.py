"""Published methods, a module each; importing them registers them."""

from cyclebnn_dist.binary.methods.adabin import AdaBin, AdaBinReleased
from cyclebnn_dist.binary.methods.bireal import BiReal, BiRealReleased
from cyclebnn_dist.binary.methods.bnext import BNext
from cyclebnn_dist.binary.methods.bnn import BNN
from cyclebnn_dist.binary.methods.cyclebnn import CycleBNN, CycleBNNReleased
from cyclebnn_dist.binary.methods.irnet import IRNet, IRNetReleased
from cyclebnn_dist.binary.methods.reactnet import ReActNet, ReActNetReleased
from cyclebnn_dist.binary.methods.recu import ReCU
from cyclebnn_dist.binary.methods.xnor import XNORNet

__all__ = [
    "BNN",
    "AdaBin",
    "AdaBinReleased",
    "BNext",
    "BiReal",
    "BiRealReleased",
    "CycleBNN",
    "CycleBNNReleased",
    "IRNet",
    "IRNetReleased",
    "ReActNet",
    "ReActNetReleased",
    "ReCU",
    "XNORNet",
]
