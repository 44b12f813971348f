"""The rules a recipe must keep: ranges and combinations. Those of one section that are many have a module of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cyclebnn_dist.config.distill_rules import check_distill
from cyclebnn_dist.config.edge_rules import check_edges
from cyclebnn_dist.config.engine_rules import check_engine
from cyclebnn_dist.config.errors import RecipeError, quoted
from cyclebnn_dist.config.phase_rules import check_first_phase
from cyclebnn_dist.config.precision_rules import check_precision
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.config.schema import flatten
from cyclebnn_dist.config.search_rules import check_search


def validate(recipe: Recipe) -> None:
    """Check every range and combination that needs no data, device or world to be checked.

    Raises:
        RecipeError: the first rule that is broken, with the dotted key and the cure.
    """
    values = flatten(recipe)
    for key, value in values.items():
        if "${" in repr(value):  # the saved recipe would not be read again as it was written
            raise RecipeError(
                key, f"{quoted(value)} holds ${{ after its references are resolved", "leave it out"
            )
    for keys, rule, words in _RANGES:
        for key in keys.split():
            if not rule(values[key]):
                raise RecipeError(key, f"{quoted(values[key])} is out of range", f"it must be {words}")
    for check in (
        _check_data,
        _check_train,
        _check_optim,
        check_first_phase,
        check_precision,
        _check_comm,
        check_engine,
        check_edges,
        check_distill,
        check_search,
        _check_model,
    ):
        check(recipe)


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


def _below_one(value: Any) -> bool:
    return 0 <= value < 1


def _positive(value: Any) -> bool:
    return value > 0


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: value >= low


def _power_of_two(value: int) -> bool:
    return 16 <= value <= 65536 and value & (value - 1) == 0


def _without(characters: str) -> Callable[[Any], bool]:
    return lambda value: not set(characters) & set(value)


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("run.dir", _without("%"), "without a percent sign, which job schedulers expand"),
    ("wandb.project", _without("/\\#?%:"), "without any of / \\ # ? % :, which Weights & Biases refuses"),
    ("run.dir data.path model.name wandb.project", bool, "not empty"),
    ("run.seed", _between(0, 2**31 - 1), "from 0 to 2147483647"),
    (
        "run.log_every run.save_every run.keep_checkpoints model.num_classes data.threads data.prefetch"
        " data.randaugment_num_ops train.global_batch_size train.accumulation train.max_skipped_steps eval.batch_size"
        " precision.forward.cycles precision.backward.cycles precision.communication.cycles",
        _at_least(1),
        "at least 1",
    ),
    ("data.image_size", _at_least(8), "at least 8 pixels"),
    ("loss.kurtosis_target", _at_least(1), "at least 1: no distribution has less"),
    (
        "run.collective_timeout_seconds train.epochs optim.lr optim.gamma distill.temperature engine.bucket_mb eval.every_epochs",
        _positive,
        "greater than 0",
    ),
    ("engine.bucket_mb", _between(0, 2**20), "at most 1048576, a TiB"),
    (
        "train.clip_norm loss.kurtosis_weight distill.label_loss optim.weight_decay optim.binary_weight_decay optim.other_weight_decay optim.binary_lr_scale optim.other_lr_scale optim.min_lr"
        " optim.warmup_epochs first_phase.epochs data.randaugment_std run.health_every run.keep_every run.progress_timeout_seconds data.shuffle_shards comm.check_every comm.small_numel precision.forward.warmup_epochs"
        " precision.backward.warmup_epochs precision.communication.warmup_epochs",
        _at_least(0),
        "0 or more",
    ),
    (
        "data.flip data.erasing data.mixup_prob data.mixup_switch_prob",
        _between(0, 1),
        "from 0 to 1",
    ),
    ("data.mixup data.cutmix", _at_least(0), "0 or more"),
    (
        "data.color_jitter",
        lambda value: min(value) >= 0 and value[3] <= 0.5,
        "four numbers, 0 or more, the last one (hue) up to 0.5",
    ),
    ("data.crop_pct", lambda value: 0 < value <= 1, "above 0, up to 1"),
    ("data.randaugment_magnitude", _between(0, 30), "from 0 to 30"),
    ("data.randaugment_prob", lambda value: 0 < value <= 1, "above 0, up to 1"),
    ("train.label_smoothing train.ema_decay optim.momentum", _below_one, "at least 0 and below 1"),
    ("optim.betas", lambda value: all(map(_below_one, value)), "two numbers, each at least 0 and below 1"),
    ("data.std", lambda value: min(value) > 0, "three numbers greater than 0"),
    ("comm.second_phase_extra_bits", _between(0, 7), "from 0 to 7"),
    ("comm.block_size", _power_of_two, "a power of two from 16 to 65536"),
    ("eval.forward_bits", lambda value: value in (0, 32) or 2 <= value <= 16, "0, from 2 to 16, or 32"),
)


def _check_data(recipe: Recipe) -> None:
    low, high = recipe.data.scale
    if not 0 < low <= high <= 1:
        raise RecipeError(
            "data.scale", f"[{low}, {high}] is not a range of areas", "it needs 0 < low <= high <= 1"
        )
    low, high = recipe.data.ratio
    if not 0 < low <= high:
        raise RecipeError(
            "data.ratio", f"[{low}, {high}] is not a range of ratios", "it needs 0 < low <= high"
        )
    if recipe.data.dtype not in ("fp32", recipe.train.amp):
        raise RecipeError(
            "data.dtype",
            f"{recipe.data.dtype} stands beside train.amp={recipe.train.amp}",
            "set it to fp32, or both to the same type",
        )


def _check_train(recipe: Recipe) -> None:
    train = recipe.train
    if train.global_batch_size % train.accumulation:
        raise RecipeError(
            "train.accumulation",
            f"{train.accumulation} does not divide train.global_batch_size = {train.global_batch_size}",
            "ranks x accumulation x per-rank batch must give the global batch exactly",
        )


def _check_optim(recipe: Recipe) -> None:
    optim, epochs = recipe.optim, recipe.train.epochs
    for pattern, decay in optim.weight_decay_of.items():
        if decay < 0:
            raise RecipeError(
                f"optim.weight_decay_of.{pattern}", f"{decay:g} is out of range", "it must be 0 or more"
            )
    if optim.warmup_epochs >= epochs:
        raise RecipeError(
            "optim.warmup_epochs",
            f"{optim.warmup_epochs:g} leaves nothing of train.epochs = {epochs:g}",
            "it must be smaller",
        )
    if optim.name == "sgd" and optim.nesterov and not optim.momentum:
        raise RecipeError(
            "optim.momentum", "0 beside optim.nesterov=true", "set optim.nesterov=false as well"
        )
    if optim.warmup_lr is not None:
        if optim.warmup_lr < 0:
            raise RecipeError(
                "optim.warmup_lr", f"{optim.warmup_lr:g} is out of range", "it must be 0 or more"
            )
        if not optim.warmup_epochs:
            raise RecipeError(
                "optim.warmup_lr",
                "has no effect: optim.warmup_epochs is 0",
                "set optim.warmup_epochs, or leave it out",
            )
    if optim.min_lr > optim.lr:
        raise RecipeError(
            "optim.min_lr", f"{optim.min_lr:g} is above optim.lr = {optim.lr:g}", "it must not be larger"
        )
    if optim.schedule == "step":
        if list(optim.milestones) != sorted(set(optim.milestones)) or min(optim.milestones, default=1.0) <= 0:
            raise RecipeError(
                "optim.milestones",
                f"{list(optim.milestones)} does not ascend",
                "give epochs above 0 in ascending order",
            )
        if optim.milestones and optim.milestones[-1] >= epochs:
            raise RecipeError(
                "optim.milestones",
                f"{optim.milestones[-1]:g} is never reached: train.epochs = {epochs:g}",
                "every milestone must be smaller than train.epochs",
            )


def _check_comm(recipe: Recipe) -> None:
    if recipe.comm.hierarchical and recipe.comm.error_feedback:
        raise RecipeError(
            "comm.error_feedback",
            "stands beside comm.hierarchical=true, which keeps no residuals",
            "set one of the two to false; without feedback codes up to 5 bits are unbiased",
        )


def _check_model(recipe: Recipe) -> None:
    if recipe.binary.keep_deep_stem and not recipe.binary.keep_stem:
        raise RecipeError(
            "binary.keep_deep_stem", "stands beside binary.keep_stem=false", "set only one of the two"
        )
    if recipe.model.pretrained and recipe.model.weights:
        raise RecipeError(
            "model.weights",
            "stands beside model.pretrained=true",
            "there is one start: set only one of the two",
        )
    if recipe.model.small_stem and recipe.model.pretrained:
        raise RecipeError(
            "model.small_stem",
            "true beside model.pretrained=true, whose first convolution is another one",
            "set one of the two to false",
        )
    if recipe.binary.recompute and recipe.binary.method == "none" and not recipe.binary.methods:
        raise RecipeError(
            "binary.recompute",
            "true beside binary.method=none, which leaves nothing to compute again",
            "set it to false, or choose a method",
        )
    if recipe.model.compile and recipe.binary.recompute:
        raise RecipeError(
            "binary.recompute",
            "true beside model.compile=true, whose compiler decides by itself what is computed again",
            "set one of the two to false",
        )
    if recipe.model.compile and recipe.engine.bucket_mb < 1:
        raise RecipeError(
            "engine.bucket_mb",
            f"{recipe.engine.bucket_mb} is below 1 beside model.compile=true",
            "torch's compiler cuts a model at DDP's buckets, and needs them to be 1 MiB or more",
        )
    taken: Mapping[str, str] = {
        "num_classes": "model.num_classes",
        "pretrained": "model.pretrained",
        "img_size": "data.image_size",
    }
    for name in recipe.model.kwargs:
        if name in taken:
            raise RecipeError(f"model.kwargs.{name}", "has a key of its own", f"set {taken[name]} instead")
