"""The rules a recipe must keep: ranges, combinations, and what may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cyclebnn_dist.config import schema
from cyclebnn_dist.config.distill_rules import check_distill
from cyclebnn_dist.config.edge_rules import check_edges
from cyclebnn_dist.config.engine_rules import check_engine
from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.phase_rules import check_first_phase
from cyclebnn_dist.config.recipe import Recipe, WidthConfig
from cyclebnn_dist.config.search_rules import SEARCH_KEYS, check_search

MAY_CHANGE = SEARCH_KEYS | frozenset(
    {
        "run.dir",
        "run.log_every",
        "run.health_every",
        "binary.recompute",
        "run.save_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.keep_best",
        "run.extend_epochs",
        "run.collective_timeout_seconds",
        "run.progress_timeout_seconds",
        "model.pretrained",
        "model.weights",
        "distill.weights",
        "data.path",
        "data.format",
        "data.skip_list",
        "data.threads",
        "data.prefetch",
        "train.accumulation",
        "train.max_skipped_steps",
        "comm.check_every",
        "engine.name",
        "engine.zero_stage",
        "engine.reduce_scatter",
        "engine.bucket_mb",
        "engine.deepspeed",
        "eval.every_epochs",
        "eval.batch_size",
        "wandb.mode",
        "wandb.project",
        "wandb.entity",
        "wandb.group",
        "wandb.tags",
    }
)
"""Keys that may differ between two starts of one run.

Paths, threads, logging, saving, evaluation and what a search reads do not touch training. Starting weights (model.pretrained,
model.weights) are read at the first start only; files of teachers may lie elsewhere, and a warning tells if they hold other
weights. The global batch is the recipe's quantity, so accumulation may follow the number of ranks; the
run then goes on from the same weights, but batch statistics are taken over other micro-batches.
"""

QUANTIZED_BITS = (1, 8)
"""Lowest and highest width of quantized communication."""
PLAIN_BITS = (16, 32)
"""Widths of communication that is not quantized."""
SCHEDULED_BITS = (2, 16)
"""Lowest and highest quantized width of the forward and the backward pass."""
OFF_BITS = 32
"""Width of a forward or backward pass that is not quantized."""


def validate(recipe: Recipe) -> None:
    """Check every range and combination that needs no data, device or world to be checked.

    Raises:
        RecipeError: the first rule that is broken, with the dotted key and the cure.
    """
    values = flatten(recipe)
    for key, value in values.items():
        if "${" in repr(value):  # the saved recipe would not be read again as it was written
            raise RecipeError(
                key, f"{_show(value)} holds ${{ after its references are resolved", "leave it out"
            )
    for keys, rule, words in _RANGES:
        for key in keys.split():
            if not rule(values[key]):
                raise RecipeError(key, f"{_show(values[key])} is out of range", f"it must be {words}")
    for check in (
        _check_data,
        _check_train,
        _check_optim,
        check_first_phase,
        _check_precision,
        _check_comm,
        check_engine,
        check_edges,
        check_distill,
        check_search,
        _check_model,
    ):
        check(recipe)


def resume_differences(
    saved: Recipe, new: Recipe, *, may_change: Collection[str] = MAY_CHANGE, folder: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Compare the recipe a run was started with to the one it is started with now.

    Args:
        may_change: keys that may differ.
        folder: key and value to name in the cure, where it is not run.dir.

    Returns:
        Changed keys that may change (MAY_CHANGE, and more train.epochs under run.extend_epochs), each with (saved, new) value.

    Raises:
        RecipeError: other keys differ; every one of them is named with both values.
    """
    old_values, new_values = flatten(saved), flatten(new)
    changed = {key: (old, new_values[key]) for key, old in old_values.items() if old != new_values[key]}
    refused = [key for key in changed if key not in may_change]
    if new.run.extend_epochs and new.train.epochs > saved.train.epochs:
        refused = [key for key in refused if key != "train.epochs"]
    if refused:
        first, *others = (f"{key}: {_show(changed[key][0])} -> {_show(changed[key][1])}" for key in refused)
        cure = f"put back what was there, or start afresh with another {folder or f'run.dir (now {new.run.dir})'}"
        if "train.epochs" in refused:
            cure += "\n  run.extend_epochs=true allows more train.epochs; that changes every schedule from here on"
        problem = first.partition(": ")[2] + "".join(f"\n{other}" for other in others)
        raise RecipeError(refused[0], f"{problem}\n  this run was started with another recipe", cure)
    return changed


def flatten(settings: Any) -> dict[str, Any]:
    """Return the plain value of every dotted key."""
    result = {}
    for leaf in schema.leaves(type(settings)):
        value: Any = settings
        for name in leaf.key.split("."):
            value = getattr(value, name)
        result[leaf.key] = list(value) if isinstance(value, tuple) else value
    return result


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


def _check_precision(recipe: Recipe) -> None:
    for name in ("forward", "backward", "communication"):
        lowest, highest = QUANTIZED_BITS if name == "communication" else SCHEDULED_BITS
        plain = PLAIN_BITS if name == "communication" else (OFF_BITS,)
        _check_width(
            f"precision.{name}",
            getattr(recipe.precision, name),
            quantized=range(lowest, highest + 1),
            plain=plain,
            epochs=recipe.train.epochs,
        )


def _check_width(
    key: str, width: WidthConfig, *, quantized: range, plain: tuple[int, ...], epochs: float
) -> None:
    span = f"{quantized[0]} to {quantized[-1]}"
    words = f"from {span}, or {' or '.join(map(str, plain))} (not quantized)"
    for end in ("low", "high"):
        bits = getattr(width, end)
        if bits not in quantized and bits not in plain:
            raise RecipeError(f"{key}.{end}", f"{bits} bits are not possible", f"it must be {words}")
    if width.low > width.high:
        raise RecipeError(
            f"{key}.low",
            f"{width.low} is above {key}.high = {width.high}",
            "low must not be larger than high",
        )
    if width.schedule == "piecewise" or width.pieces:
        _check_pieces(key, width, possible=(*quantized, *plain), words=words, epochs=epochs)
        return
    if width.schedule == "constant":
        return
    if width.low != width.high and width.high not in quantized:
        raise RecipeError(
            f"{key}.high",
            f"a cycle from {width.low} to {width.high} bits passes widths that do not exist",
            f"cycle within {span}, or set {key}.schedule to constant or piecewise",
        )
    if width.warmup_epochs >= epochs:
        raise RecipeError(
            f"{key}.warmup_epochs",
            f"{width.warmup_epochs:g} leaves nothing of train.epochs = {epochs:g}",
            "it must be smaller",
        )


def _check_pieces(
    key: str, width: WidthConfig, *, possible: tuple[int, ...], words: str, epochs: float
) -> None:
    """A piecewise schedule says everything itself, within low to high like any other."""
    if width.schedule != "piecewise":
        raise RecipeError(
            f"{key}.pieces",
            f"stand beside {key}.schedule={width.schedule}",
            f"set {key}.schedule=piecewise, or {key}.pieces=[]",
        )
    starts = [start for start, _ in width.pieces]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise RecipeError(
            f"{key}.pieces",
            f"epochs {starts} do not ascend from 0" if starts else "are missing",
            "give [epoch, bits] pairs in ascending order, the first at epoch 0: [[0, 8], [30, 4]]",
        )
    if starts[-1] >= epochs:
        raise RecipeError(
            f"{key}.pieces",
            f"epoch {starts[-1]:g} is never reached: train.epochs = {epochs:g}",
            "every piece must begin before train.epochs",
        )
    if width.warmup_epochs:
        raise RecipeError(
            f"{key}.warmup_epochs",
            f"{width.warmup_epochs:g} stands beside {key}.schedule=piecewise",
            "leave it at 0: the first piece is the warm-up",
        )
    for start, bits in width.pieces:
        if bits not in possible:
            raise RecipeError(
                f"{key}.pieces",
                f"{bits} bits from epoch {start:g} on are not possible",
                f"it must be {words}",
            )
        if not width.low <= bits <= width.high:
            raise RecipeError(
                f"{key}.pieces",
                f"{bits} bits from epoch {start:g} on lie outside {key}.low = {width.low} to high = {width.high}",
                f"set {key}.low and {key}.high to the lowest and the highest width of the pieces",
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


def _show(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)
