"""The tables of ``cyclebnn bench data``."""

from __future__ import annotations

from typing import Any

from cyclebnn_dist.bench.paired import Ratio


def render_data(result: dict[str, Any]) -> str:
    """Tables for people."""
    machine, images = result["machine"], result["images"]
    lines = [
        f"{images['count']} images ({images['from']}; mean {images['mean_bytes'] / 1000:.0f} kB) to {result['image_size']} px, "
        f"batch {result['batch']}, both loaders in turn",
        f"{machine['device']}, {machine['cores']} cores, load {machine['load_before']:.1f} before; torch {machine['torch']}, "
        f"DALI {machine['dali']}, timm {machine['timm']}, Pillow {machine['pillow']}",
        "",
        f"{'images/s':<32}{'threads':>8}{'DALI':>9}{'timm':>9}{'times faster (95 %)':>24}{'rounds':>8}",
    ]
    for row in result["loading"]:
        lines.append(
            f"{row['stage']:<32}{row['threads']:>8}{row['dali_images_per_second']:>9.0f}"
            f"{row['timm_images_per_second']:>9.0f}{Ratio(**row['times_faster'])!s:>24}{row['rounds']:>8}"
        )
    lines += ["", "threads: DALI's decoding threads, timm's worker processes"]
    if any(row["stage"].startswith("randaugment") for row in result["loading"]):
        lines.append(
            "randaugment: timm leaves out each operation with probability 0.5 by default, this project none"
        )
    if result["training"]:
        lines += [
            "",
            f"{result['model'] + ', binary, trained':<32}{'threads':>8}{'batch':>7}{'step s':>9}{'waiting for data':>18}{'rounds':>8}",
        ]
    for row in result["training"]:
        lines.append(
            f"{row['loader'] + ' ' + row['augment']:<32}{row['threads']:>8}{row['batch']:>7}{row['step_seconds']:>9.3f}"
            f"{100 * row['data_wait_fraction']:>16.1f} %{row['rounds']:>8}"
        )
    return "\n".join(lines)
