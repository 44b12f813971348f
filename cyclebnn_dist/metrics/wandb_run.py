"""The Weights & Biases run of rank 0. Whatever goes wrong in it, training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import wandb

from cyclebnn_dist.config.recipe import WandbConfig
from cyclebnn_dist.guards.exit_status import PREEMPTED

log = logging.getLogger(__name__)

STEP = "trainer/step"
ID_FILE = "wandb_run_id"
INIT_TIMEOUT_SECONDS = 60

LEAVE_SECONDS = 20.0
"""How long a run that is stopped may take to send what the server has not got: others wait for its requeue."""


class WandbRun:
    """One run under one id over all lives: the id is kept in ``run_dir/wandb_run_id``.

    The step is logged as a value of its own, so that steps repeated after a kill are drawn over the lost ones
    instead of being dropped.
    """

    def __init__(self, run_dir: Path, config: WandbConfig, *, recipe: dict[str, Any], enabled: bool) -> None:
        mode = resolve_mode(config.mode) if enabled else "disabled"
        self._run: wandb.Run | None
        if mode == "disabled":
            self._run = wandb.init(mode="disabled")
            return
        arguments: dict[str, Any] = {
            "id": _run_id(run_dir / ID_FILE),
            "project": config.project,
            "entity": config.entity or None,
            "group": config.group or None,
            "tags": list(config.tags),
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": recipe,
            "settings": wandb.Settings(
                init_timeout=INIT_TIMEOUT_SECONDS, console="off", disable_git=True, silent=True
            ),
        }
        self._run = _start(mode, arguments)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, row: dict[str, Any], *, step: int) -> None:
        """Log one row of numbers at a step."""
        self._tell(lambda run: run.log({STEP: step, **row}))

    def summarize(self, values: dict[str, Any]) -> None:
        """Set values of the run's summary."""
        self._tell(lambda run: run.summary.update(values))

    def leave(self) -> None:
        """Send what there is and tell the server that this run will come back.

        The service process that does the sending is killed with the job's other processes once Slurm requeues it.
        """

        def end(run: wandb.Run) -> None:
            run.mark_preempting()
            run.finish(exit_code=PREEMPTED)  # a pre-emption to the server only where it is not 0
            wandb.teardown()  # which would otherwise follow at exit, and find the service killed

        ending = threading.Thread(target=self._tell, args=(end,), daemon=True)
        ending.start()
        ending.join(LEAVE_SECONDS)
        if ending.is_alive():
            log.warning("Weights & Biases has not got all within %.0f s; not waiting", LEAVE_SECONDS)

    def finish(self) -> None:
        self._tell(lambda run: run.finish())

    def _tell(self, say: Callable[[wandb.Run], object]) -> None:
        # Slurm sends SIGTERM to every process of a job: the service of wandb then ends before the ranks have saved.
        if self._run is None:
            return
        try:
            say(self._run)
        except Exception as error:
            self._run = None
            with contextlib.suppress(Exception):
                wandb.teardown()
            log.warning(
                "Weights & Biases is lost (%s: %s); this run goes on, and metrics.jsonl has everything",
                type(error).__name__,
                error,
            )


def _run_id(path: Path) -> str:
    """The id of a run: that in the file, else a new one, which is kept there if the disk takes it."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        run_id = uuid.uuid4().hex[:8]
    try:
        path.write_text(run_id + "\n")
    except OSError as error:
        log.warning("%s: %s; a later start will be another run of Weights & Biases", path, error.strerror)
    return run_id


def _start(mode: Literal["online", "offline", "disabled"], arguments: dict[str, Any]) -> wandb.Run:
    """A run in the mode asked for, else offline, else one that writes nothing."""
    attempts: list[Literal["online", "offline", "disabled"]] = [mode, "offline"]
    for attempt in dict.fromkeys(attempts):
        resume: dict[str, Any] = {"resume": "allow"} if attempt == "online" else {}
        try:
            return wandb.init(mode=attempt, **resume, **arguments)
        except Exception as error:
            log.warning("Weights & Biases did not start %s: %s", attempt, error)
    log.warning("this run goes on without Weights & Biases; metrics.jsonl has everything")
    return wandb.init(mode="disabled")


def resolve_mode(mode: str) -> Literal["online", "offline", "disabled"]:
    """``auto``: WANDB_MODE if set, else online where an API key is present, else offline. Never a login prompt."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return mode  # type: ignore[return-value]
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
