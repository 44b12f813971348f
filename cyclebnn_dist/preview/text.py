"""The preview as text: bits against step as bars, shares of every width, bytes and operations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from cyclebnn_dist.precision import Schedule
from cyclebnn_dist.report import readable_size

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 72


def render_preview(schedule: Schedule, described: dict[str, Any]) -> str:
    """What ``preview`` describes, for a terminal. A bar is the mean of its steps, between 0 and the highest width."""
    steps, channels = described["steps"], described["bits"]
    width = max(map(len, channels))
    lines = [
        f"{steps} steps, {described['steps_per_epoch']} an epoch ({described['epochs']:g} epochs; "
        f"{described['steps_known_from']})",
        *(
            [f"the first {first} of them with real weights"]
            if (first := described["first_phase_steps"])
            else []
        ),
        "",
    ]
    for name, used in channels.items():
        bars = _bars(getattr(schedule, name).first(steps), highest=used["max"])
        lines.append(f"{name:<{width}}  {bars}  {bits_in_words(used)}")
    lines.append(_axis(described, width=width, columns=min(COLUMNS, steps)))

    widths = sorted({bits for used in channels.values() for bits in used["histogram"]})
    lines += ["", " ".join([f"{'% of steps at':<{width + 1}}", *(f"{bits:>5}" for bits in widths), " bits"])]
    for name, used in channels.items():
        shares = (
            f"{100 * used['histogram'][bits] / steps:5.1f}" if bits in used["histogram"] else f"{'-':>5}"
            for bits in widths
        )
        lines.append(" ".join([f"{name:<{width + 1}}", *shares]))
    lines += [
        "",
        f"gradient bytes    {_sent(described)}",
        f"operations saved  {100 * described['training_saving_binary_layers']:.1f} % of the binary layers' training "
        f"operations, {100 * described['training_saving_model']:.1f} % of the whole model's (CPT's cost formula)",
    ]
    return "\n".join(lines)


def bits_in_words(used: dict[str, Any]) -> str:
    """Range and mean of one width."""
    if used["min"] == used["max"]:
        return f"always {used['min']} bits"
    return f"{used['min']} to {used['max']}, mean {used['mean']:.2f} bits"


def _bars(bits: bytes, *, highest: int) -> str:
    columns = min(COLUMNS, len(bits))
    edges = [len(bits) * column // columns for column in range(columns + 1)]
    means = [sum(bits[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(BARS[round(mean / highest * (len(BARS) - 1))] for mean in means)


def _axis(described: dict[str, Any], *, width: int, columns: int) -> str:
    last = f"{described['steps']}"
    return f"{'step':<{width}}  0{last:>{max(columns - 1, len(last) + 1)}}"


def _sent(described: dict[str, Any]) -> str:
    ranks, sent = described["ranks"], described["sent_bytes"]
    if sent == 0:
        return "none: one rank has nobody to send to (--ranks)"
    fp32, bf16 = described["fp32_bytes"], described["bf16_bytes"]
    text = (
        f"{readable_size(sent)} per rank over the run with {ranks} ranks (--ranks); "
        f"fp32 would send {readable_size(fp32)} ({fp32 / sent:.2f}x), bf16 {readable_size(bf16)} ({bf16 / sent:.2f}x)"
    )
    if described["comm_mode"] == "auto":
        text += "\n                  if comm.mode=auto takes the schedule's widths"
    if described["weight_bytes"]:
        text += (
            f"\nweight bytes      {readable_size(described['weight_bytes'])} per rank beside them: updated weights in fp32, "
            f"ZeRO stage {described['zero_stage']}"
        )
    return text
