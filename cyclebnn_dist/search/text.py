"""The result of a search for people."""

from __future__ import annotations

from pathlib import Path

from cyclebnn_dist.config.pattern import Pattern
from cyclebnn_dist.search.folder import PATTERN, PICTURE


def render_pattern(pattern: Pattern, *, folder: Path) -> str:
    """Which layers stay real, how that came about, what it costs, and how to use it."""
    found = pattern.found
    lines = []
    for number, each in enumerate(found["rounds"], start=1):
        change = each["top1"] - each["top1_unchanged"]
        lines.append(
            f"round {number:>3}  {each['layer']} becomes {each['to']}, of {each['candidates']} candidates: "
            f"top-1 {each['top1']:.2f} % ({change:+.2f}), cost {each['cost']:.4f}"
        )
    rows = {
        "real": ", ".join(pattern.real) or "none",
        "binary": ", ".join(pattern.binary) or "none",
        "cost": f"{pattern.cost:.4f} of the real network's operations, budget {pattern.budget:g}; "
        f"all binary {found['all_binary_cost']:.4f}",
        "found by": f"{found['strategy']}: {found['by']}",
        "pattern": str(folder / PATTERN),
        "picture": str(folder / PICTURE),
        "next": f"cyclebnn train RECIPE binary.pattern={folder / PATTERN}",
    }
    width = max(map(len, rows))
    lines += ["", *(f"{name:<{width}}  {text}" for name, text in rows.items())]
    return "\n".join(lines).lstrip("\n")
