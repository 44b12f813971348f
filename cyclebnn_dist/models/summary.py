"""The summary of a recipe's model: what is swapped, and what it all costs, before anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from cyclebnn_dist.binary import CONVENTIONS, count
from cyclebnn_dist.binary.count import REAL_BITS
from cyclebnn_dist.config.recipe import BinaryConfig, Recipe
from cyclebnn_dist.models.build import build_model
from cyclebnn_dist.models.memory import bytes_by_batch
from cyclebnn_dist.models.teacher import load_teachers
from cyclebnn_dist.precision import build_schedule, training_saving

SCHEDULE_STEPS = 20_000
"""The images are not looked at: the schedule is averaged over a run of this many steps."""


def summarize_recipe(recipe: Recipe, *, as_json: bool = False, convention: str | None = None) -> str:
    """A table of layers with the totals under it, or the same as one JSON object.

    Operations are added up by the one of ``binary.CONVENTIONS`` of this name; by default the usual one, or that which
    charges the recipe's 8-bit edges as such.

    Pretrained weights are not fetched: they change no number.

    Raises:
        RecipeError: as ``build_model``.
    """
    summary = describe_recipe(recipe, convention=convention)
    return json.dumps(summary) if as_json else _render(summary)


def describe_recipe(recipe: Recipe, *, convention: str | None = None) -> dict[str, Any]:
    """Layers, operations, parameters, sizes and training saving of the recipe's model, as plain values."""
    edge_bits = recipe.binary.edge_bits
    convention = convention or ("bireal" if edge_bits == REAL_BITS else "bnext")
    side = recipe.data.image_size
    new = replace(recipe.model, pretrained=False, weights="")
    model, swap = build_model(new, recipe.binary, image_size=side)
    counts = count(model, input_size=(3, side, side), convention=convention)
    steps_per_epoch = max(1, round(SCHEDULE_STEPS / recipe.train.epochs))
    schedule = build_schedule(recipe.precision, total_steps=SCHEDULE_STEPS, steps_per_epoch=steps_per_epoch)
    first_steps = round(SCHEDULE_STEPS * recipe.first_phase.epochs / recipe.train.epochs)
    saving = training_saving(counts, schedule.counts(begin=first_steps), full_steps=first_steps)
    memory: dict[str, Any] = {
        "image_size": side,
        "amp": recipe.train.amp,
        "channels_last": recipe.model.channels_last,
    }
    real, _ = build_model(new, BinaryConfig(method="none"), image_size=side)
    real_ops = count(real, input_size=(3, side, side)).ops
    per_image, constant = bytes_by_batch(model, **memory)
    layers = []
    for row, layer in zip(swap.rows, counts.layers, strict=True):
        assert row.name == layer.name
        layers.append({**asdict(row), **asdict(layer)})
    return {
        "model": recipe.model.name,
        "method": recipe.binary.method,
        "image_size": side,
        "num_layers": len(layers),
        "num_swapped": swap.num_swapped,
        "activation": swap.activation,
        "edge_bits": edge_bits,
        "num_narrow": len(swap.narrow),
        "num_activations_replaced": len(swap.activations),
        "num_blocks_with_shortcuts": len(swap.shortcuts),
        "one_sided_inputs": list(swap.one_sided_inputs),
        "bops": counts.bops,
        "flops": counts.flops,
        "charged_flops": counts.charged_flops,
        "convention": convention,
        "ops": counts.ops,
        "ops_real": real_ops,
        "params": counts.params,
        "binary_params": counts.binary_params,
        "size_bits": counts.size_bits,
        "activation_bytes": per_image,
        "activation_bytes_constant": constant,
        "activation_bytes_real": bytes_by_batch(real, **memory)[0],
        "amp": recipe.train.amp,
        "recompute": recipe.binary.recompute,
        "training_saving": saving.model,
        "training_saving_binary_layers": saving.binary_layers,
        "teachers": _count_teachers(recipe),
        "layers": layers,
    }


def _count_teachers(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Operations of a forward pass of each teacher, and its parameters, by name."""
    side = recipe.data.image_size
    counts = {
        name: count(teacher.network, input_size=(3, side, side))
        for name, teacher in load_teachers(recipe, trained=False).items()
    }
    return {
        name: {"bops": each.bops, "flops": each.flops, "params": each.params} for name, each in counts.items()
    }


def _render(summary: dict[str, Any]) -> str:
    cells = [("layer", "kind", "weight", "output", "parameters", "MACs", "method")]
    for layer in summary["layers"]:
        cells.append(
            (
                layer["name"],
                layer["kind"],
                " x ".join(map(str, layer["shape"])),
                " x ".join(map(str, layer["output_shape"])),
                f"{layer['params']:,}",
                f"{layer['macs']:,}",
                layer["method"] if layer["swapped"] else f"{_kept_as(layer['bits'])}: {layer['reason']}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {4, 5}
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    full_bits = 32 * summary["params"]
    methods = sorted({layer["method"] for layer in summary["layers"] if layer["swapped"]})
    rule = CONVENTIONS[summary["convention"]]
    totals = {
        "model": f"{summary['model']}, {summary['num_swapped']} of {summary['num_layers']} layers binary "
        f"({', '.join(methods) or 'none'}), {summary['image_size']} px",
        "operations": f"{summary['ops']:.4g} OPs = {summary['bops']:.4g} BOPs / {1 / rule.binary_share:g} "
        f"+ {summary['charged_flops']:.4g} FLOPs, "
        f"{100 * summary['ops'] / summary['ops_real']:.1f} % of the real model's {summary['ops_real']:.4g}",
        "convention": f"{summary['convention']}: {rule.words}"
        + (f"; here they have {REAL_BITS}" if rule.edge_share < 1 and not summary["num_narrow"] else ""),
        "parameters": f"{summary['params']:,}, of them {summary['binary_params']:,} binary",
        "size": f"{summary['size_bits'] / 8e6:.2f} MB (1 bit a binary weight{', 8 in stem, classifier and gates' if summary['num_narrow'] else ''}), {full_bits / 8e6:.2f} MB in fp32",
        "activations": f"{summary['activation_bytes'] / 1e6:.2f} MB an image kept for the backward pass, and {summary['activation_bytes_constant'] / 1e6:.2f} MB in all "
        f"({summary['amp']}, uncompiled{', recomputing' if summary['recompute'] else ''}; "
        f"the real model {summary['activation_bytes_real'] / 1e6:.2f} MB)",
        "training": f"{100 * summary['training_saving']:.1f} % of the model's operations saved, "
        f"{100 * summary['training_saving_binary_layers']:.1f} % of the binary layers' (CPT's cost formula)",
    }
    if summary["teachers"]:
        totals["teachers"] = "forward passes in training only: " + ", ".join(
            f"{name} {each['flops'] + each['bops']:.4g} MACs an image, {each['params']:,} parameters"
            for name, each in summary["teachers"].items()
        )
    if summary["num_activations_replaced"]:
        totals["nonlinearity"] = f"{summary['num_activations_replaced']} replaced by {summary['activation']}"
    if summary["num_blocks_with_shortcuts"]:
        totals["shortcuts"] = (
            f"around each convolution of {summary['num_blocks_with_shortcuts']} residual blocks"
        )
    if summary["one_sided_inputs"]:
        totals["warning"] = f"never negative inputs, all signs +1: {', '.join(summary['one_sided_inputs'])}"
    width = max(map(len, totals))
    lines += ["", *(f"{name:<{width}}  {text}" for name, text in totals.items())]
    return "\n".join(lines)


def _kept_as(bits: int) -> str:
    return "real" if bits == REAL_BITS else f"{bits} bits"
