"""The report of a run: what it reached and what it cost, for people and for programs."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from cyclebnn_dist.binary import count
from cyclebnn_dist.metrics import split_by_world
from cyclebnn_dist.precision.cost import training_saving
from cyclebnn_dist.run import Run
from cyclebnn_dist.run_folder import SUMMARY_JSON, SUMMARY_TEXT


def write_summary(run: Run) -> str:
    """Write summary.json and summary.txt of a run that has ended; return the text. Rank 0 calls this alone."""
    summary = summarize(run)
    text = render_summary(summary)
    _publish(run.run_dir / SUMMARY_TEXT, text)
    _publish(run.run_dir / SUMMARY_JSON, json.dumps(summary, indent=2) + "\n")
    return text


def running_totals(run: Run) -> dict[str, float]:
    """What the run has added up so far on this rank, of which each number of ranks has its part (see metrics/worlds.py)."""
    totals, counters = run.totals, run.reducer.counters
    return {
        "steps": totals.steps.total(),
        "images": totals.images,
        "train_seconds": totals.train_seconds,
        "data_seconds": totals.data_seconds,
        "sent_bytes": counters.sent_bytes,
        "far_bytes": counters.far_bytes,
        "fp32_bytes": counters.fp32_bytes,
        "bf16_bytes": counters.bf16_bytes,
    }


def summarize(run: Run) -> dict[str, Any]:
    """Counted and measured over all lives of the run; bytes are those of rank 0.

    Speed is that of the newest number of ranks. Where that changed, ``worlds`` has each one's part.
    """
    totals, counters = run.totals, run.reducer.counters
    side = run.recipe.data.image_size
    counts = count(run.model, input_size=(3, side, side))
    saving = training_saving(
        counts, totals.steps - totals.real_weight_steps, full_steps=totals.real_weight_steps.total()
    )
    worlds = split_by_world(totals.worlds, running_totals(run))
    return {
        "finished": True,
        "run_dir": str(run.run_dir),
        "epochs": run.recipe.train.epochs,
        "steps": totals.steps.total(),
        "skipped_steps": totals.skipped_steps,
        "ranks": run.world.size,
        "device": run.world.device.type,
        **{f"eval_{name}": value for name, value in totals.evaluation.items()},
        "best_top1": totals.best_top1,
        "best_step": totals.best_step,
        "eval_forward_bits": run.eval_forward_bits,
        "images_per_second": worlds[-1]["images"] / worlds[-1]["train_seconds"],
        "train_seconds": totals.train_seconds,
        "eval_seconds": totals.eval_seconds,
        "save_seconds": totals.save_seconds,
        "failed_checkpoints": totals.failed_checkpoints,
        "data_wait_fraction": worlds[-1]["data_seconds"] / worlds[-1]["train_seconds"],
        "worlds": worlds,
        "bits": {
            channel: dict(zip(("min", "mean", "max"), totals.bits(channel), strict=True))
            for channel in ("forward", "backward", "communication")
        },
        "comm_mode": run.recipe.comm.mode,
        "comm_mode_used": run.comm_mode,
        "sent_bytes": counters.sent_bytes,
        "far_bytes": counters.far_bytes,
        "fp32_bytes": counters.fp32_bytes,
        "bf16_bytes": counters.bf16_bytes,
        **{f"exchange_{name}_seconds": seconds for name, seconds in counters.seconds().items()},
        "agreement_seconds": totals.agreement_seconds,
        "training_saving_binary_layers": saving.binary_layers,
        "training_saving_model": saving.model,
    }


def render_summary(summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    bits = "   ".join(
        f"{channel} {used['min']} / {used['mean']:.2f} / {used['max']}"
        for channel, used in summary["bits"].items()
    )
    rows = {
        "validation top-1": f"{summary['eval_top1']:.2f} % of {summary['eval_images']} images "
        f"(top-5 {summary['eval_top5']:.2f} %), evaluated at {summary['eval_forward_bits']} forward bits",
        "speed": "; ".join(_speed(world, alone=len(summary["worlds"]) == 1) for world in summary["worlds"]),
        "time": f"{summary['steps']} steps in {summary['train_seconds']:.0f} s, "
        f"evaluation {summary['eval_seconds']:.0f} s, standing still for checkpoints {_saving(summary)}",
        "bits (min/mean/max)": bits,
        "gradient bytes sent": "; ".join(
            _sent(world, alone=len(summary["worlds"]) == 1) for world in summary["worlds"]
        )
        + (f"; comm.mode=auto took {summary['comm_mode_used']}" if _auto(summary) else ""),
        "gradient exchange": _exchange(summary),
        "operations saved": f"{100 * summary['training_saving_binary_layers']:.1f} % of the binary layers' training "
        f"operations, {100 * summary['training_saving_model']:.1f} % of the whole model's (CPT's cost formula)",
        "run folder": summary["run_dir"],
        "next": f"{_command()} evaluate {summary['run_dir']}",
    }
    if summary["skipped_steps"]:
        rows["skipped steps"] = f"{summary['skipped_steps']} with a non-finite gradient"
    if summary["failed_checkpoints"]:
        rows["failed checkpoints"] = f"{summary['failed_checkpoints']} could not be written; the log says why"
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items()) + "\n"


def _saving(summary: dict[str, Any]) -> str:
    seconds = summary["save_seconds"]
    share = seconds / (summary["train_seconds"] + summary["eval_seconds"] + seconds)
    return f"{seconds:.2g} s ({100 * share:.2g} %)"


def _speed(world: dict[str, Any], *, alone: bool) -> str:
    seconds = world["train_seconds"]
    return (
        f"{world['images'] / seconds:.1f} images/s over {_ranks(world, alone=alone)} on {world['device']}, "
        f"{100 * world['data_seconds'] / seconds:.1f} % of it waiting for images"
    )


def _sent(world: dict[str, Any], *, alone: bool) -> str:
    sent, fp32, bf16 = world["sent_bytes"], world["fp32_bytes"], world["bf16_bytes"]
    where = "" if alone else f" over {_ranks(world, alone=alone)}"
    if sent == 0:
        return f"none{where}: one rank has nobody to send to"
    far = f", {readable_size(world['far_bytes'])} of it to other nodes" if world["far_bytes"] else ""
    return (
        f"{readable_size(sent)} per rank{where}{far}; fp32 would have sent {readable_size(fp32)} ({fp32 / sent:.2f}x), "
        f"bf16 {readable_size(bf16)} ({bf16 / sent:.2f}x)"
    )


def _ranks(world: dict[str, Any], *, alone: bool) -> str:
    first, last = world["first_step"], world["first_step"] + world["steps"] - 1
    steps = "" if alone else f" (steps {first} to {last})" if last > first else f" (step {first})"
    return f"{world['ranks']} rank{'s' * (world['ranks'] > 1)}{steps}"


def _auto(summary: dict[str, Any]) -> bool:
    return summary["comm_mode"] == "auto" and summary["sent_bytes"] > 0


def _exchange(summary: dict[str, Any]) -> str:
    if summary["sent_bytes"] == 0:
        return "none"
    encode, wire, decode, exposed = (
        summary[f"exchange_{part}_seconds"] for part in ("encode", "wire", "decode", "exposed")
    )
    share, agreeing = (part / summary["train_seconds"] for part in (exposed, summary["agreement_seconds"]))
    host = "host seconds: " if summary["device"] == "cuda" else ""
    return (
        f"{host}encode {encode:.3g} s, wire {wire:.3g} s, decode {decode:.3g} s; {exposed:.3g} s of it not hidden by the "
        f"backward pass ({100 * share:.1f} % of the time), ranks agreeing {100 * agreeing:.2f} %"
    )


def _command() -> str:
    """How the user types ``cyclebnn``: by name where it is found, else by its place in this environment."""
    if shutil.which("cyclebnn"):
        return "cyclebnn"
    return os.path.relpath(Path(sys.prefix) / "bin" / "cyclebnn")


def readable_size(num_bytes: float) -> str:
    """Bytes in decimal units, to three digits."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, int(math.log10(max(1.0, num_bytes)) // 3))
    return f"{num_bytes / 1000**power:.3g} {units[power]}"


def _publish(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
