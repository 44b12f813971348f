"""Training: the data flow from a recipe to a finished run."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import torch

from cyclebnn_dist import loop, resume
from cyclebnn_dist.assembly import assemble
from cyclebnn_dist.batching import steps_per_epoch
from cyclebnn_dist.checkpoint import newest_checkpoint
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.data import Source, open_source
from cyclebnn_dist.guards.exit_status import FAILED, FINISHED, INTERRUPTED, PREEMPTED
from cyclebnn_dist.guards.peer_watch import watching_peers
from cyclebnn_dist.guards.preempt import Preempted, PreemptionFlag, listening
from cyclebnn_dist.guards.roll_call import call_roll
from cyclebnn_dist.guards.stop_vote import StopVote
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.metrics import begin_world
from cyclebnn_dist.report import running_totals, summarize, write_summary
from cyclebnn_dist.run import Run
from cyclebnn_dist.run_folder import (
    check_run_folder,
    finished_summary,
    refusing_bad_disk,
)
from cyclebnn_dist.run_lock import run_lock
from cyclebnn_dist.saving import SaveError
from cyclebnn_dist.world import (
    World,
    discover_world,
    gather_objects,
    join_world,
    leave_world,
    on_main,
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
            {
                "event": "start",
                "step": run.step,
                "ranks": run.world.size,
                "comm_mode": run.comm_mode,
                "teachers": run.objective.teachers,
            }
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
