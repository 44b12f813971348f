"""The rules of a swap: which layers of a timm model stay real, and the reason a person is told."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig

_GATES: Mapping[str, tuple[str, ...]] = {
    "BlockESE": (),
    "BlockSE": (),
    "CecaModule": (),
    "ChannelAttn": (),
    "CircularEcaModule": (),
    "EcaModule": (),
    "EffectiveSEModule": (),
    "EseModule": (),
    "GatherExcite": (),
    "GlobalContext": (),
    "LightChannelAttn": (),
    "LightSpatialAttn": (),
    "SEModule": (),
    "SEWithNorm": (),
    "SelectiveKernelAttn": (),
    "SpatialAttn": (),
    "SplitAttn": ("fc1", "fc2", "bn1", "act1"),
    "SqueezeExcite": (),
    "SqueezeExciteCl": (),
}
"""timm's classes that weigh channels or places, and which of their children do so (none named: all)."""

_GATE_NAMES = frozenset({"se", "gate"})
_SHORTCUT_NAMES = frozenset({"downsample", "project", "shortcut", "skip"})

REAL_BY_PATTERN = "real by pattern"
"""Why a layer stays real that every other rule would make binary."""


def is_gate(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module of this name is, or lies in, squeeze-and-excitation or another gate."""
    parts = name.split(".")
    if _GATE_NAMES & set(parts):
        return True
    for depth in range(1, len(parts) + 1):
        children = _GATES.get(type(modules.get(".".join(parts[:depth]))).__name__)
        if children is not None and (not children or set(parts[depth : depth + 1]) & set(children)):
            return True
    return False


def stem_names(model: nn.Module, *, deep: bool = False) -> frozenset[str]:
    """Names of the first convolutions: timm's ``first_conv``, else the first convolution or linear layer there is.

    Args:
        deep: the whole stem instead: the model's child that holds a first convolution, unless it holds most layers.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    names = _configured(model, "first_conv") or frozenset(layers[:1])
    if not deep:
        return names
    children = {name: name.partition(".")[0] for name in names}
    sizes = Counter(layer.partition(".")[0] for layer in layers)
    return frozenset(child if 2 * sizes[child] < len(layers) else name for name, child in children.items())


def classifier_names(model: nn.Module) -> frozenset[str]:
    """Names of the classifiers: timm's ``classifier`` and what ``get_classifier()`` returns."""
    names = _configured(model, "classifier")
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        heads = get_classifier()
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        names |= {name for name, module in model.named_modules() if any(module is head for head in heads)}
    return names


def edge_names(model: nn.Module) -> frozenset[str]:
    """Names of the layers in the stem, the classifier and gates, as far as they are convolutions or linear."""
    modules = dict(model.named_modules())
    ends = stem_names(model) | classifier_names(model)
    return frozenset(
        name
        for name, module in modules.items()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
        and (_within(name, ends) or is_gate(name, modules))
    )


def reason_to_stay(
    name: str,
    layer: nn.Module,
    *,
    rules: BinaryConfig,
    modules: Mapping[str, nn.Module],
    stem: frozenset[str],
    classifier: frozenset[str],
) -> str:
    """Why this layer is not swapped; empty if it is."""
    if method_of(name, rules) == "none":
        return "binary.method is none" if rules.method == "none" else "method none by binary.methods"
    if _within(name, stem) and rules.keep_stem:
        return "stem"
    if _within(name, classifier) and rules.keep_classifier:
        return "classifier"
    if not _is_plain(layer):
        return f"a {type(layer).__name__} is not swapped"
    if rules.keep_squeeze_excite and is_gate(name, modules):
        return "gate"
    if isinstance(layer, nn.Conv2d):
        if rules.keep_depthwise and 1 < layer.groups == layer.in_channels:
            return "depthwise"
        if rules.keep_downsample and layer.kernel_size == (1, 1) and _SHORTCUT_NAMES & set(name.split(".")):
            return "downsample"
    if not any(fnmatchcase(name, pattern) for pattern in rules.include):
        return "not included"
    for pattern in rules.exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern}"
    return REAL_BY_PATTERN if rules.layers.get(name) == "real" else ""


def method_of(name: str, rules: BinaryConfig) -> str:
    """The method of this layer: that of the first pattern in ``rules.methods`` it matches, else ``rules.method``."""
    for pattern, method in rules.methods.items():
        if fnmatchcase(name, pattern):
            return method
    return rules.method


def check_patterns(rules: BinaryConfig, names: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer: it is misspelt, or meant for another model.

    Raises:
        RecipeError: naming the pattern and the nearest layer names.
    """
    assert not rules.pattern, "a recipe's binary.pattern is read into binary.layers when it is loaded"
    strangers = [name for name in rules.layers if name not in names]
    if strangers:
        more = f" and {len(strangers) - 4} more" if len(strangers) > 4 else ""
        near = nearest_patterns(strangers[0], names)
        raise RecipeError(
            "binary.pattern",
            f"names layers this model lacks: {', '.join(strangers[:4])}{more}",
            f"it was made for another model; near {strangers[0]}: {', '.join(near)}",
        )
    given = (("include", rules.include), ("exclude", rules.exclude), ("methods", tuple(rules.methods)))
    for key, patterns in given:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = nearest_patterns(pattern, names)
                raise RecipeError(
                    f"binary.{key}",
                    f"'{pattern}' matches no layer of this model",
                    f"near it: {', '.join(near)}",
                )


def check_layers(rules: BinaryConfig, reasons: Mapping[str, str]) -> None:
    """Refuse a layer that ``rules.layers`` wants binary and another rule keeps real: the model would cost more than thought.

    Args:
        reasons: why each layer of the model stays real, empty where it does not.

    Raises:
        RecipeError: naming the layers and the rule.
    """
    kept = [name for name, fate in rules.layers.items() if fate == "binary" and reasons[name]]
    if kept:
        more = f" and {len(kept) - 4} more" if len(kept) > 4 else ""
        raise RecipeError(
            "binary.pattern",
            f"wants {', '.join(kept[:4])}{more} binary, but it stays real here: {reasons[kept[0]]}",
            "change the rule that keeps it, or search anew with this recipe",
        )


def nearest_patterns(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to four layer names, or patterns for all layers below a name, that look like ``pattern``."""
    names = list(names)
    prefixes = {
        ".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)
    }
    candidates = names + [f"{prefix}.*" for prefix in sorted(prefixes)]
    return difflib.get_close_matches(pattern, candidates, n=4, cutoff=0.3) or names[:4]


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes what torch's own class does; subclasses standardize weights, pad otherwise, and more."""
    kind = type(layer)
    # timm's Linear only casts its parameters, and only when scripted; its Conv2dSame has a binary counterpart.
    known = {("timm.layers.linear", "Linear"), ("timm.layers.conv2d_same", "Conv2dSame")}
    return kind in (nn.Conv2d, nn.Linear) or (kind.__module__, kind.__name__) in known


def _configured(model: nn.Module, key: str) -> frozenset[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get(key) or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    known = {name for name, _ in model.named_modules()}
    return frozenset(name for name in names if name in known)


def _within(name: str, places: frozenset[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
