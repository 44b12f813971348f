"""The totals of a run: what its steps added up to over all its lives. Part of every checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cyclebnn_dist.precision.schedule import Widths

COUNTED = ("steps", "real_weight_steps")


@dataclass
class Totals:
    """Counted by the loop, one call a step. Steps that a kill threw away are not in it: it is restored with the step."""

    images: int = 0
    """Images trained on, over all ranks."""
    steps: Counter[Widths] = field(default_factory=Counter)
    """How many steps ran at which widths."""
    real_weight_steps: Counter[Widths] = field(default_factory=Counter)
    """Those of them that were of a first phase with real weights."""
    skipped_steps: int = 0
    """Steps whose update was skipped for a non-finite gradient."""
    skipped_in_a_row: int = 0
    """The newest of them: steps since the last update."""
    train_seconds: float = 0.0
    """Time in training steps, without evaluation and saving."""
    data_seconds: float = 0.0
    """Part of it spent waiting for images."""
    agreement_seconds: float = 0.0
    """Part of it spent in the exchanges by which ranks agree, waiting for slower ranks included."""
    eval_seconds: float = 0.0
    """Time in evaluation."""
    save_seconds: float = 0.0
    """Time that training stood still for checkpoints."""
    failed_checkpoints: int = 0
    """Checkpoints that could not be written."""
    best_top1: float = 0.0
    """Best validation accuracy so far, in percent."""
    best_step: int = -1
    """The step it was reached at; -1 before any."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The newest evaluation: top1 and top5 in percent, loss, images, step; weights, where a run has two phases."""
    worlds: list[dict[str, Any]] = field(default_factory=list)
    """Where the number of ranks changed, see worlds.py."""

    def add_step(
        self,
        widths: Widths,
        *,
        real_weights: bool = False,
        images: int,
        seconds: float,
        data_seconds: float,
        agreement_seconds: float,
        skipped: bool,
    ) -> None:
        """Count one optimizer step (an attempted one, if ``skipped``)."""
        self.steps[widths] += 1
        self.real_weight_steps[widths] += int(real_weights)
        self.images += images
        self.train_seconds += seconds
        self.data_seconds += data_seconds
        self.agreement_seconds += agreement_seconds
        self.skipped_steps += int(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def add_evaluation(
        self, row: Mapping[str, Any], *, images: int, step: int, competes: bool = True
    ) -> None:
        """Keep an evaluation as the newest, and as the best if its top-1 is and it ``competes`` (with binary weights)."""
        self.evaluation = {**row, "images": images, "step": step}
        if competes and (self.best_step < 0 or row["top1"] > self.best_top1):
            self.best_top1, self.best_step = row["top1"], step

    def bits(self, channel: str) -> tuple[int, float, int]:
        """Smallest, mean and largest width in bits of ``forward``, ``backward`` or ``communication``."""
        used = Counter[int]()
        for widths, count in self.steps.items():
            used[getattr(widths, f"{channel}_bits")] += count
        mean = sum(bits * count for bits, count in used.items()) / max(1, used.total())
        return min(used, default=0), mean, max(used, default=0)

    def state_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in COUNTED}
        return {**plain, **{name: _rows(getattr(self, name)) for name in COUNTED}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, _counter(value) if name in COUNTED else value)


def _rows(steps: Counter[Widths]) -> list[list[int]]:
    return [
        [w.forward_bits, w.backward_bits, w.communication_bits, count] for w, count in steps.items() if count
    ]


def _counter(rows: list[list[int]]) -> Counter[Widths]:
    return Counter({Widths(f, b, c): count for f, b, c, count in rows})
