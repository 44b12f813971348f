"""Training: the data flow from a recipe to a finished run."""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cyclebnn_dist import loop, resume
from cyclebnn_dist.agreement import Agreement
from cyclebnn_dist.batching import per_rank_batch, steps_per_epoch, total_steps
from cyclebnn_dist.binary import Health, parameter_kinds, scheduled_precision
from cyclebnn_dist.checkpoint import newest_checkpoint, read_meta
from cyclebnn_dist.comm import Reducer, build_reducer
from cyclebnn_dist.comm.mode import communicated_precision, fixed_mode
from cyclebnn_dist.comm.verdict import Verdict, measure_and_judge, settle
from cyclebnn_dist.config import RecipeError, recipe_digest, to_dict
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.data import EvalLoader, Mixing, Source, TrainLoader, in_flight, open_source
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.metrics import Console, Journal, Totals, WandbRun
from cyclebnn_dist.models import build_model
from cyclebnn_dist.optimizer import build_optimizer
from cyclebnn_dist.precision.schedule import Schedule, build_schedule
from cyclebnn_dist.preempt import PreemptionFlag
from cyclebnn_dist.report import summarize, write_summary
from cyclebnn_dist.run import Run
from cyclebnn_dist.run_folder import (
    check_run_folder,
    claim_run_folder,
    finished_summary,
    read_verdict,
    write_verdict,
)
from cyclebnn_dist.run_lock import run_lock
from cyclebnn_dist.timm_import import timm
from cyclebnn_dist.watchdog import Watchdog
from cyclebnn_dist.world import World, discover_world, join_world, leave_world, on_main, ranks_per_node

log = logging.getLogger(__name__)

FINISHED, FAILED, PREEMPTED = 0, 1, 75


def main(recipe: Recipe) -> int:
    """Collective: every rank calls this. Train to the end, or to a pre-emption, from wherever the run stands.

    Returns:
        FINISHED, or PREEMPTED if a signal asked to stop and a checkpoint was written.

    Raises:
        RecipeError: on every rank, for what the user can mend. The run folder is then as it was, unless training had
            begun; it can then be resumed.
    """
    world = discover_world()
    configure_logging(rank=world.rank, size=world.size)
    set_determinism(recipe.run.deterministic)
    world = join_world(world, timeout_seconds=recipe.run.collective_timeout_seconds)
    try:
        status = run_recipe(recipe, world)
    except RecipeError:
        raise
    except Exception as error:
        if world.size == 1:
            raise
        # A lost peer leaves collectives behind that never end, and tearing the groups down would wait for them.
        log.error("rank %d of %d ends: %s", world.rank, world.size, error, exc_info=error)
        logging.shutdown()
        os._exit(FAILED)
    leave_world()
    return status


def run_recipe(recipe: Recipe, world: World) -> int:
    """Collective: every rank calls this. ``main`` within process groups that exist already."""
    run_dir = Path(recipe.run.dir)
    finished = on_main(world, lambda: inspect_run_folder(run_dir, recipe))
    if finished:
        log.info("this run is finished already\n%s", finished)
        return FINISHED
    with ExitStack() as stack:
        on_main(world, lambda: stack.enter_context(run_lock(run_dir)))
        return go_on(recipe, world, run_dir=run_dir)


def go_on(recipe: Recipe, world: World, *, run_dir: Path) -> int:
    """Collective: every rank calls this. Train from the newest checkpoint of a run folder that is this job's alone."""
    images = on_main(world, lambda: scan_images(recipe))
    checkpoint = newest_checkpoint(run_dir, world=world)
    run = assemble(recipe, world, run_dir=run_dir, images=images, checkpoint=checkpoint)
    if checkpoint:
        resume.restore(run, checkpoint)
    announce(run)
    try:
        ended = loop.train(run)
    finally:
        run.watchdog.close()
    if ended == "preempted":
        return leave_preempted(run)
    summary = on_main(world, lambda: write_summary(run))
    run.wandb.summarize(summarize(run))
    run.console.close()
    log.info("finished\n%s", summary)
    close(run)
    return FINISHED


def inspect_run_folder(run_dir: Path, recipe: Recipe) -> str | None:
    """The summary of a run that has ended, else None; refuses a folder that is not this recipe's."""
    check_run_folder(run_dir, recipe)
    return finished_summary(run_dir, recipe)


def scan_images(recipe: Recipe) -> tuple[Source, Source]:
    """Training and validation images, after checking that there are enough of them."""
    train = open_source(recipe.data, "train", num_classes=recipe.model.num_classes)
    val = open_source(recipe.data, "val", num_classes=recipe.model.num_classes)
    steps_per_epoch(recipe.train, num_images=len(train))
    return train, val


def assemble(
    recipe: Recipe,
    world: World,
    *,
    run_dir: Path,
    images: tuple[Source, Source],
    checkpoint: Path | None,
) -> Run:
    """Collective: every rank calls this. Every part of a run, fresh; the run folder is claimed when all are built.

    Args:
        checkpoint: that the run will go on from; only what it says about ``comm.mode`` is read here.
    """
    in_flight.check_left_behind(run_dir / in_flight.FOLDER, images, world)
    train_images, val_images = images
    batch_size = per_rank_batch(recipe.train, world_size=world.size)
    mixing = Mixing(
        recipe.data,
        num_classes=recipe.model.num_classes,
        batch_size=batch_size,
        seed=recipe.run.seed,
        rank=world.rank,
    )
    epoch_steps = steps_per_epoch(recipe.train, num_images=len(train_images))
    run_steps = total_steps(recipe.train, steps_per_epoch=epoch_steps)
    resume.seed_generators(recipe.run.seed)
    model, swap_report = build_model(recipe.model, recipe.binary, image_size=recipe.data.image_size)
    model = place_model(model, recipe, world)
    precision = scheduled_precision(recipe.precision, model)
    resume.seed_generators(recipe.run.seed + 1 + world.rank)
    ema = timm.utils.ModelEmaV3(model, decay=recipe.train.ema_decay) if recipe.train.ema_decay else None
    optimizer = build_optimizer(model, recipe.optim, kinds=parameter_kinds(model))

    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "device": world.device}
    reading = {**place, "channels_last": recipe.model.channels_last, "in_flight": run_dir / in_flight.FOLDER}
    reducer = build_reducer(
        recipe.comm,
        model.named_parameters(),
        seed=recipe.run.seed,
        timeout_seconds=recipe.run.collective_timeout_seconds,
        ranks_per_node=ranks_per_node(world) if recipe.comm.hierarchical else 1,
        **place,
    )
    length = {"total_steps": run_steps, "steps_per_epoch": epoch_steps}
    wished = build_schedule(precision, **length, warn=False)
    agreement = Agreement(
        world,
        {
            "recipe": recipe_digest(recipe),
            "communication mode": recipe.comm.mode,
            "schedule": wished.digest(),
            "parameter layout": reducer.layout_digest,
            "codec": reducer.codec_digest,
            "backend": reducer.backend,
        },
        timeout_seconds=recipe.run.collective_timeout_seconds,
    )
    agreement.compare_constants()
    verdict = settle_mode(recipe, world, reducer, wished, run_dir=run_dir, checkpoint=checkpoint)
    comm_mode = verdict.mode if verdict else fixed_mode(recipe.comm.mode)
    precision = communicated_precision(precision, comm_mode, world_size=world.size)
    schedule = build_schedule(precision, **length, warn=world.is_main)
    agreement.settle({"communication mode": comm_mode, "schedule": schedule.digest()})
    engine = DDPEngine(
        model, optimizer, reducer, config=recipe.engine, amp=recipe.train.amp, device=world.device
    )
    train_loader = TrainLoader(
        train_images,
        recipe.data,
        batch_size=batch_size,
        steps_per_epoch=epoch_steps * recipe.train.accumulation,
        seed=recipe.run.seed,
        **reading,
    )
    eval_loader = EvalLoader(val_images, recipe.data, batch_size=recipe.eval.batch_size, **reading)

    def claim() -> int:
        life = claim_run_folder(run_dir, recipe, swap_report.render())
        if verdict:
            write_verdict(run_dir, verdict.state_dict())
        return life

    life = on_main(world, claim)
    return Run(
        recipe=recipe,
        run_dir=run_dir,
        world=world,
        model=model,
        ema=ema,
        engine=engine,
        reducer=reducer,
        schedule=schedule,
        agreement=agreement,
        train_loader=train_loader,
        mixing=mixing,
        eval_loader=eval_loader,
        health=Health(model, every=recipe.run.health_every, compiled=recipe.model.compile),
        totals=Totals(),
        journal=Journal(run_dir, life=life) if world.is_main else None,
        console=Console(total_steps=run_steps, enabled=world.is_main),
        wandb=WandbRun(run_dir, recipe.wandb, recipe=to_dict(recipe), enabled=world.is_main),
        preemption=PreemptionFlag().install(),
        watchdog=Watchdog(recipe.run.progress_timeout_seconds),
        total_steps=run_steps,
        steps_per_epoch=epoch_steps,
        eval_forward_bits=recipe.eval.forward_bits or precision.forward.high,
        comm_mode=comm_mode,
        verdict=verdict,
    )


def settle_mode(
    recipe: Recipe,
    world: World,
    reducer: Reducer,
    schedule: Schedule,
    *,
    run_dir: Path,
    checkpoint: Path | None,
) -> Verdict | None:
    """Collective: every rank calls this. What ``comm.mode=auto`` takes: as the run did before, else by measurement.

    Args:
        schedule: with the recipe's widths of communication.
    """
    if recipe.comm.mode != "auto" or world.size == 1:
        return None

    def stored() -> list[dict[str, Any]]:
        of_checkpoint = read_meta(checkpoint).get("comm_verdict") if checkpoint else None
        return [state for state in (of_checkpoint, read_verdict(run_dir)) if state]

    widths = Counter(schedule.communication.first(schedule.total_steps))
    return settle(
        world=world,
        stored=stored,
        measure=lambda: measure_and_judge(reducer, widths, world=world, bucket_mb=recipe.engine.bucket_mb),
    )


def place_model(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The model on its device, in its memory layout, with its batch normalization shared and compiled if asked."""
    if recipe.model.sync_bn:
        if world.device.type != "cuda":
            raise RecipeError(
                "model.sync_bn", "torch shares batch statistics on GPUs only", "set it to false on CPUs"
            )
        model = timm.layers.convert_sync_batchnorm(model)
    model = model.to(world.device)
    if recipe.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.model.compile:
        model.compile()
    return model


def set_determinism(deterministic: bool) -> None:
    """Deterministic kernels where asked for; cuDNN's own choice of the fastest ones otherwise."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def announce(run: Run) -> None:
    """Say where the run starts and on what."""
    where = "starting" if run.step == 0 else f"resuming from the checkpoint of step {run.step}"
    log.info(
        "%s: %s, %d ranks on %s, %d steps of %d images, folder %s",
        where,
        run.recipe.model.name,
        run.world.size,
        run.world.device.type,
        run.total_steps,
        run.recipe.train.global_batch_size,
        run.run_dir,
    )
    if run.journal:
        run.journal.write(
            {"event": "start", "step": run.step, "ranks": run.world.size, "comm_mode": run.comm_mode}
        )


def leave_preempted(run: Run) -> int:
    """Collective: every rank calls this. After the checkpoint: let submitit requeue the job, where it listens."""
    log.warning("stopped at step %d of %d with a checkpoint; start again to go on", run.step, run.total_steps)
    run.wandb.mark_preempting()
    close(run, finish_wandb=False)
    run.preemption.hand_over()
    return PREEMPTED


def close(run: Run, *, finish_wandb: bool = True) -> None:
    """Release what the run holds on this rank."""
    run.console.close()
    run.train_loader.close()
    run.eval_loader.close()
    run.reducer.close()
    run.preemption.uninstall()
    if run.journal:
        run.journal.close()
    if finish_wandb:
        run.wandb.finish()
