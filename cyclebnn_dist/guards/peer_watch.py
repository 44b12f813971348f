"""The peer watch: notices that another rank's process is gone, also while this one waits for its GPU.

On CPUs whoever waits for a lost rank learns of it from Gloo. On GPUs a rank may wait inside the driver for a message that
will never come, until ``run.collective_timeout_seconds`` have passed. Here a thread of each rank waits for a message of the
next one, which comes when training is over, or when somebody is lost; a broken connection says the same. The ranks form a
ring, so the news reaches all of them at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from cyclebnn_dist.guards.exit_status import FAILED
from cyclebnn_dist.guards.roll_call import call_roll
from cyclebnn_dist.world import World

log = logging.getLogger(__name__)

OVER, LOST = 0, 1

GRACE_SECONDS = 8.0
"""How long the main thread may take to notice by itself, and to say more about it."""


@contextmanager
def watching_peers(world: World) -> Iterator[None]:
    """Collective: every rank calls this, and leaves it at the same place. Within it a lost rank ends this one, too."""
    if world.size == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(world, group, over), name="peer watch", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        raise
    over.set()
    _tell_previous(world, group, OVER)
    thread.join()
    dist.destroy_process_group(group)


def _tell_previous(world: World, group: dist.ProcessGroup, news: int) -> None:
    dist.send(torch.tensor([news]), dst=(world.rank - 1) % world.size, group=group)


def _watch(world: World, group: dist.ProcessGroup, over: threading.Event) -> None:
    news = torch.tensor([LOST])
    why = "the next one heard that another is gone"
    try:
        dist.recv(news, src=(world.rank + 1) % world.size, group=group)
    except RuntimeError as error:
        news.fill_(LOST)
        why = str(error)
    if news.item() == OVER:
        return
    if not over.is_set():
        with suppress(RuntimeError):
            _tell_previous(world, group, LOST)
    if over.wait(GRACE_SECONDS):
        return
    log.error(
        "%s, of %d ranks, ends, because another one is gone: %s", world.name(world.rank), world.size, why
    )
    about_others = call_roll(world, RuntimeError(why))
    if about_others:
        log.error("%s: %s", world.name(world.rank), about_others)
    logging.shutdown()
    os._exit(FAILED)
