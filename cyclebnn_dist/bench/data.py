"""``cyclebnn bench data``: images a second of this project's loader and of timm's, and how long training waits."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nvidia.dali
import PIL
import torch
from torch import nn

from cyclebnn_dist.bench.data_files import open_images, write_photographs
from cyclebnn_dist.bench.data_loaders import STREAMS, Settings
from cyclebnn_dist.bench.data_rounds import open_streams, time_streams, time_training
from cyclebnn_dist.bench.layers import describe_machine
from cyclebnn_dist.bench.paired import ratio_to
from cyclebnn_dist.binary import set_widths
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig, DataConfig, ModelConfig
from cyclebnn_dist.logs import configure_logging
from cyclebnn_dist.models.build import build_model
from cyclebnn_dist.timm_import import timm

log = logging.getLogger(__name__)

STAGES = {
    "decode": ("dali decode", "timm decode"),
    "plain": ("dali plain", "timm plain"),
    "randaugment": ("dali randaugment", "timm randaugment"),
    "randaugment, every operation": ("dali randaugment", "timm randaugment, every operation"),
}
"""Streams of ours and of timm's that are compared."""
TRAINED = ("dali plain", "timm plain", "dali randaugment", "timm randaugment")
TRAINING_SHARE = 0.3
TRAINING_BATCH = 16
FORWARD_BITS, BACKWARD_BITS = 4, 8


def bench_data(
    *,
    path: Path | None = None,
    threads: Sequence[int] | None = None,
    image_size: int = 224,
    batch: int = 32,
    model: str = "resnet18",
    seconds: float = 300.0,
    photographs: int = 256,
) -> dict[str, Any]:
    """Measure both loaders on the same files with the same number of threads or worker processes, in turn.

    Args:
        path: a data set in the ImageNet layout; without it JPEGs are generated.
        threads: numbers of them; without it 1, 2, 4 ... and all cores.
        batch: images of a batch; training takes ``TRAINING_BATCH`` at most.
        model: timm model that is trained, binary by method ``cyclebnn``; "none" leaves training out.
        seconds: about how long to measure; three rounds of loading and two of training are done in any case.
        photographs: how many to generate.

    Returns:
        plain values: ``machine``, ``images``, ``loading`` (a row per thread count and stage) and ``training`` (a row per
        loader and augmentation, with as many threads as were asked for at most).

    Raises:
        RecipeError: an argument that cannot be measured with.
    """
    cores = len(os.sched_getaffinity(0))
    threads = sorted(set(threads)) if threads else _thread_counts(cores)
    _check(threads, image_size=image_size, batch=batch, seconds=seconds)
    configure_logging(rank=0, size=1)
    config = DataConfig(image_size=image_size)
    step = None if model == "none" else _training_step(model, image_size)
    with ExitStack() as stack:
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cyclebnn-")))
            log.info("generating %d photographs", photographs)
            write_photographs(path, count=photographs)
            origin = "generated photographs, 500x375"
        else:
            origin = str(path)
        images = open_images(path)
        if len(images) < batch:
            raise RecipeError(
                "--batch", f"{batch}, but {images.root} holds only {len(images)} images", "make it smaller"
            )
        load = os.getloadavg()[0]
        settings = Settings(images=images, config=config, batch=batch)
        loading_seconds = seconds * (1.0 if step is None else 1.0 - TRAINING_SHARE) / len(threads)
        loading = [
            row for count in threads for row in _bench_loading(settings, count, seconds=loading_seconds)
        ]
        training = (
            _bench_training(settings, threads[-1], step, seconds=TRAINING_SHARE * seconds) if step else []
        )
        mean_bytes = _mean_bytes(
            [images.path(index) for index in range(0, len(images), 1 + len(images) // 1000)]
        )
    return {
        "machine": {**describe_machine("cpu"), **_versions(), "cores": cores, "load_before": load},
        "images": {"from": origin, "count": len(images), "mean_bytes": mean_bytes},
        "image_size": image_size,
        "batch": batch,
        "model": model,
        "loading": loading,
        "training": training,
    }


def _thread_counts(cores: int) -> list[int]:
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})


def _check(threads: Sequence[int], *, image_size: int, batch: int, seconds: float) -> None:
    for key, value, least in (
        ("--threads", min(threads), 1),
        ("--image-size", image_size, 32),
        ("--batch", batch, 2),
    ):
        if value < least:
            raise RecipeError(key, f"{value} is too small", f"make it {least} or more")
    if not seconds > 0.0:
        raise RecipeError("--seconds", f"{seconds:g} is no time", "make it more than 0")


def _bench_loading(settings: Settings, threads: int, *, seconds: float) -> list[dict[str, Any]]:
    log.info("loading with %d thread%s or worker%s", threads, *["s" * (threads > 1)] * 2)
    settings = replace(settings, config=replace(settings.config, threads=threads))
    with open_streams(settings, tuple(STREAMS)) as streams:
        times = time_streams(streams, threads=threads, seconds=seconds)
    rows = []
    for stage, (ours, theirs) in STAGES.items():
        ratio = ratio_to(times[theirs], times[ours])
        rows.append(
            {
                "stage": stage,
                "threads": threads,
                "dali_images_per_second": settings.batch / statistics.median(times[ours]),
                "timm_images_per_second": settings.batch / statistics.median(times[theirs]),
                "times_faster": asdict(ratio),
                "rounds": len(times[ours]),
            }
        )
    return rows


def _bench_training(
    settings: Settings,
    threads: int,
    step: Callable[[torch.Tensor, torch.Tensor], None],
    *,
    seconds: float,
) -> list[dict[str, Any]]:
    log.info("training")
    batch = min(settings.batch, TRAINING_BATCH)
    settings = replace(settings, batch=batch, config=replace(settings.config, threads=threads))
    with open_streams(settings, TRAINED) as streams:
        turns = time_training(streams, step, seconds=seconds)
    return [
        {
            "loader": name.split()[0],
            "augment": name.split()[1],
            "threads": threads,
            "batch": batch,
            "step_seconds": statistics.median(turn.seconds / turn.steps for turn in turns[name]),
            "data_wait_fraction": statistics.median(turn.waiting / turn.seconds for turn in turns[name]),
            "rounds": len(turns[name]),
        }
        for name in TRAINED
    ]


def _training_step(name: str, image_size: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    torch.manual_seed(0)
    model, _ = build_model(ModelConfig(name=name), BinaryConfig(method="cyclebnn"), image_size=image_size)
    set_widths(model, forward_bits=FORWARD_BITS, backward_bits=BACKWARD_BITS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _versions() -> dict[str, str]:
    return {"dali": nvidia.dali.__version__, "timm": timm.__version__, "pillow": PIL.__version__}


def _mean_bytes(paths: Sequence[str]) -> float:
    return statistics.fmean(os.path.getsize(path) for path in paths)
