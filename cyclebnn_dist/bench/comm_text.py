"""The table of ``bench comm`` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyclebnn_dist.bench.paired import Ratio


def render_comm(result: Mapping[str, Any]) -> str:
    """Table of variants, what limits them, and the advice."""
    machine = result["machine"]
    lines = [
        f"averaging {result['numel']:,} fp32 gradients over {result['ranks']} ranks, {result['network']}; "
        f"{result['rounds']} rounds in turn over {result['launches']} launches",
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}; every rank sends "
        f"{readable_rate(result['link_bits_per_second'])} while all do",
        "",
        f"{'variant':<11}{'seconds':>9}{'sent MB':>9}{'error':>10}{'x fp32 (95 %)':>23}{'x 16 bit (95 %)':>23}"
        f"{'wire s':>9}{'codec s':>9}{'/ longer':>9}",
    ]
    for row in result["variants"]:
        ratios = [str(Ratio(**row[key])) for key in ("speedup_vs_fp32", "speedup_vs_16bit")]
        codec = "-" if row["codec_seconds"] is None else f"{row['codec_seconds']:.3f}"
        lines.append(
            f"{row['variant']:<11}{row['median_seconds']:>9.3f}{row['sent_bytes'] / 1e6:>9.2f}{row['nmse']:>10.2g}"
            f"{ratios[0]:>23}{ratios[1]:>23}{row['wire_seconds']:>9.3f}{codec:>9}{row['times_limit']:>9.2f}"
        )
    return "\n".join([*lines, "", *_remarks(result)])


def _remarks(result: Mapping[str, Any]) -> list[str]:
    by_name = {row["variant"]: row for row in result["variants"]}
    lines = [
        "seconds      median of a whole all-reduce, slowest rank; sent: counted by rank; error: squared, of the mean",
        "x fp32       how many times as fast, paired by round; wire: bytes at the rate above; codec: without a network,",
        "             all ranks at once; / longer: seconds divided by the longer of the two",
    ]
    names = result["baselines"]
    lines.append(
        f"baselines    fp32 is {names['fp32']}, 16 bit {names['16bit']}, the fastest measured; torch_: torch's own; "
        f"{', '.join(_times_wire(row) for row in result['variants'] if row['bits'] > 8)} times their wire's time"
    )
    speeds = [each / 1e9 for row in _widths(result) if (each := row["codec_bytes_per_core_second"])]
    if speeds:
        lines.append(
            f"codec        {min(speeds):.2f} to {max(speeds):.2f} GB of fp32 a second and core over all widths"
        )
    for name in ("q8", "q4", "q2"):
        if name in by_name:
            row = by_name[name]
            lines.append(
                f"break-even   {name} is faster than 16 bits {_up_to(row['break_even_bits_per_second_vs_16bit'])}, "
                f"than fp32 {_up_to(row['break_even_bits_per_second_vs_fp32'])}"
            )
    if result["auto"]:
        lines.append(f"auto         {_auto(result['auto'])}")
    advice = result["advice"]
    if advice["mode"] == "quantized":
        use = f"precision.communication.low={advice['low']} precision.communication.high={advice['high']}"
    else:
        use = f"comm.mode={advice['mode']}"
    return [*lines, f"recommended  {use} on this network: {advice['why']}"]


def _auto(auto: Mapping[str, Any]) -> str:
    taken = " or ".join(dict.fromkeys(auto["modes"]))
    times = ", ".join(
        f"{auto['quantized'] if mode == 'quantized' else mode} {auto['reckoned_seconds'][mode]:.3f} for {measured:.3f}"
        for mode, measured in auto["measured_seconds"].items()
    )
    return f"comm.mode=auto would take {taken}: it reckons with {times} s measured"


def _widths(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result["variants"] if row["variant"] in {f"q{bits}" for bits in range(1, 9)}]


def _times_wire(row: Mapping[str, Any]) -> str:
    return f"{row['variant']} {row['times_wire']:.2f}"


def _up_to(rate: float | None) -> str:
    if rate is None:
        return "at any rate of the links"
    return f"below {readable_rate(rate)} a rank" if rate else "at no rate"


def readable_rate(bits_per_second: float) -> str:
    """A rate of a network in decimal units, to three digits."""
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits_per_second >= size:
            return f"{bits_per_second / size:.3g} {unit}"
    return f"{bits_per_second / 1e3:.3g} kbit/s"
