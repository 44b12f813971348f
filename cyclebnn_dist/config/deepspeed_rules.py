"""The rules of ``engine.deepspeed``: which of DeepSpeed's own settings may be given, and why the others may not.

DeepSpeed ignores a key it does not know, so what is not known here is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cyclebnn_dist.config.errors import RecipeError

KEY = "engine.deepspeed"


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_level(value: Any) -> bool:
    return value in ("debug", "info", "warning", "error", "critical")


SWITCH, LEVEL = "true or false", "debug, info, warning, error or critical"
PASSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "comms_logger": (lambda value: isinstance(value, Mapping), "a group of keys"),
    "disable_python_gc": (_is_switch, SWITCH),
    "dump_state": (_is_switch, SWITCH),
    "log_level": (_is_level, LEVEL),
    "memory_breakdown": (_is_switch, SWITCH),
    "wall_clock_breakdown": (_is_switch, SWITCH),
}
"""What is handed on, with what DeepSpeed itself does not check before it trains; of groups it checks the rest."""

SET_BY_RECIPE: Mapping[str, str] = {
    "activation_checkpointing": "binary.recompute",
    "amp": "train.amp",
    "bf16": "train.amp",
    "bfloat16": "train.amp",
    "checkpoint": "run.save_every",
    "comet": "wandb.mode",
    "compile": "model.compile",
    "csv_monitor": "run.log_every",
    "data_types": "train.amp",
    "dataloader_drop_last": "train.global_batch_size",
    "fp16": "train.amp",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "managed_gradient_accumulation": "train.accumulation",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "steps_per_print": "run.log_every",
    "tensorboard": "wandb.mode",
    "timers": "run.log_every",
    "torch_autocast": "train.amp",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "wandb": "wandb.mode",
    "zero_optimization.reduce_bucket_size": "engine.bucket_mb",
    "zero_optimization.reduce_scatter": "engine.reduce_scatter",
    "zero_optimization.stage": "engine.zero_stage",
}
"""What this project tells DeepSpeed, or does in its place, by the key of the recipe that says so."""

_OWN_REDUCTION = "gradients are averaged by this project, at the schedule's width"
_OFFLOAD = "gradients and weights that leave the device are out of the reach of this project's reduction"
_WHOLE = "is of stage 3, which leaves no rank with whole weights"
BREAKING: Mapping[str, str] = {
    "autotuning": "it would start runs of its own",
    "communication_data_type": f"{_OWN_REDUCTION}: precision.communication",
    "compression_training": "it would change weights behind the binary layers",
    "curriculum_learning": "batches come from this project's loader",
    "data_efficiency": "batches come from this project's loader",
    "elasticity": "the global batch is the recipe's, whatever the number of ranks",
    "flops_profiler": "it does not know binary layers; cyclebnn summary counts operations",
    "gradient_allreduce_op": _OWN_REDUCTION,
    "gradient_predivide_factor": _OWN_REDUCTION,
    "hybrid_engine": "it is for generating text",
    "prescale_gradients": _OWN_REDUCTION,
    "sparse_gradients": f"{_OWN_REDUCTION}, and must be dense",
    "zero_allow_untested_optimizer": "this project sets it",
    "zero_optimization.allgather_bucket_size": "DeepSpeed ignores it, and gathers the weights of a group at once",
    "zero_optimization.compute_grad_norm": "the norm is taken by this project while it averages",
    "zero_optimization.contiguous_gradients": "buckets are averaged as one flat tensor",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.overlap_comm": f"{_OWN_REDUCTION}, which overlaps by itself",
    "zero_optimization.round_robin_gradients": "it moves parameters between partitions, and checkpoints store them by name",
    "zero_optimization.use_multi_rank_bucket_allreduce": _OWN_REDUCTION,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.zero_hpz_partition_size": _WHOLE,
    "zero_optimization.zero_quantized_gradients": f"{_OWN_REDUCTION}; at stages 0 to 2 DeepSpeed itself ignores it",
    "zero_optimization.zero_quantized_nontrainable_weights": _WHOLE,
    "zero_optimization.zero_quantized_weights": _WHOLE,
}
"""What would break the reduction or a promise of the recipe, or have no effect, and how."""


def check_deepspeed_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed must not be told, what it would ignore, and what it would fail on in the midst of things.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    for path, value in _leaves(settings, ""):
        key = f"{KEY}.{path}"
        if path in SET_BY_RECIPE:
            raise RecipeError(key, "has a key of its own", f"set {SET_BY_RECIPE[path]} instead")
        if path in BREAKING:
            raise RecipeError(key, f"cannot be used: {BREAKING[path]}", "leave it out")
        if path not in PASSED:
            raise RecipeError(key, "is not known to be of use here, and DeepSpeed may ignore it", _near(path))
        fits, wanted = PASSED[path]
        if not fits(value):
            raise RecipeError(key, f"{value!r} is not {wanted}", f"give it {wanted}, or leave it out")
        if isinstance(value, Mapping) and "auto" in value.values():
            raise RecipeError(key, "DeepSpeed ignores a key of it that is 'auto'", "give it a value")
        if path == "comms_logger" and value.get("enabled") and not value.get("verbose"):
            raise RecipeError(
                f"{key}.verbose",
                "is not true, and without it DeepSpeed keeps to itself what it has noted",
                "set it to true, or leave comms_logger out",
            )


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Paths of ``settings`` that the tables know, or that are none of their groups."""
    groups = {known.rpartition(".")[0] for known in (*PASSED, *SET_BY_RECIPE, *BREAKING)}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if path not in groups:
            yield path, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            raise RecipeError(
                f"{KEY}.{path}",
                f"{value!r} stands where a group of keys belongs",
                f"write {path}: {{...}}",
            )


def _near(path: str) -> str:
    known = [*PASSED, *SET_BY_RECIPE, *BREAKING]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(PASSED)}"
