"""The run: its parts on one rank, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from cyclebnn_dist.agreement import Agreement
from cyclebnn_dist.binary import Health
from cyclebnn_dist.checkpoint import Saver
from cyclebnn_dist.comm import Reducer
from cyclebnn_dist.comm.breakeven import Mode
from cyclebnn_dist.comm.verdict import Verdict
from cyclebnn_dist.config import Recipe
from cyclebnn_dist.data import EvalLoader, Mixing, TrainLoader
from cyclebnn_dist.engine import Engine
from cyclebnn_dist.guards.preempt import PreemptionFlag
from cyclebnn_dist.guards.stop_vote import StopVote
from cyclebnn_dist.guards.watchdog import Watchdog
from cyclebnn_dist.losses import Objective
from cyclebnn_dist.metrics import Console, Journal, Totals, WandbRun
from cyclebnn_dist.phases import Phases
from cyclebnn_dist.precision.schedule import Schedule
from cyclebnn_dist.timm_import import timm
from cyclebnn_dist.world import World


@dataclass
class Run:
    """The parts of a run on one rank, and how far it has come."""

    recipe: Recipe
    run_dir: Path
    world: World
    model: nn.Module
    ema: timm.utils.ModelEmaV3 | None
    engine: Engine
    reducer: Reducer
    schedule: Schedule
    phases: Phases
    agreement: Agreement
    train_loader: TrainLoader
    mixing: Mixing
    objective: Objective
    eval_loader: EvalLoader
    health: Health
    totals: Totals
    journal: Journal | None
    console: Console
    wandb: WandbRun
    preemption: PreemptionFlag
    vote: StopVote
    watchdog: Watchdog
    saver: Saver
    total_steps: int
    steps_per_epoch: int
    eval_forward_bits: int
    comm_mode: Mode
    """fp32, bf16 or quantized: the recipe's, or what ``auto`` took."""
    verdict: Verdict | None = None
    """Why, where ``auto`` decided."""
    step: int = 0
    """Finished optimizer steps, skipped ones included."""

    def write_row(
        self, kind: Literal["train", "eval", "health", "checkpoint"], row: Mapping[str, float | str]
    ) -> None:
        """Write one row to metrics.jsonl and Weights & Biases (rank 0 has them)."""
        if self.journal is not None:
            self.journal.write({"event": kind, "step": self.step, **row})
            self.wandb.log({f"{kind}/{name}": value for name, value in row.items()}, step=self.step)
