"""Training: the data flow from a recipe to a finished run."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from cyclebnn_dist import loop, resume
from cyclebnn_dist.agreement import Agreement
from cyclebnn_dist.batching import per_rank_batch, steps_per_epoch, total_steps
from cyclebnn_dist.binary import Health, parameter_kinds, scheduled_precision
from cyclebnn_dist.checkpoint import Saver, newest_checkpoint, read_meta
from cyclebnn_dist.comm import Reducer, build_reducer
from cyclebnn_dist.comm.mode import communicated_precision, fixed_mode
from cyclebnn_dist.comm.verdict import Verdict, measure_and_judge, settle
from cyclebnn_dist.config import RecipeError, recipe_digest, to_dict
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.data import EvalLoader, Mixing, Source, TrainLoader, in_flight, open_source
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.exit_status import FAILED, FINISHED, INTERRUPTED, PREEMPTED
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.metrics import Console, Journal, Totals, WandbRun, begin_world
from cyclebnn_dist.models import build_model
from cyclebnn_dist.optimizer import build_optimizer
from cyclebnn_dist.peer_watch import watching_peers
from cyclebnn_dist.precision.schedule import Schedule, build_schedule
from cyclebnn_dist.preempt import Preempted, PreemptionFlag, listening
from cyclebnn_dist.report import running_totals, summarize, write_summary
from cyclebnn_dist.roll_call import call_roll
from cyclebnn_dist.run import Run
from cyclebnn_dist.run_folder import (
    check_run_folder,
    claim_run_folder,
    finished_summary,
    read_verdict,
    refusing_bad_disk,
    write_verdict,
)
from cyclebnn_dist.run_lock import run_lock
from cyclebnn_dist.saving import SaveError
from cyclebnn_dist.stop_vote import StopVote
from cyclebnn_dist.timm_import import timm
from cyclebnn_dist.watchdog import Watchdog
from cyclebnn_dist.world import (
    World,
    discover_world,
    gather_objects,
    join_world,
    leave_world,
    on_main,
    ranks_per_node,
)

log = logging.getLogger(__name__)

__all__ = ["FAILED", "FINISHED", "INTERRUPTED", "PREEMPTED", "main", "run_recipe"]


def main(recipe: Recipe, *, preemption: PreemptionFlag | None = None) -> int:
    """Collective: every rank calls this. Train to the end, or to a pre-emption, from wherever the run stands.

    Args:
        preemption: that listens already; without one, signals are heard from here on.

    Returns:
        FINISHED; PREEMPTED or INTERRUPTED, the same on every rank, if a signal or Ctrl-C asked to stop, and everything
        there was is saved; FAILED if that or the last checkpoint could not be written.

    Raises:
        RecipeError: on every rank, for what the user can mend. The run folder is then as it was, unless training had
            begun; it can then be resumed.
        KeyboardInterrupt: a second Ctrl-C came before everything was saved.
    """
    with listening(preemption) as preemption:
        world = discover_world()
        preemption.belongs_to(world.rank)
        configure_logging(rank=world.rank, size=world.size)
        set_determinism(recipe.run.deterministic)
        try:
            world = join_world(world, timeout_seconds=recipe.run.collective_timeout_seconds)
            status = run_recipe(recipe, world, preemption=preemption)
        except RecipeError:
            raise
        except SaveError as error:
            if world.is_main:
                log.error("%s", error)
            status = FAILED
        except (Exception, KeyboardInterrupt) as error:
            if world.size == 1:
                raise
            # A lost peer leaves collectives behind that never end, and tearing the groups down would wait for them.
            end_at_once(error, world, asked_for=preemption.status if preemption.in_start else None)
        leave_world()
        return status


def end_at_once(error: BaseException, world: World, *, asked_for: int | None) -> NoReturn:
    """End this rank of several without waiting for any other.

    Args:
        asked_for: the exit status, where a signal asked to leave a start; others have left it earlier, hence the error.
    """
    if isinstance(error, KeyboardInterrupt):
        logging.shutdown()
        os._exit(INTERRUPTED)
    if asked_for is not None:
        log.warning("%s leaves the start: %s", world.name(world.rank), error)
        logging.shutdown()
        os._exit(asked_for)
    log.error("%s, of %d ranks, ends: %s", world.name(world.rank), world.size, error, exc_info=error)
    about_others = call_roll(world, error)
    if about_others:
        log.error("%s: %s", world.name(world.rank), about_others)
    logging.shutdown()
    os._exit(FAILED)


def run_recipe(recipe: Recipe, world: World, *, preemption: PreemptionFlag | None = None) -> int:
    """Collective: every rank calls this. ``main`` within process groups that exist already."""
    run_dir = Path(recipe.run.dir)
    with listening(preemption) as preemption, ExitStack() as stack:
        vote = StopVote(world, preemption)

        def lock() -> None:
            with refusing_bad_disk(run_dir):
                stack.enter_context(run_lock(run_dir))

        try:
            vote.leave_if_any()
            finished = on_main(world, lambda: inspect_run_folder(run_dir, recipe))
            if finished:
                log.info("this run is finished already\n%s", finished)
                return FINISHED
            on_main(world, preemption.interruptible(lock))
            vote.leave_if_any()
            return go_on(recipe, world, run_dir=run_dir, preemption=preemption, vote=vote)
        except Preempted:
            log.warning("stopped before the first step; start again to begin")
            return leave_preempted(world, preemption=preemption, vote=vote)


def go_on(recipe: Recipe, world: World, *, run_dir: Path, preemption: PreemptionFlag, vote: StopVote) -> int:
    """Collective: every rank calls this. Train from the newest checkpoint of a run folder that is this job's alone.

    Raises:
        Preempted: on every rank, before the run folder has been claimed.
    """
    images = on_main(world, preemption.interruptible(lambda: scan_images(recipe)))
    vote.leave_if_any()
    checkpoint = newest_checkpoint(run_dir, world=world)
    vote.leave_if_any()
    run = assemble(
        recipe,
        world,
        run_dir=run_dir,
        images=images,
        checkpoint=checkpoint,
        preemption=preemption,
        vote=vote,
    )
    if checkpoint:
        resume.restore(run, checkpoint)
    begin_world(run.totals.worlds, ranks=world.size, device=world.device.type, totals=running_totals(run))
    announce(run)
    try:
        with watching_peers(world):
            ended = loop.train(run)
    except SaveError:
        close(run)
        raise
    finally:
        run.watchdog.close()
    if ended == "preempted":
        log.warning(
            "stopped at step %d of %d%s; start again to go on",
            run.step,
            run.total_steps,
            " with a checkpoint" if run.step else "",
        )
        run.wandb.leave()
        close(run, finish_wandb=False)
        return leave_preempted(world, preemption=preemption, vote=vote)
    preemption.first_step_done()
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
    preemption: PreemptionFlag,
    vote: StopVote,
) -> Run:
    """Collective: every rank calls this. Every part of a run, fresh; the run folder is claimed when all are built.

    Args:
        checkpoint: that the run will go on from; only what it says about ``comm.mode`` is read here.

    Raises:
        Preempted: on every rank, before the folder is claimed.
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
    vote.leave_if_any()
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

    vote.leave_if_any()

    def claim() -> int:
        with refusing_bad_disk(run_dir):
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
        preemption=preemption,
        vote=vote,
        watchdog=Watchdog(recipe.run.progress_timeout_seconds),
        saver=Saver(run_dir, recipe=recipe, world=world, newest=checkpoint),
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


def leave_preempted(world: World, *, preemption: PreemptionFlag, vote: StopVote) -> int:
    """Collective: every rank calls this. When all is saved: let submitit requeue the job, where it listens.

    Where it does, rank 0 does not return, and the others return when it has ended: their end could end it before.

    Returns:
        PREEMPTED or INTERRUPTED, the same on every rank.
    """
    preemption.first_step_done()
    vote.take()
    status = preemption.status
    if signal.SIGUSR2 not in preemption.of_others:
        return status
    if world.is_main:
        try:
            preemption.hand_over()
        except Exception as error:
            log.error("the job could not be put back into the queue: %s", error)
    with suppress(RuntimeError):  # rank 0 has ended
        gather_objects(world, None)
    return status


def close(run: Run, *, finish_wandb: bool = True) -> None:
    """Release what the run holds on this rank."""
    run.console.close()
    run.train_loader.close()
    run.eval_loader.close()
    run.reducer.close()
    run.saver.close()
    if run.journal:
        run.journal.close()
    if finish_wandb:
        run.wandb.finish()
