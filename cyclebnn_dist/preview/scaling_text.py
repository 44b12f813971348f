"""The scaling of a recipe as text: a table of clusters, and what the model behind it leaves out."""

from __future__ import annotations

import textwrap
from typing import Any

from cyclebnn_dist.comm.verdict import readable_rate, readable_seconds
from cyclebnn_dist.report import readable_size

WIDTH = 110


def render_scaling(described: dict[str, Any]) -> str:
    """What ``plan_scaling`` describes, for a terminal."""
    first = described["rows"][0]
    lines = [
        f"{described['gradients'] / 1e6:.3g} million gradients in {described['buckets']} buckets; "
        f"{described['steps']} steps ({described['steps_known_from']}), mean {described['mean_bits']:.2f} bits",
        f"compute    {readable_seconds(described['compute_seconds'])} a step and rank, {_compute_source(described)}",
        f"codec      {_codec(described)}",
        f"network    {readable_rate(first['network_bytes_per_second'])} a node, ranks of a node: "
        f"{first['gpus_per_node']}; {readable_size(first['intra_bytes_per_second'])}/s a rank within it; "
        f"{1e6 * first['message_seconds']:g} us a message",
        "",
        f"{'nodes':>6} {'ranks':>6}  {'gradients':<9} {'step':>9} {'exposed':>9} {'efficiency':>10}  "
        "sent a step and rank",
    ]
    for row in described["rows"]:
        places = [f"{row['nodes']:>6} {row['ranks']:>6}", " " * 13, " " * 13]
        for place, (name, mode) in zip(places, row["modes"].items(), strict=True):
            lines.append(
                f"{place}  {name:<9} {readable_seconds(mode['step_seconds']):>9} {readable_seconds(mode['exposed_seconds']):>9} "
                f"{100 * mode['efficiency']:>8.1f} %  {_sent(mode)}"
            )
    lines += ["", "A prediction, not a measurement:"]
    for text in described["assumptions"]:
        lines += textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def _sent(mode: dict[str, float]) -> str:
    if not mode["sent_bytes_per_step"]:
        return "nothing"
    weights = mode["weight_bytes_per_step"]
    return readable_size(mode["sent_bytes_per_step"]) + (
        f", {readable_size(weights)} of weights" if weights else ""
    )


def _compute_source(described: dict[str, Any]) -> str:
    if not described["compute_measured"]:
        return "as given"
    return f"measured here on one {described['device']} with {described['batch']} images a pass (--compute-seconds)"


def _codec(described: dict[str, Any]) -> str:
    rates = {bits: rate for bits, rate in described["codec_gb_per_second"].items() if rate}
    if not described["codec_measured"]:
        return (
            f"{next(iter(rates.values())):.3g} GB/s of fp32 gradients as given; casts for nothing"
            if rates
            else "-"
        )
    codes = [rate for bits, rate in rates.items() if bits <= 8]
    spans = [f"{min(codes):.3g} to {max(codes):.3g} at the schedule's bits"] if codes else []
    spans += [f"{rates[bits]:.3g} as {name}" for bits, name in ((16, "bf16"), (32, "fp32"))]
    return f"GB/s of fp32 gradients, measured here on one {described['device']} (--codec): {', '.join(spans)}"
