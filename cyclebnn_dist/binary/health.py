"""The health of binary layers: how many signs flip, how many inputs get no gradient, how large latent weights are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.parameters import binary_modules
from cyclebnn_dist.binary.signs import count_differences, packed_signs
from cyclebnn_dist.binary.trial import undisturbed

SATURATED = 0.99
"""A layer with a larger share of saturated inputs passes almost no gradient."""
PATIENCE = 5
"""Measurements in a row that must agree before there is a warning."""
SHOWN_LAYERS = 3

MEASURES = ("flip_rate", "saturated_inputs", "saturated_weights", "latent_magnitude")


class Health:
    """Measures the binary layers of a model every so many steps; nothing of the training depends on it.

    - flip_rate: share of a layer's weights whose binary sign is another than at the measurement before, ``every`` steps
      ago. Signs are those of evaluation with quantization off, whatever the schedule's width: a flip is a latent weight
      that crossed its method's threshold, never the cycle's doing.
    - saturated_inputs: share of a layer's inputs at which the gradient of its sign is 0 (for EDE: negligible), over the
      first pass of the step and the mean over ranks. At the width of that step, for CycleBNN's gradient depends on it.
    - saturated_weights: the same of latent weights, for methods that cut their gradient; absent while weights are real.
    - latent_magnitude: mean |w| of the latent weights.

    Signs are kept at one bit a weight and are no part of a checkpoint: after a restart between two measurements the
    first flip rate is absent, and no flip rate is ever over other than ``every`` steps.

    Args:
        every: steps between two measurements; 0 for never.
        compiled: whether the model is compiled; hooks do not run then, so its inputs are measured in a pass of their own.
    """

    def __init__(self, model: nn.Module, *, every: int, compiled: bool = False) -> None:
        self._model = model
        self._layers = dict(binary_modules(model))
        self._every = every
        self._compiled = compiled
        self._signs: dict[str, Tensor] = {}
        self._signs_step = -1
        self._seen: dict[str, list[Tensor]] = {}
        self._times_saturated = Counter[str]()
        self._num_flip_rates = 0
        self._never_flipped: set[str] = set()
        self._told: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether there is a measurement when ``step`` steps are finished."""
        return bool(self._layers) and self._every > 0 and step % self._every == 0

    def begin(self, step: int) -> None:
        """Take the signs a run of the loop starts from, where the next flip rate is to be counted from there."""
        if self.due(step):
            self._signs, self._signs_step = packed_signs(self._layers), step
        self._never_flipped = set(self._layers) if step == 0 else set()

    def watching(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``forward`` with the inputs of every binary layer looked at as they pass, and the same result."""

        def watched(images: Tensor) -> Tensor:
            if not self._compiled:
                with self._hooks():
                    return forward(images)
            with undisturbed(self._model), torch.compiler.set_stance("force_eager"), self._hooks():
                forward(images)
            return forward(images)

        return watched

    def take_saturated_inputs(self) -> Tensor:
        """Shares of saturated inputs [layers] that were seen since the last call, fp32 on the CPU; NaN: not measured."""
        unknown = [next(self._model.parameters()).new_full((), torch.nan, dtype=torch.float32)]
        shares = [torch.stack(self._seen.get(name, unknown)).mean() for name in self._layers]
        self._seen = {}
        return torch.stack(shares).cpu()

    @torch.no_grad()
    def measure(
        self, step: int, *, saturated_inputs: Tensor, at_highest_width: bool = True
    ) -> dict[str, float]:
        """A row of numbers: least, mean and largest of every measure over the layers, then every layer's own.

        Args:
            step: finished steps.
            saturated_inputs: shares [layers] as ``take_saturated_inputs`` gives them.
            at_highest_width: whether the step had the schedule's highest forward width. Only then do saturated inputs
                count for a warning: CycleBNN takes its gradient behind the quantizer, and at 2 bits there is often
                no level within (-1, 1), so that whole layers saturate by design.

        Returns:
            ``flip_rate_min``, ``flip_rate_mean``, ``flip_rate_max``, ``flip_rate/<layer>`` and so on for all
            ``MEASURES``; what was not measured is left out.
        """
        signs = packed_signs(self._layers)
        flips: dict[str, Tensor] = {}
        if step - self._signs_step == self._every:
            flips = {name: count_differences(signs[name], before) for name, before in self._signs.items()}
        self._signs, self._signs_step = signs, step
        found: dict[str, dict[str, Tensor]] = {measure: {} for measure in MEASURES}
        for (name, module), inputs in zip(self._layers.items(), saturated_inputs, strict=True):
            if name in flips:
                found["flip_rate"][name] = flips[name] / module.weight.numel()
            if not inputs.isnan():
                found["saturated_inputs"][name] = inputs
            weights = module.binarizer.weight_saturation(module.weight)
            if weights is not None and not module.binarizer.real_weights:
                found["saturated_weights"][name] = weights
            found["latent_magnitude"][name] = module.weight.abs().mean(dtype=torch.float32)
        rows = {
            measure: dict(zip(by_layer, torch.stack(list(by_layer.values())).tolist(), strict=True))
            for measure, by_layer in found.items()
            if by_layer
        }
        self._remember(rows, at_highest_width=at_highest_width)
        result: dict[str, float] = {}
        for measure, row in rows.items():
            values = row.values()
            result |= {
                f"{measure}_min": min(values),
                f"{measure}_mean": sum(values) / len(values),
                f"{measure}_max": max(values),
            }
        for measure, row in rows.items():
            result |= {f"{measure}/{name}": value for name, value in row.items()}
        return result

    def _remember(self, rows: dict[str, dict[str, float]], *, at_highest_width: bool) -> None:
        shares = rows.get("saturated_inputs", {}) if at_highest_width else {}
        for name, share in shares.items():
            self._times_saturated[name] = self._times_saturated[name] + 1 if share > SATURATED else 0
        if "flip_rate" in rows:
            self._num_flip_rates += 1
            self._never_flipped -= {name for name, rate in rows["flip_rate"].items() if rate > 0.0}

    def warnings(self, *, lr: float) -> Iterator[str]:
        """What is clearly wrong with the measurements so far; each of the two warnings comes once.

        Args:
            lr: learning rate of the latent weights.
        """
        saturated = [name for name, times in self._times_saturated.items() if times >= PATIENCE]
        if saturated and "saturated" not in self._told:
            self._told.add("saturated")
            yield (
                f"more than {SATURATED:.0%} of the inputs of {_listed(saturated)} got no gradient in {PATIENCE} "
                "measurements in a row at the highest width: what lies before learns almost nothing through their sign"
            )
        never = sorted(self._never_flipped) if self._num_flip_rates >= PATIENCE else []
        if never and lr > 0.0 and "never flipped" not in self._told:
            self._told.add("never flipped")
            yield (
                f"no binary weight of {_listed(never)} has changed its sign since the run began: "
                f"a learning rate of {lr:.1e} may be too low for latent weights of this magnitude"
            )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Hooks that look at the inputs of the binary layers, and are gone afterwards."""
        handles = []
        for name, module in self._layers.items():

            @torch.no_grad()
            def look(
                module: BinaryConv2d | BinaryLinear,
                inputs: tuple[Tensor, ...],
                named: dict[str, Any],
                name: str = name,
            ) -> None:
                share = module.binarizer.input_saturation(inputs[0] if inputs else named["input"])
                if share is not None:
                    self._seen.setdefault(name, []).append(share)

            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_LAYERS} layers more" if len(names) > SHOWN_LAYERS else ""
    return ", ".join(names[:SHOWN_LAYERS]) + more
