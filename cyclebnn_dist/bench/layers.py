"""``cyclebnn bench layers``: what binary layers cost in training, beside the real model and beside a plain composition."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from cyclebnn_dist.bench.composed import ComposedCycleBNNConv2d
from cyclebnn_dist.bench.paired import Ratio, ratio_to, time_in_turn
from cyclebnn_dist.binary import METHODS, BinaryConv2d, set_widths
from cyclebnn_dist.binary.activations import Hardtanh
from cyclebnn_dist.binary.rebuild import keep_less_
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig, Method, ModelConfig
from cyclebnn_dist.models.build import build_model
from cyclebnn_dist.models.memory import activation_bytes

FORWARD_BITS, BACKWARD_BITS = 4, 8
REAL = "real"
LAYER_SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and side of the inner convolutions of a ResNet-18 at 224 pixels."""


@dataclass(frozen=True)
class Variant:
    """One way to train the model, measured."""

    variant: str
    method: str
    recompute: bool
    median_seconds: float
    time_ratio: Ratio
    """To the real model's step."""
    activation_bytes: int
    bytes_ratio: float


@dataclass(frozen=True)
class LayerRow:
    """One convolution with the normalization and activation behind it, ours and composed of ordinary operations."""

    layer: str
    time_ratio: Ratio
    """Ours to the real layer's."""
    times_faster: Ratio
    """Ours than the composed one."""
    added_times_less: float | None
    """What the composed layer adds to the real one's time, divided by what ours adds; None where ours is not slower."""
    times_leaner: float
    """Bytes of the composed layer, divided by ours."""
    activation_bytes: int
    composed_bytes: int


def bench_layers(
    *,
    methods: Sequence[str] | None = None,
    model: str = "resnet18",
    batch: int = 16,
    image_size: int = 224,
    seconds: float = 150.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure one training step (forward and backward pass, fp32, eager) of every method, and of single layers.

    Args:
        methods: names of ``METHODS``; without them all published ones (their twins as released cost the same).
        seconds: about how long to measure, in all.

    Returns:
        Plain values: ``machine``, ``variants`` (as ``Variant``), ``layers`` (as ``LayerRow``).

    Raises:
        RecipeError: an argument that cannot be measured with.
    """
    methods = methods or sorted(name for name in METHODS if not name.endswith("_released"))
    _check(methods, batch=batch, seconds=seconds, device=device)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    models = {REAL: _model(model, "none", recompute=False, image_size=image_size, device=device)}
    for method in methods:
        for recompute in (False, True):
            name = f"{method}, recompute" if recompute else method
            models[name] = _model(model, method, recompute=recompute, image_size=image_size, device=device)
    kept = {name: activation_bytes(each, images) for name, each in models.items()}
    steps = {name: _step(each, images) for name, each in models.items()}
    times = time_in_turn(steps, seconds=0.8 * seconds)
    variants = [
        Variant(
            variant=name,
            method=name.split(",")[0] if name != REAL else "none",
            recompute=name.endswith("recompute"),
            median_seconds=sorted(times[name])[len(times[name]) // 2],
            time_ratio=ratio_to(times[name], times[REAL]),
            activation_bytes=kept[name],
            bytes_ratio=kept[name] / kept[REAL],
        )
        for name in models
    ]
    del models, steps
    rows = list(_bench_single_layers(batch=batch, seconds=0.2 * seconds, device=device))
    return {
        "machine": describe_machine(device),
        "model": model,
        "batch": batch,
        "image_size": image_size,
        "rounds": len(times[REAL]),
        "variants": [asdict(variant) for variant in variants],
        "layers": [asdict(row) for row in rows],
    }


def _check(methods: Sequence[str], *, batch: int, seconds: float, device: str) -> None:
    for method in methods:
        if method not in METHODS:
            raise RecipeError(
                "--methods", f"there is no method '{method}'", f"there are: {', '.join(METHODS)}"
            )
    if batch < 2:
        raise RecipeError("--batch", f"{batch} is too small to normalize over", "make it 2 or more")
    if not seconds > 0.0:
        raise RecipeError("--seconds", f"{seconds:g} is no time", "make it more than 0")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device", "torch sees no GPU here", "leave it at cpu")


def describe_machine(device: str) -> dict[str, Any]:
    """What ratios and times were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _model(name: str, method: str, *, recompute: bool, image_size: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    binary = BinaryConfig(method=cast(Method, method), recompute=recompute)
    model, _ = build_model(ModelConfig(name=name), binary, image_size=image_size)
    if method != "none":
        set_widths(model, forward_bits=FORWARD_BITS, backward_bits=BACKWARD_BITS)
    return model.to(device)


def _step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(images).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def _bench_single_layers(*, batch: int, seconds: float, device: str) -> Iterable[LayerRow]:
    for channels, side in LAYER_SHAPES:
        images = torch.randn(batch, channels, side, side, device=device)
        blocks = {kind: _block(channels, kind).to(device) for kind in ("real", "ours", "composed")}
        set_widths(blocks["ours"], forward_bits=FORWARD_BITS, backward_bits=BACKWARD_BITS)
        kept = {kind: activation_bytes(block, images) for kind, block in blocks.items()}
        steps = {kind: _step(block, images) for kind, block in blocks.items()}
        times = time_in_turn(steps, seconds=seconds / len(LAYER_SHAPES))
        added = {
            kind: [each - real for each, real in zip(times[kind], times["real"], strict=True)]
            for kind in ("ours", "composed")
        }
        composed = statistics.median(added["composed"])
        yield LayerRow(
            layer=f"3x3, {channels} channels, {side}x{side}",
            time_ratio=ratio_to(times["ours"], times["real"]),
            times_faster=ratio_to(times["composed"], times["ours"]),
            added_times_less=composed / ours if (ours := statistics.median(added["ours"])) > 0.0 else None,
            times_leaner=kept["composed"] / kept["ours"],
            activation_bytes=kept["ours"],
            composed_bytes=kept["composed"],
        )


def _block(channels: int, kind: str) -> nn.Sequential:
    """Normalization, activation, 3x3 convolution, normalization: what lies between two sums of a residual network."""
    torch.manual_seed(0)
    real = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
    middle: dict[str, tuple[nn.Module, nn.Module]] = {
        "real": (nn.ReLU(inplace=True), real),
        "ours": (Hardtanh(inplace=True), BinaryConv2d.from_real(real, method="cyclebnn")),
        "composed": (
            nn.Hardtanh(inplace=True),
            ComposedCycleBNNConv2d(channels, forward_bits=FORWARD_BITS, backward_bits=BACKWARD_BITS),
        ),
    }
    block = nn.Sequential(nn.BatchNorm2d(channels), *middle[kind], nn.BatchNorm2d(channels))
    if kind == "ours":
        keep_less_(block, recompute=False, input_size=(channels, 8, 8))
    return block


def render(result: dict[str, Any]) -> str:
    """Tables for people."""
    machine = result["machine"]
    lines = [
        f"one training step of {result['model']}, batch {result['batch']}, {result['image_size']} px, fp32, eager, "
        f"{result['rounds']} rounds in turn",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        "",
        f"{'variant':<28}{'seconds':>9}{'time / real (95 %)':>24}{'kept MB':>10}{'/ real':>8}",
    ]
    for row in result["variants"]:
        ratio = str(Ratio(**row["time_ratio"]))
        lines.append(
            f"{row['variant']:<28}{row['median_seconds']:>9.3f}{ratio:>24}"
            f"{row['activation_bytes'] / 1e6:>10.0f}{row['bytes_ratio']:>8.3f}"
        )
    lines += [
        "",
        "one CycleBNN convolution between normalizations, beside the same composed of ordinary operations",
        f"{'layer':<28}{'time / real':>20}{'times faster':>20}{'added time less':>17}{'times leaner':>14}",
    ]
    for row in result["layers"]:
        ratios = [str(Ratio(**row[key])) for key in ("time_ratio", "times_faster")]
        less = row["added_times_less"]
        added = "-" if less is None else f"{less:.1f}x"
        lines.append(
            f"{row['layer']:<28}{ratios[0]:>20}{ratios[1]:>20}{added:>17}{row['times_leaner']:>13.1f}x"
        )
    return "\n".join(lines)
