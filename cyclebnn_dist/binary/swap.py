"""The swap: putting binary layers in the place of real ones, in a model that exists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cyclebnn_dist.binary.activations import (
    ONE_SIDED_ACTIVATIONS,
    PER_CHANNEL,
    Channels,
    find_channels,
    make_activation,
)
from cyclebnn_dist.binary.edges import NARROW_BITS, narrow_
from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryConv2dSame, BinaryLinear
from cyclebnn_dist.binary.parameters import binary_modules
from cyclebnn_dist.binary.rebuild import keep_less_
from cyclebnn_dist.binary.rules import (
    REAL_BY_PATTERN,
    check_layers,
    check_patterns,
    classifier_names,
    edge_names,
    is_gate,
    method_of,
    reason_to_stay,
    stem_names,
)
from cyclebnn_dist.binary.shortcuts import add_shortcuts_, replace_stem_pool_
from cyclebnn_dist.binary.trial import first_input, trial_forward
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig

log = logging.getLogger(__name__)

_SEPARATE_BIAS = "qkv_bias_separate"


@dataclass(frozen=True)
class SwapRow:
    """What happened to one layer."""

    name: str
    kind: str
    """Class of the real layer, with the kernel of a convolution: ``Conv2d 3x3``, ``Linear``."""
    shape: tuple[int, ...]
    """Shape of the weight."""
    swapped: bool
    reason: str
    """Why it was not swapped; empty if it was."""
    method: str = ""
    """By which method; empty if it was not."""


@dataclass(frozen=True)
class SwapReport:
    """What a swap did to a model."""

    method: str
    rows: tuple[SwapRow, ...]
    """One for each convolution and linear layer, in the model's order."""
    activation: str = "keep"
    """What activations were replaced by."""
    activations: tuple[str, ...] = ()
    """Names of the activations that were replaced."""
    shortcuts: tuple[str, ...] = ()
    """Names of the blocks that have a shortcut around each convolution now."""
    narrow: tuple[str, ...] = ()
    """Names of the real layers whose operands have 8 bits now."""
    one_sided_inputs: tuple[str, ...] = field(default=())
    """Binary layers whose inputs were never negative in the trial: all their signs are +1."""

    @property
    def num_swapped(self) -> int:
        return sum(row.swapped for row in self.rows)

    def render(self) -> str:
        """A table for people: one line a layer, then what else was done."""
        cells = [("layer", "kind", "weight", "swapped", "")]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            cells.append((row.name, row.kind, shape, row.method or "-", row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        lines += ["", f"{self.num_swapped} of {len(self.rows)} layers binary, method {self._methods()}"]
        if self.activations:
            lines.append(f"{len(self.activations)} activations replaced by {self.activation}")
        if self.shortcuts:
            lines.append(f"{len(self.shortcuts)} blocks with a shortcut around each convolution")
        if self.narrow:
            lines.append(f"{len(self.narrow)} layers real, with operands of {NARROW_BITS} bits")
        if self.one_sided_inputs:
            lines.append(
                f"inputs never negative, so all their signs are +1: {', '.join(self.one_sided_inputs)}"
            )
        return "\n".join(lines) + "\n"

    def _methods(self) -> str:
        return ", ".join(sorted({row.method for row in self.rows if row.swapped})) or self.method


def binarize_(model: nn.Module, rules: BinaryConfig, *, input_size: tuple[int, int, int]) -> SwapReport:
    """Swap the layers of ``model`` for binary ones, in place, and prove by one forward pass that all of them run.

    Where ``rules.layers`` keep all layers real, the rest is done all the same: networks that differ in it alone have the same
    activations and shortcuts. Parameters stay the same objects under the same names; binary layers add those of their method under
    ``<layer>.binarizer``. Activations that are never negative are replaced by ``rules.activation`` in the whole model,
    whatever ``include`` and ``exclude`` say, because a sign may come anywhere behind them; only those inside gates
    that stay real are kept. With ``rules.edge_bits`` 8, stem, classifier and gates that stay real have operands of 8 bits. Method ``none``, with no other by ``rules.methods``, changes nothing.

    Args:
        input_size: channels, height and width of an image.

    Raises:
        RecipeError: a pattern matches nothing, an edge cannot have 8 bits, no layer is left to swap, or a swapped layer does not run (its model
            reads the weight behind its back). The model may then be half changed.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_layer(module)}
    check_patterns(rules, list(layers))
    stem, classifier = stem_names(model, deep=rules.keep_deep_stem), classifier_names(model)
    rows = []
    for name, layer in layers.items():
        reason = reason_to_stay(name, layer, rules=rules, modules=modules, stem=stem, classifier=classifier)
        method = "" if reason else method_of(name, rules)
        rows.append(SwapRow(name, _kind(layer), tuple(layer.weight.shape), not reason, reason, method))
    check_layers(rules, {row.name: row.reason for row in rows})
    if rules.method == "none" and not any(row.swapped for row in rows):
        return SwapReport(method="none", rows=tuple(rows))
    to_swap = {row.name: row.method for row in rows if row.swapped}
    if not to_swap and not rules.layers:
        raise RecipeError(
            "binary.include",
            "leaves no layer of this model to swap",
            "`cyclebnn summary RECIPE binary.method=none` lists its layers; method none trains it real-valued",
        )
    activations = _replace_activations(model, rules, modules, input_size=input_size)
    _replace(model, {id(layers[name]): _binary(layers[name], method) for name, method in to_swap.items()})
    for name in to_swap:
        parent = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("qkv") and hasattr(parent, _SEPARATE_BIAS):
            # timm's BEiT, EVA and SwinV2 otherwise multiply with the weight themselves; the result is the same.
            setattr(parent, _SEPARATE_BIAS, True)
    eligible = {row.name for row in rows if row.swapped or row.reason == REAL_BY_PATTERN}
    shortcuts = add_shortcuts_(model, eligible) if rules.shortcut == "convolution" else ()
    if rules.stem_pool != "keep":
        replace_stem_pool_(model, rules.stem_pool)
    narrow = edge_names(model) - set(to_swap) if rules.edge_bits == NARROW_BITS else frozenset()
    narrow_({name: layers[name] for name in layers if name in narrow})
    one_sided = _prove(model, input_size=input_size)
    keep_less_(model, recompute=rules.recompute, input_size=input_size)
    return SwapReport(
        method=rules.method,
        rows=tuple(rows),
        activation=rules.activation,
        activations=activations,
        shortcuts=shortcuts,
        narrow=tuple(name for name in layers if name in narrow),
        one_sided_inputs=one_sided,
    )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)


def _kind(layer: nn.Module) -> str:
    kernel = getattr(layer, "kernel_size", ())
    return f"{type(layer).__name__} {'x'.join(map(str, kernel))}".rstrip()


def _binary(layer: nn.Module, method: str) -> nn.Module:
    if type(layer).__name__ == "Conv2dSame":
        assert isinstance(layer, nn.Conv2d)
        return BinaryConv2dSame.from_real(layer, method=method)
    if isinstance(layer, nn.Conv2d):
        return BinaryConv2d.from_real(layer, method=method)
    assert isinstance(layer, nn.Linear)
    return BinaryLinear.from_real(layer, method=method)


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Replace children by the identity of what they are, wherever they hang."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _replace_activations(
    model: nn.Module,
    rules: BinaryConfig,
    modules: dict[str, nn.Module],
    *,
    input_size: tuple[int, int, int],
) -> tuple[str, ...]:
    if rules.activation == "keep":
        return ()
    names = [
        name
        for name, module in modules.items()
        if type(module).__name__ in ONE_SIDED_ACTIVATIONS and not is_gate(name, modules)
    ]
    channels: Mapping[str, Channels] = {}
    if rules.activation in PER_CHANNEL:
        channels = find_channels(model, names, input_size=input_size)
        names = [name for name in names if name in channels]
    parameter = next(model.parameters())
    replacements = {}
    for name in names:
        activation = make_activation(rules.activation, like=modules[name], channels=channels.get(name))
        replacements[id(modules[name])] = activation.to(device=parameter.device, dtype=parameter.dtype)
    _replace(model, replacements)
    return tuple(names)


def _prove(model: nn.Module, *, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """Run every binary layer once; return those whose inputs were never negative.

    Raises:
        RecipeError: naming the layers that did not run.
    """
    ran: dict[str, bool] = {}
    handles = []
    for name, module in binary_modules(model):

        def remember(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name
        ) -> None:
            ran[name] = ran.get(name, False) or bool((first_input(inputs, named) < 0).any())

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    try:
        trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    bypassed = [name for name, _ in binary_modules(model) if name not in ran]
    if bypassed:
        shown = ", ".join(bypassed[:6]) + (f" and {len(bypassed) - 6} more" if len(bypassed) > 6 else "")
        raise RecipeError(
            "binary.exclude",
            f"the model never runs these swapped layers: {shown}",
            "it reads their weights behind their back, or does not use them: exclude them by a pattern",
        )
    one_sided = tuple(name for name, negative in ran.items() if not negative)
    if one_sided:
        log.warning(
            "inputs of binary layers are never negative: %s; see binary.activation", ", ".join(one_sided)
        )
    return one_sided
