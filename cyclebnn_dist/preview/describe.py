"""The preview: what a recipe's schedule will do, step by step, and what it will save, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from cyclebnn_dist.batching import steps_per_epoch, total_steps
from cyclebnn_dist.binary import count, scheduled_precision
from cyclebnn_dist.comm import Layout
from cyclebnn_dist.comm.coding import CodecName
from cyclebnn_dist.comm.counters import Counters
from cyclebnn_dist.comm.mode import communicated_precision, fixed_mode
from cyclebnn_dist.comm.traffic import count_step
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.data import open_source
from cyclebnn_dist.engine.buckets import Buckets, foretell_buckets, foretell_layout, foretell_slots
from cyclebnn_dist.engine.zero_groups import weight_bytes
from cyclebnn_dist.models import build_model
from cyclebnn_dist.phases import build_phases
from cyclebnn_dist.precision import Schedule, build_schedule, training_saving
from cyclebnn_dist.world import local_world_size

CHANNELS = ("forward", "backward", "communication")


class Length(NamedTuple):
    """How long a run is, in optimizer steps, and ``source``: where that is known from."""

    total_steps: int
    steps_per_epoch: int
    source: str


def run_length(
    recipe: Recipe, *, images: int | None = None, steps: int | None = None, epoch_steps: int | None = None
) -> Length:
    """The length of a run: as given, else from the number of training images given, else from the data folder.

    Args:
        images: number of training images.
        steps: steps of the whole run.
        epoch_steps: steps of an epoch; where only ``steps`` is given, what ``train.epochs`` makes of it.

    Raises:
        RecipeError: nothing is given, and ``data.path`` is not there; or what is given cannot be.
    """
    for flag, value in (("--images", images), ("--steps", steps), ("--steps-per-epoch", epoch_steps)):
        if value is not None and value < 1:
            raise RecipeError(flag, f"{value} is out of range", "it must be at least 1")
    if images is not None and (steps is not None or epoch_steps is not None):
        raise RecipeError("--images", "stands beside --steps or --steps-per-epoch", "give one or the other")
    if steps is not None:
        if epoch_steps is None:
            epoch_steps = max(1, round(steps / recipe.train.epochs))
        return Length(steps, epoch_steps, "as given")
    if epoch_steps is None:
        source = f"{images} images as given"
        if images is None:
            images = _count_images(recipe)
            source = f"{images} images in {recipe.data.path}"
        epoch_steps = steps_per_epoch(recipe.train, num_images=images)
    else:
        source = "steps of an epoch as given"
    return Length(total_steps(recipe.train, steps_per_epoch=epoch_steps), epoch_steps, source)


def _count_images(recipe: Recipe) -> int:
    try:
        return len(open_source(recipe.data, "train", num_classes=recipe.model.num_classes))
    except RecipeError as error:
        if error.key != "data.path":
            raise
        raise RecipeError(
            error.key,
            f"{error.problem}, and how many steps the run has follows from the number of images",
            "put the images there, or give --images N (training images) or --steps N (of the whole run)",
        ) from None


def preview(recipe: Recipe, *, length: Length, ranks: int) -> tuple[Schedule, dict[str, Any]]:
    """The schedule of a run and what it will do, as plain values; keys that summary.json has too mean the same there.

    ``weight_bytes`` are those of updated weights, which ZeRO sends beside the gradients from stage 1 on.

    Bytes are those of rank 0 in a run that is never interrupted: after a restart DDP's first step takes other buckets,
    which moves some headers and padding. Of each width ``runs`` lists [first step, bits].

    Raises:
        RecipeError: as ``build_model``, or for fewer ranks than one.
    """
    if ranks < 1:
        raise RecipeError("--ranks", f"{ranks} is out of range", "it must be at least 1")
    side = recipe.data.image_size
    model, _ = build_model(
        replace(recipe.model, pretrained=False, weights=""), recipe.binary, image_size=side
    )
    counts = count(model, input_size=(3, side, side))
    precision = scheduled_precision(recipe.precision, model)
    precision = communicated_precision(precision, fixed_mode(recipe.comm.mode), world_size=ranks)
    schedule = build_schedule(
        precision, total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch
    )
    layout = foretell_layout(
        model,
        recipe,
        world_size=ranks,
        ranks_per_node=_ranks_per_node(ranks) if recipe.comm.hierarchical and ranks > 1 else 1,
    )
    counters, weights = Counters(), 0
    if ranks > 1:
        buckets = foretell_buckets(model, recipe, layout, widths=schedule.at(0))
        counters = expected_traffic(schedule, layout, buckets, codec=recipe.comm.codec)
        slots = foretell_slots(model, recipe, world_size=ranks)
        weights = weight_bytes(slots.values(), world_size=ranks)
    phases = build_phases(recipe, total_steps=length.total_steps, steps_per_epoch=length.steps_per_epoch)
    saving = training_saving(counts, schedule.counts(begin=phases.first_steps), full_steps=phases.first_steps)
    channels = {}
    for name in CHANNELS:
        width, channel = getattr(recipe.precision, name), getattr(schedule, name)
        bits = channel.first(length.total_steps)
        channels[name] = {
            "schedule": width.schedule if getattr(precision, name) == width else "off",
            "min": min(bits),
            "mean": sum(bits) / len(bits),
            "max": max(bits),
            "cycles": channel.cycles,
            "warmup_steps": channel.hold_steps,
            "histogram": dict(sorted(Counter(bits).items())),
            "runs": _runs(bits),
        }
    return schedule, {
        "steps": length.total_steps,
        "steps_per_epoch": length.steps_per_epoch,
        "epochs": recipe.train.epochs,
        "steps_known_from": length.source,
        "first_phase_steps": phases.first_steps,
        "ranks": ranks,
        "comm_mode": recipe.comm.mode,
        "bits": channels,
        "sent_bytes": counters.sent_bytes,
        "fp32_bytes": counters.fp32_bytes,
        "bf16_bytes": counters.bf16_bytes,
        "engine": recipe.engine.name,
        "zero_stage": recipe.engine.zero_stage,
        "weight_bytes": weights * length.total_steps,
        "training_saving_binary_layers": saving.binary_layers,
        "training_saving_model": saving.model,
        "schedule_digest": schedule.digest(),
    }


def expected_traffic(schedule: Schedule, layout: Layout, buckets: Buckets, *, codec: CodecName) -> Counters:
    """What rank 0 hands to the network in the whole run."""
    first = schedule.at(0).communication_bits
    later = Counter(schedule.communication.first(schedule.total_steps)[1:])
    parts = [count_step(layout, buckets.first_step, bits=first, codec=codec)]
    parts += [
        count_step(layout, buckets.later_steps, bits=bits, codec=codec, steps=n) for bits, n in later.items()
    ]
    return Counters(
        sent_bytes=sum(part.sent_bytes for part in parts),
        fp32_bytes=sum(part.fp32_bytes for part in parts),
        bf16_bytes=sum(part.bf16_bytes for part in parts),
        far_bytes=sum(part.far_bytes for part in parts),
    )


def _runs(bits: Sequence[int]) -> list[list[int]]:
    runs, step = [], 0
    for value, group in groupby(bits):
        runs.append([step, value])
        step += sum(1 for _ in group)
    return runs


def _ranks_per_node(ranks: int) -> int:
    size = local_world_size()
    if size == 0 or ranks % size:
        raise RecipeError(
            "comm.hierarchical",
            f"how {ranks} ranks are spread over nodes is not known",
            "set the environment variable LOCAL_WORLD_SIZE to the ranks of a node, by which --ranks can be divided",
        )
    return size
