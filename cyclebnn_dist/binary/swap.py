"""The swap: putting binary layers in the place of real ones, in a model that exists."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.parameters import binary_modules
from cyclebnn_dist.binary.rules import check_patterns, classifier_names, is_gate, reason_to_stay, stem_names
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig

log = logging.getLogger(__name__)

ONE_SIDED_ACTIVATIONS = frozenset(
    {
        "GELU",
        "GELUTanh",
        "HardMish",
        "HardSwish",
        "Hardswish",
        "LeakyReLU",
        "Mish",
        "QuickGELU",
        "ReLU",
        "ReLU6",
    }
    | {"SiLU", "SquaredReLU", "Swish"}
)
"""Classes, of torch and timm, whose results are (nearly) never below 0: their signs would say nothing."""

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
            cells.append((row.name, row.kind, shape, self.method if row.swapped else "-", row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        lines += ["", f"{self.num_swapped} of {len(self.rows)} layers binary, method {self.method}"]
        if self.activations:
            lines.append(f"{len(self.activations)} activations replaced by {self.activation}")
        if self.one_sided_inputs:
            lines.append(
                f"inputs never negative, so all their signs are +1: {', '.join(self.one_sided_inputs)}"
            )
        return "\n".join(lines) + "\n"


def binarize_(model: nn.Module, rules: BinaryConfig, *, input_size: tuple[int, int, int]) -> SwapReport:
    """Swap the layers of ``model`` for binary ones, in place, and prove by one forward pass that all of them run.

    Parameters stay the same objects under the same names; binary layers add those of their method under
    ``<layer>.binarizer``. Activations that are never negative are replaced by ``rules.activation`` in the whole model,
    whatever ``include`` and ``exclude`` say, because a sign may come anywhere behind them; only those inside gates
    that stay real are kept. Method ``none`` changes nothing.

    Args:
        input_size: channels, height and width of an image.

    Raises:
        RecipeError: a pattern matches nothing, no layer is left to swap, or a swapped layer does not run (its model
            reads the weight behind its back). The model may then be half changed.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_layer(module)}
    check_patterns(rules, list(layers))
    stem, classifier = stem_names(model), classifier_names(model)
    rows = []
    for name, layer in layers.items():
        reason = reason_to_stay(name, layer, rules=rules, modules=modules, stem=stem, classifier=classifier)
        rows.append(SwapRow(name, _kind(layer), tuple(layer.weight.shape), not reason, reason))
    if rules.method == "none":
        return SwapReport(method="none", rows=tuple(rows))
    to_swap = {row.name: layers[row.name] for row in rows if row.swapped}
    if not to_swap:
        raise RecipeError(
            "binary.include",
            "leaves no layer of this model to swap",
            "`cyclebnn summary RECIPE binary.method=none` lists its layers; method none trains it real-valued",
        )
    activations = _replace_activations(model, rules, modules)
    _replace(model, {id(layer): _binary(layer, rules.method) for layer in to_swap.values()})
    for name in to_swap:
        parent = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("qkv") and hasattr(parent, _SEPARATE_BIAS):
            # timm's BEiT, EVA and SwinV2 otherwise multiply with the weight themselves; the result is the same.
            setattr(parent, _SEPARATE_BIAS, True)
    one_sided = _prove(model, input_size=input_size)
    return SwapReport(
        method=rules.method,
        rows=tuple(rows),
        activation=rules.activation,
        activations=activations,
        one_sided_inputs=one_sided,
    )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)


def _kind(layer: nn.Module) -> str:
    kernel = getattr(layer, "kernel_size", ())
    return f"{type(layer).__name__} {'x'.join(map(str, kernel))}".rstrip()


def _binary(layer: nn.Module, method: str) -> nn.Module:
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
    model: nn.Module, rules: BinaryConfig, modules: dict[str, nn.Module]
) -> tuple[str, ...]:
    if rules.activation == "keep":
        return ()
    names, replacements = [], {}
    for name, module in modules.items():
        if type(module).__name__ not in ONE_SIDED_ACTIVATIONS or is_gate(name, modules):
            continue
        names.append(name)
        replacements[id(module)] = _activation(rules.activation, like=module)
    device = next(model.parameters()).device
    for replacement in replacements.values():
        replacement.to(device)
    _replace(model, replacements)
    return tuple(names)


def _activation(kind: str, *, like: nn.Module) -> nn.Module:
    match kind:
        case "hardtanh":
            module: nn.Module = nn.Hardtanh(inplace=bool(getattr(like, "inplace", False)))
        case "prelu":
            module = nn.PReLU()
        case "identity":
            module = nn.Identity()
        case _:
            raise AssertionError(kind)
    return module.train(like.training)


def _prove(model: nn.Module, *, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """Run every binary layer once; return those whose inputs were never negative.

    Raises:
        RecipeError: naming the layers that did not run.
    """
    ran: dict[str, bool] = {}
    handles = []
    for name, module in binary_modules(model):

        def remember(module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            ran[name] = ran.get(name, False) or bool((inputs[0] < 0).any())

        handles.append(module.register_forward_pre_hook(remember))
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


def trial_forward(model: nn.Module, *, input_size: tuple[int, int, int]) -> torch.Tensor:
    """Logits of one image of noise, in evaluation mode, uncompiled; the model is afterwards as before."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *input_size, generator=generator).to(
        device=parameter.device, dtype=parameter.dtype
    )
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(image)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
