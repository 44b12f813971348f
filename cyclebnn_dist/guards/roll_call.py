"""The roll call: when something failed on this rank, who else has failed, who first, and of whom nothing is heard."""

from __future__ import annotations

import json
import threading
import time

import torch.distributed as dist

from cyclebnn_dist.world import World

ANSWER_SECONDS = 3.0
"""How long others may take to fail as well: those whose connection to a lost rank broke do so at once."""

KEEPER_SECONDS = 1.0
"""How much longer rank 0 stays, which keeps the store that answers are in."""


def call_roll(world: World, error: BaseException) -> str:
    """Tell the others why this rank fails, and return a line about them; empty in a world of one. Raises nothing."""
    if world.store is None or world.size == 1:
        return ""
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(_ask(world, error)), daemon=True)
    asking.start()
    asking.join(2 * ANSWER_SECONDS + KEEPER_SECONDS)
    return said[0] if said else _keeper_is_gone(world)


def _ask(world: World, error: BaseException) -> str:
    assert world.store is not None
    store = dist.PrefixStore("roll_call", world.store)
    try:
        order = store.add("failed", 1)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        store.set(str(world.rank), json.dumps([order, world.rank, reason]))
        silent = set(range(world.size))
        patience = ANSWER_SECONDS + (KEEPER_SECONDS if world.is_main else 0.0)
        deadline = time.monotonic() + patience
        while silent and time.monotonic() < deadline:
            silent -= {rank for rank in silent if store.check([str(rank)])}
            time.sleep(0.1)
        answers = sorted(json.loads(store.get(str(rank))) for rank in {*range(world.size)} - silent)
        heard = store.add("heard", 1)
        while world.is_main and heard < len(answers) and time.monotonic() < deadline:
            heard = store.add("heard", 0)
            time.sleep(0.05)
    except RuntimeError:
        return _keeper_is_gone(world)
    if silent:
        names = ", ".join(world.name(rank) for rank in sorted(silent))
        return f"nothing is heard of {names}: killed, or hanging, or still waiting for this rank; see the log there"
    _, first, reason = answers[0]
    return (
        "this rank was the first to fail"
        if first == world.rank
        else f"{world.name(first)} failed first: {reason}"
    )


def _keeper_is_gone(world: World) -> str:
    if dist.is_torchelastic_launched():
        return "nothing is heard of torchrun's agent at MASTER_ADDR; see its log"
    return f"nothing is heard of {world.name(0)}, which all others depend on; see the log there"
