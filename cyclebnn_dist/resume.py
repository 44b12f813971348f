"""What a run carries over a restart: gathered from its parts, and given back to them in a fixed order."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cyclebnn_dist.buffers import averaged_buffers, load_buffers, model_state, persistent_buffers
from cyclebnn_dist.checkpoint import Snapshot, read_meta, read_own, read_shared
from cyclebnn_dist.config import SAVED_NAME, load_saved
from cyclebnn_dist.config.recipe import EngineConfig
from cyclebnn_dist.run import Run
from cyclebnn_dist.world import all_succeed

log = logging.getLogger(__name__)


def take_snapshot(run: Run) -> Snapshot:
    """Collective: every rank calls this. The state of the run at its current step, not copied; changes none of it."""
    main = run.world.is_main
    buffers = averaged_buffers(run.model, world=run.world)
    ema_buffers = averaged_buffers(run.ema.module, world=run.world) if run.ema else {}
    evaluated = run.totals.evaluation.get("step") == run.step
    engine_state = run.engine.state_dict()
    return Snapshot(
        step=run.step,
        model=model_state(run.model, buffers) if main else {},
        ema=model_state(run.ema.module, ema_buffers) if main and run.ema else {},
        shared={"engine": engine_state, "totals": run.totals.state_dict()} if main else {},
        own={
            "buffers": persistent_buffers(run.model),
            "ema_buffers": persistent_buffers(run.ema.module) if run.ema else {},
            "reducer": run.reducer.state_dict(),
            "data": run.train_loader.state_dict(),
            "random": random_state(),
        },
        facts={
            "schedule": run.schedule.digest(),
            "total_steps": run.total_steps,
            "steps_per_epoch": run.steps_per_epoch,
            "eval_forward_bits": run.eval_forward_bits,
            "comm_verdict": run.verdict.state_dict() if run.verdict else None,
            "weights": run.phases.weights_after(run.step) if run.phases.first_steps else None,
            "evaluation": run.totals.evaluation if evaluated else None,
            "teachers": run.objective.teachers,
        },
    )


def restore(run: Run, folder: Path) -> None:
    """Collective: every rank calls this. Give every part its state back: weights first, random states last."""

    def load() -> None:
        meta = read_meta(folder)
        run.model.load_state_dict(load_file(str(folder / "model.safetensors")))
        if run.ema:
            run.ema.module.load_state_dict(load_file(str(folder / "ema.safetensors")))
        shared = read_shared(folder)
        run.engine.load_state_dict(shared["engine"])
        run.totals.load_state_dict(shared["totals"])
        if meta["world_size"] == run.world.size:
            _restore_own(run, read_own(folder, rank=run.world.rank))
        else:
            _restore_of_others(run, folder, old_size=meta["world_size"])
        run.step = meta["step"]
        before = meta.get("teachers", run.objective.teachers)
        if before != run.objective.teachers and run.world.is_main:
            log.warning("teachers have other weights than before: %s, now %s", before, run.objective.teachers)
        changed = engine_change(load_saved(folder / SAVED_NAME).engine, run.recipe.engine)
        if changed and run.world.is_main:
            log.warning("%s was written under %s", folder.name, changed)

    all_succeed(run.world, load, what=f"loading checkpoint {folder}")


def engine_change(saved: EngineConfig, new: EngineConfig) -> str | None:
    """What another engine means for a run that goes on, in words; None if there is no other."""
    names = [
        "DDP" if config.name == "ddp" else f"DeepSpeed at stage {config.zero_stage}"
        for config in (saved, new)
    ]
    if names[0] == names[1]:
        return None
    return (
        f"{names[0]}, this run goes on under {names[1]}: weights, the optimizer's state and the loss scale are carried over "
        "as they are; what DeepSpeed keeps for itself (its timers, its counts of steps) starts anew"
    )


def _restore_own(run: Run, own: dict[str, Any]) -> None:
    load_buffers(run.model, own["buffers"])
    if run.ema:
        load_buffers(run.ema.module, own["ema_buffers"])
    run.reducer.load_state_dict(own["reducer"])
    run.train_loader.load_state_dict(own["data"])
    set_random_state(own["random"])


def _restore_of_others(run: Run, folder: Path, *, old_size: int) -> None:
    """What can be kept of ranks that were more or fewer: counters and position of rank 0, residuals shared out anew."""
    if run.recipe.comm.error_feedback and 1 in (old_size, run.world.size):
        residuals = "one rank quantizes nothing: residuals of the all-reduce start from zero"
    else:
        residuals = "residuals of the all-reduce are shared out anew"
    if run.world.is_main:
        log.warning(
            "%s was written by %d ranks, this run has %d: normalization statistics are their average%s",
            folder.name,
            old_size,
            run.world.size,
            f", {residuals}" if run.recipe.comm.error_feedback else "",
        )
    first = read_own(folder, rank=0, at=["reducer", "counters"])
    run.reducer.counters.load_state_dict(first)
    run.train_loader.load_state_dict(read_own(folder, rank=0, at=["data"]))

    def read(rank: int, phase: str) -> Mapping[str, torch.Tensor]:
        if old_size == 1:
            return {}
        return read_own(folder, rank=rank, at=["reducer", "residuals", phase])

    run.reducer.reshard_residuals(old_size, read)


def seed_generators(seed: int) -> None:
    """Seed this process's global random generators: torch (CPU, GPU), numpy, Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """States of this process's global random generators: torch (CPU, GPU), numpy, Python."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
