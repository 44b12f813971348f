"""DeepSpeed's configuration: what ``deepspeed.initialize`` is told, from the recipe and its ``engine.deepspeed``."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import EngineConfig

BLOCK_OF_CLASS = {"DeepSpeedZeroConfig": "zero_optimization", "CommsLoggerConfig": "comms_logger"}
"""Which part of the configuration DeepSpeed's own classes stand for, where they check one."""


HEARD_AT_INFO = ("comms_logger", "dump_state")
"""Settings of which nothing would be heard at the log level DeepSpeed has here otherwise, of warnings."""


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is told. Accumulation, clipping, arithmetic and averaging are this project's own."""
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # of the throughput it would print
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": max(1, int(config.bucket_mb * 2**20 / 4)),
            "overlap_comm": False,
            **({"compute_grad_norm": False} if config.zero_stage else {}),
        },
    }
    if any(config.deepspeed.get(name) for name in HEARD_AT_INFO):
        told["log_level"] = "info"
    for name, value in config.deepspeed.items():
        given = copy.deepcopy(value)
        told[name] = {**told[name], **given} if isinstance(given, Mapping) and name in told else given
    return told


def check_by_deepspeed(told: Mapping[str, Any]) -> None:
    """Let DeepSpeed's own classes check a configuration; the package must have been opened before.

    Raises:
        RecipeError: naming what DeepSpeed refuses, and its reason.
    """
    pydantic: Any = importlib.import_module("pydantic")
    runtime: Any = importlib.import_module("deepspeed.runtime.config")
    try:
        runtime.DeepSpeedConfig(copy.deepcopy(dict(told)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        block = BLOCK_OF_CLASS.get(error.title)
        path = [*([block] if block else []), *(str(part) for part in first["loc"])]
        raise _refusal(".".join(path), str(first["msg"])) from error
    except (runtime.DeepSpeedConfigError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise _refusal("", f"{type(error).__name__}: {error}") from error


def _refusal(path: str, reason: str) -> RecipeError:
    return RecipeError(
        f"engine.deepspeed.{path}" if path else "engine.deepspeed",
        f"DeepSpeed refuses it: {reason}",
        "see DeepSpeed's documentation of its configuration, or leave it out",
    )
