"""Rebuilding: tensors that are not kept for the backward pass because they can be had again, bit for bit.

A tensor may carry the offer to rebuild it. ``through`` applies a function to such a tensor: what the function would save of
it is the offer instead, and its result carries an offer of its own. ``rebuild_through_`` has modules of a model do so.
Nothing of this is done in a compiled graph, whose compiler decides what is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from cyclebnn_dist.binary.activations import Hardtanh, Maxout, RPReLU
from cyclebnn_dist.binary.trial import first_input, trial_forward

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
ACTIVATIONS = (Hardtanh, RPReLU, Maxout, nn.PReLU)
REPEATABLE = frozenset({nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, *ACTIVATIONS})
"""Classes whose forward pass can be done again and gives the same."""

_OFFER, _MADE_BY = "_rebuild", "_made_by"


class Rebuild:
    """How to have one tensor again. What is rebuilt is kept until everyone who saved the tensor has had it.

    Args:
        make: makes it, under the autocast that was on when this was created.
        reads: tensors that ``make`` reads beside what it holds of its own (parameters); modifying them ends it.
    """

    def __init__(self, make: Callable[[], Tensor], *, reads: Iterable[Tensor] = ()) -> None:
        self._make = make
        self._reads = [Kept(tensor) for tensor in reads]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", "cuda")
        ]
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
        """The tensor, for whoever else needs it now. It must not be modified.

        Raises:
            RuntimeError: what it was made from has been modified since.
        """
        value = self._value
        if value is None:
            for kept in self._reads:
                kept.take()
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                for kind, dtype, enabled in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                value = self._make()
        self._value = value if self._waiting > 0 else None
        return value


class Kept:
    """A tensor as it is now: ``take`` gives it, and refuses where it has been modified, as autograd does."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def take(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation between "
                f"the forward and the backward pass: a {list(self._tensor.shape)} tensor of {self._tensor.dtype}"
            )
        return self._tensor


def offer(x: Tensor, rebuild: Rebuild) -> None:
    """Offer to rebuild ``x`` as it is now; an offer ends when ``x`` is modified."""
    setattr(x, _OFFER, (rebuild, x._version))


def offered(x: Tensor) -> Rebuild | None:
    """The offer ``x`` carries."""
    if torch.compiler.is_compiling():
        return None
    found = getattr(x, _OFFER, None)
    return found[0] if found is not None and found[1] == x._version else None


def through(
    function: Callable[[Tensor], Tensor], x: Tensor, *, reads: Iterable[Tensor | None] = ()
) -> Tensor:
    """``function(x)`` without keeping ``x``, where that can be had again.

    Args:
        function: pure but for ``reads``, parameters that it reads.
    """
    rebuild = offered(x)
    if rebuild is None:
        return function(x)
    with saving_instead(x, rebuild):
        y = function(x)
    if y is not x:
        parameters = [tensor.detach() for tensor in reads if tensor is not None]
        offer(y, Rebuild(lambda: function(rebuild.peek()), reads=parameters))
    return y


def saving_instead(x: Tensor, rebuild: Rebuild) -> saved_tensors_hooks:
    """Within, whatever would save ``x`` for the backward pass saves the offer to rebuild it.

    Other hooks of this kind (``save_on_cpu``, checkpoints) do not see what is saved within.
    """
    version = x._version
    # The graph holds on to these functions, which therefore must not hold on to x.
    reference = weakref.ref(x)

    def pack(saved: Tensor) -> Kept | Rebuild:
        x = reference()
        same = x is not None and x._version == version and _is_same(saved, x)
        # Autograd does not check by itself what hooks have packed.
        return rebuild.promise() if same else Kept(saved)

    def unpack(kept: Kept | Rebuild) -> Tensor:
        return kept.take()

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

    def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        made_by = getattr(first_input(inputs, named), _MADE_BY, None)
        found.update([made_by] if made_by is not None else [])

    for module in model.modules():
        if isinstance(module, NORMS + ACTIVATIONS):
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
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
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def before(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        # An interrupt may have left a forward pass in the middle.
        self._open.clear()
        x = first_input(inputs, named)
        rebuild = offered(x)
        if rebuild is None and self._everything and isinstance(module, NORMS):
            rebuild = Rebuild(Kept(x.detach()).take)
        if rebuild is not None:
            hooks = saving_instead(x, rebuild)
            hooks.__enter__()
            self._open.append((hooks, rebuild))

    def after(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._open:
            return
        hooks, rebuild = self._open.pop()
        hooks.__exit__()
        if self._everything and isinstance(output, Tensor) and type(module) in REPEATABLE:
            normalizing = isinstance(module, nn.BatchNorm2d) and module.training
            again = _batch_norm_again if normalizing else _again
            read = [*module.parameters(), *(() if normalizing else module.buffers())]
            offer(output, Rebuild(lambda: again(module, rebuild.peek()), reads=[x.detach() for x in read]))


def _batch_norm_again(module: Any, x: Tensor) -> Tensor:
    """What a batch normalization made of ``x`` in training, without moving its running statistics once more."""
    return functional.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)


def _again(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module`` made of ``x``, where its running statistics are not trained."""
    if isinstance(module, nn.BatchNorm2d):
        statistics = module.running_mean, module.running_var
        return functional.batch_norm(
            x, *statistics, module.weight, module.bias, training=False, eps=module.eps
        )
    return module.forward(x.clone() if getattr(module, "inplace", False) else x)
