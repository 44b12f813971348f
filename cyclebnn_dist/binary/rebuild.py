"""Rebuilding: tensors that are not kept for the backward pass because they can be had again, bit for bit.

A tensor may carry the offer to rebuild it. ``through`` applies a function to such a tensor: what the function would save of
it is the offer instead, and its result carries an offer of its own. ``rebuild_through_`` has modules of a model do so.
Nothing of this is done in a compiled graph, whose compiler decides what is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from cyclebnn_dist.binary.activations import Hardtanh, Maxout, RPReLU
from cyclebnn_dist.binary.trial import trial_forward

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
ACTIVATIONS = (Hardtanh, RPReLU, Maxout, nn.PReLU)
REPEATABLE = frozenset({nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, *ACTIVATIONS})
"""Classes whose forward pass can be done again and gives the same."""

_OFFER, _MADE_BY = "_rebuild", "_made_by"


class Rebuild:
    """How to have one tensor again. What is rebuilt is kept until everyone who saved the tensor has had it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._value: Tensor | None = None
        self._waiting = 0

    def promise(self) -> Rebuild:
        """Note that someone will ``take`` the tensor."""
        self._waiting += 1
        return self

    def take(self) -> Tensor:
        """The tensor, for one who was promised it."""
        self._waiting -= 1
        return self.peek()

    def peek(self) -> Tensor:
        """The tensor, for whoever else needs it now. It must not be modified."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._make()
        self._value = value if self._waiting > 0 else None
        return value


def offer(x: Tensor, rebuild: Rebuild) -> None:
    """Offer to rebuild ``x`` as it is now; an offer ends when ``x`` is modified."""
    setattr(x, _OFFER, (rebuild, x._version))


def offered(x: Tensor) -> Rebuild | None:
    """The offer ``x`` carries."""
    if torch.compiler.is_compiling():
        return None
    rebuild, version = getattr(x, _OFFER, (None, -1))
    return rebuild if version == x._version else None


def through(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` without keeping ``x``, where that can be had again.

    ``function`` must give the same result when it is called again before the parameters change.
    """
    rebuild = offered(x)
    if rebuild is None:
        return function(x)
    with saving_instead(x, rebuild):
        y = function(x)
    if y is not x:
        offer(y, Rebuild(lambda: function(rebuild.peek())))
    return y


def saving_instead(x: Tensor, rebuild: Rebuild) -> saved_tensors_hooks:
    """Within, whatever would save ``x`` for the backward pass saves the offer to rebuild it."""
    version = x._version
    # The graph holds on to these functions, which therefore must not hold on to x.
    reference = weakref.ref(x)

    def pack(saved: Tensor) -> Tensor | Rebuild:
        x = reference()
        same = x is not None and x._version == version and _is_same(saved, x)
        return rebuild.promise() if same else saved

    def unpack(kept: Tensor | Rebuild) -> Tensor:
        return kept.take() if isinstance(kept, Rebuild) else kept

    return saved_tensors_hooks(pack, unpack)


def _is_same(a: Tensor, b: Tensor) -> bool:
    same_place = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return same_place and a.shape == b.shape and a.stride() == b.stride()


def keep_less_(model: nn.Module, *, recompute: bool, input_size: tuple[int, int, int]) -> None:
    """Have the modules of ``model`` keep less for the backward pass than they do by themselves, in place.

    The product of a binary layer is kept as 16-bit integers where a normalization or an activation follows, which would
    keep it as it is.

    Args:
        recompute: instead products are computed once more in the backward pass, and with them what normalizations and
            activations make of them, for each other, for binary layers and for max-pools.
        input_size: channels, height and width of an image.
    """
    binary = {name: module for name, module in model.named_modules() if hasattr(module, "binarizer")}
    followed = binary if recompute else _followed(model, binary, input_size=input_size)
    for name in followed:
        binary[name].keep = "recompute" if recompute else "integers"
    rebuild_through_(model, everything=recompute)


def _followed(
    model: nn.Module, layers: Mapping[str, nn.Module], *, input_size: tuple[int, int, int]
) -> set[str]:
    """Names of those ``layers`` whose output goes straight into a normalization or an activation."""
    found: set[str] = set()
    handles = []
    for name, layer in layers.items():

        def mark(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            setattr(output, _MADE_BY, name)

        handles.append(layer.register_forward_hook(mark))

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.update({getattr(inputs[0], _MADE_BY)} if hasattr(inputs[0], _MADE_BY) else ())

    for module in model.modules():
        if isinstance(module, NORMS + ACTIVATIONS):
            handles.append(module.register_forward_pre_hook(look))
    try:
        trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    return found


def rebuild_through_(model: nn.Module, *, everything: bool) -> None:
    """Have normalizations and activations take up what is offered to them, and offer what they return if ``everything``."""
    for module in model.modules():
        if isinstance(module, NORMS + ACTIVATIONS) or (everything and hasattr(module, "binarizer")):
            _Hooks(everything=everything).register(module)
        elif everything and isinstance(module, nn.MaxPool2d):
            _Hooks(everything=False).register(module)


class _Hooks:
    """``through`` around one module."""

    def __init__(self, *, everything: bool) -> None:
        self._everything = everything
        self._open: list[tuple[saved_tensors_hooks, Rebuild]] = []

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        x = inputs[0]
        rebuild = offered(x)
        if rebuild is None and self._everything and isinstance(module, NORMS):
            kept = x.detach()
            rebuild = Rebuild(lambda: kept)
        if rebuild is not None:
            hooks = saving_instead(x, rebuild)
            hooks.__enter__()
            self._open.append((hooks, rebuild))

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._open:
            return
        hooks, rebuild = self._open.pop()
        hooks.__exit__()
        if self._everything and isinstance(output, Tensor) and type(module) in REPEATABLE:
            offer(output, Rebuild(lambda: _again(module, rebuild.peek())))


def _again(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module`` made of ``x`` in its forward pass, without a trace of it being made again."""
    if isinstance(module, nn.BatchNorm2d) and module.training:
        return functional.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)
    if getattr(module, "inplace", False):
        x = x.clone()
    return module.forward(x)
