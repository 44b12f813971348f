"""The table of ``bench mixbin`` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = {
    "shrink": "the search: from all real, binary layers by harm (in loss) per cost",
    "grow": "the search from all binary: real layers by gain (in loss) per cost",
    "iterative": "as shrink, by plain loss, whatever a layer saves",
    "sensitivity": "one round of scores",
    "first": "the first layers real",
    "last": "the last layers real",
    "random": "any layers real",
}


def render_mixbin(result: Mapping[str, Any]) -> str:
    """A row for each choice, and what they show."""
    machine, images = result["machine"], result["images"]
    lines = [
        f"{result['model']}, {result['candidates']} layers to choose from, budget {result['budget']:g} of the real network's "
        f"operations (all binary: {result['all_binary_cost']:.3f})",
        f"{images['train']:,} images to train with, {images['held_out']:,} of them held out in searches, {images['test']:,} "
        f"to test with; {result['steps']} steps, {result['candidate_steps']} a candidate",
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}; "
        f"{result['seeds']} of {result['asked_seeds']} seeds, {result['random_choices']} random choices each",
        "",
        f"{'choice':<13}{'cost':>7}{'accuracy %':>12}{'search less it, points (95 %)':>33}  what it is",
    ]
    for row in result["choices"]:
        difference = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
        if row["interval"]:
            difference += f" ({row['interval']['low']:+.2f} to {row['interval']['high']:+.2f})"
        lines.append(
            f"{row['choice']:<13}{row['cost']:>7.3f}{row['accuracy']:>12.2f}{difference:>33}  {WORDS[row['choice']]}"
        )
    claim = {
        True: "shown",
        False: "not shown",
        None: f"no verdict: fewer than {result['least_seeds']} seeds",
    }[result["claim"]]
    lines += [
        "",
        f"claim  the search (shrink) beats random layers within the same budget, its interval above 0: {claim}",
    ]
    if result["stopped"]:
        more = f"; the same line goes on from {result['out']}" if result["out"] else ""
        lines.append(f"incomplete  --seconds ran out{more}")
    return "\n".join(lines)
