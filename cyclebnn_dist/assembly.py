"""The assembly: every part of a run, made from its recipe in one fixed order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cyclebnn_dist import resume
from cyclebnn_dist.agreement import Agreement
from cyclebnn_dist.batching import per_rank_batch, steps_per_epoch, total_steps
from cyclebnn_dist.binary import Health, parameter_kinds, scheduled_precision
from cyclebnn_dist.checkpoint import Saver, read_meta
from cyclebnn_dist.comm import Reducer, build_reducer
from cyclebnn_dist.comm.mode import communicated_precision, fixed_mode
from cyclebnn_dist.comm.verdict import Verdict, measure_and_judge, settle
from cyclebnn_dist.config import RecipeError, recipe_digest, to_dict
from cyclebnn_dist.config.recipe import EngineConfig, Recipe
from cyclebnn_dist.data import EvalLoader, Mixing, Source, TrainLoader, in_flight
from cyclebnn_dist.engine import DDPEngine, DeepSpeedEngine, Engine
from cyclebnn_dist.engine.zero_groups import scatters, slots_of_optimizer
from cyclebnn_dist.guards.preempt import PreemptionFlag
from cyclebnn_dist.guards.stop_vote import StopVote
from cyclebnn_dist.guards.watchdog import Watchdog
from cyclebnn_dist.losses import Objective, build_objective
from cyclebnn_dist.metrics import Console, Journal, Totals, WandbRun
from cyclebnn_dist.models import build_model
from cyclebnn_dist.optimizer import build_optimizer
from cyclebnn_dist.phases import build_phases
from cyclebnn_dist.precision.schedule import Schedule, build_schedule
from cyclebnn_dist.run import Run
from cyclebnn_dist.run_folder import claim_run_folder, read_verdict, refusing_bad_disk, write_verdict
from cyclebnn_dist.timm_import import timm
from cyclebnn_dist.world import World, on_main, ranks_per_node, share_refusal


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
    phases = build_phases(recipe, total_steps=run_steps, steps_per_epoch=epoch_steps)
    resume.seed_generators(recipe.run.seed)
    model, swap_report = build_model(recipe.model, recipe.binary, image_size=recipe.data.image_size)
    model = place_model(model, recipe, world)
    objective = share_objective(recipe, world, total_steps=run_steps)
    precision = scheduled_precision(recipe.precision, model)
    resume.seed_generators(recipe.run.seed + 1 + world.rank)
    ema = timm.utils.ModelEmaV3(model, decay=recipe.train.ema_decay) if recipe.train.ema_decay else None
    optimizer = build_optimizer(
        model, recipe.optim, kinds=parameter_kinds(model), first_phase=recipe.first_phase
    )

    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "device": world.device}
    reading = {**place, "channels_last": recipe.model.channels_last, "in_flight": run_dir / in_flight.FOLDER}
    reducer = build_reducer(
        recipe.comm,
        model.named_parameters(),
        seed=recipe.run.seed,
        timeout_seconds=recipe.run.collective_timeout_seconds,
        ranks_per_node=ranks_per_node(world) if recipe.comm.hierarchical else 1,
        slots=slots_of_optimizer(model, optimizer, bucket_mb=recipe.engine.bucket_mb, world_size=world.size)
        if scatters(recipe.engine)
        else None,
        **place,
    )
    length = {"total_steps": run_steps, "steps_per_epoch": epoch_steps}
    wished = build_schedule(precision, **length, warn=False)
    agreement = Agreement(
        world,
        {
            "recipe": recipe_digest(recipe),
            "teachers": objective.teachers,
            "communication mode": recipe.comm.mode,
            "schedule": wished.digest(),
            "parameter layout": reducer.layout_digest,
            "codec": reducer.codec_digest,
            "backend": f"{reducer.backend}, {describe_engine(recipe.engine)}",
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
    engine = build_engine(model, optimizer, reducer, recipe=recipe, world=world)
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
        phases=phases,
        agreement=agreement,
        train_loader=train_loader,
        mixing=mixing,
        objective=objective,
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


def share_objective(recipe: Recipe, world: World, *, total_steps: int) -> Objective:
    """Collective: every rank calls this. What the recipe minimizes, with its teachers, if it has any.

    Raises:
        RecipeError: on every rank, if one cannot have a teacher.
    """
    objective, refusal = None, None
    try:
        objective = build_objective(recipe, total_steps=total_steps, device=world.device)
    except RecipeError as error:
        refusal = error
    share_refusal(world, refusal)
    assert objective is not None
    return objective


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, reducer: Reducer, *, recipe: Recipe, world: World
) -> Engine:
    """Collective: every rank calls this. The engine the recipe asks for; DeepSpeed is imported only then."""
    config, amp = recipe.engine, recipe.train.amp
    if config.name == "ddp":
        return DDPEngine(model, optimizer, reducer, config=config, amp=amp, device=world.device)
    return DeepSpeedEngine(model, optimizer, reducer, config=config, amp=amp, world=world)


def describe_engine(config: EngineConfig) -> str:
    """What of an engine must be the same on all ranks, in words."""
    told = json.dumps(config.deepspeed, sort_keys=True, default=str)
    return f"{config.name} of stage {config.zero_stage}{f' told {told}' if config.deepspeed else ''}"


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
