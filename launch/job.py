"""The job: what is pickled at submission and called on every rank, as often as the run is started.

It is stateless: it carries the resolved recipe, and the trainer finds the newest checkpoint in the run folder by itself.
A requeue after a node failure, where nobody is asked, therefore resumes just as one after a time-out does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from cyclebnn_dist.config import RecipeError, recipe_from_dict
from cyclebnn_dist.guards.exit_status import FAILED, FINISHED, INTERRUPTED, PREEMPTED, REFUSED
from cyclebnn_dist.guards.preempt import listening
from cyclebnn_dist.meeting import slurm_port
from launch import snapshot
from launch.processes import Process, arguments, is_running, look, marked, send
from launch.queue import job_states

__all__ = ["FAILED", "FINISHED", "INTERRUPTED", "PREEMPTED", "REFUSED", "Job", "Outcome", "prepare_rank"]

LAUNCHER_PID = "CYCLEBNN_LAUNCHER_PID"
"""Environment variable of a local run: the process whose end is the run's end."""

MARK = "CYCLEBNN_LAUNCH"
"""Environment variable that marks every process of one local run."""

UNKNOWN_STATE_SECONDS = 600
"""How long a job that was told to stop waits for its end where Slurm cannot be asked about it; GraceTime is less."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: an exit status, and what the user should read."""

    status: int
    message: str = ""


@dataclass(frozen=True)
class Job:
    """Train a recipe on this rank."""

    recipe: dict[str, Any]
    """The resolved recipe, as to_dict gives it: a queued job trains what was submitted, whatever the file says by then."""
    run_dir: str
    """The run folder; equal to the recipe's run.dir."""
    cuda_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a local run; None leaves what the scheduler set."""

    def __call__(self) -> Outcome:
        """Run to the end. What the user can mend is returned, not raised; everything else is raised.

        Raises:
            RuntimeError: the code is not that of the snapshot it was submitted with.
            SystemExit: on Slurm, for a run that did not finish, so that Slurm does not count the job as completed.
        """
        prepare_rank(self.cuda_devices)
        code = snapshot.enter()
        if os.environ["RANK"] == "0" and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            print(code, flush=True)
        try:
            recipe = recipe_from_dict(self.recipe)
            with listening() as preemption:
                preemption.belongs_to(int(os.environ["RANK"]))
                from cyclebnn_dist import train

                outcome = Outcome(train.main(recipe, preemption=preemption))
        except RecipeError as error:
            outcome = Outcome(REFUSED, str(error) if os.environ["RANK"] == "0" else "")
        except KeyboardInterrupt:
            outcome = Outcome(INTERRUPTED, "interrupted; what was saved stays")
        if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
            return outcome
        if outcome.status in (FAILED, REFUSED, INTERRUPTED):
            print(outcome.message, file=sys.stderr, flush=True)
            sys.exit(outcome.status)
        # Other ranks leave without an error: srun may be told to end the step at the first, and rank 0 has yet to requeue.
        if outcome.status == PREEMPTED and os.environ["RANK"] == "0":
            requeue_preempted()
            sys.exit(PREEMPTED)
        return outcome

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit what to requeue: this job again. The trainer has saved before it lets submitit ask."""
        return DelayedSubmission(self)


def requeue_preempted() -> None:
    """On rank 0 of a Slurm job that has saved because of a signal: have submitit requeue it, unless somebody ends it.

    A pre-emption comes as SIGTERM where Slurm is not told to send the job's own signal. A job that then ended by itself
    would count as completed, and never come back. While its time of grace lasts it still counts as running; one that is
    cancelled or requeued already does not.

    Raises:
        SystemExit: the job was requeued.
    """
    job = JobEnvironment().job_id
    try:
        state = job_states([job])[job].state
    except RecipeError as error:
        log.warning("%s; waiting for Slurm to end this job, and to requeue it if it may", error)
        time.sleep(UNKNOWN_STATE_SECONDS)
        return
    if state != "RUNNING":
        log.info("this job is %s already", state)
        return
    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
    requeue = signal.getsignal(number)
    if callable(requeue):
        requeue(number, None)


def prepare_rank(cuda_devices: str | None = None) -> None:
    """Export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, over stale ones.

    The trainer picks its GPU by LOCAL_RANK, so CUDA_VISIBLE_DEVICES is left as the scheduler set it.
    """
    logging.getLogger("submitit").propagate = False  # it writes into the rank's log by itself
    on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    if on_slurm:
        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if not on_slurm:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if cuda_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = cuda_devices
    if LAUNCHER_PID in os.environ:
        launcher = look(int(os.environ[LAUNCHER_PID]))
        watcher = threading.Thread(target=_end_with, args=(os.getppid(), launcher), daemon=True)
        watcher.start()


def _end_with(parent: int, launcher: Process | None) -> None:
    """End the run when one of the processes that look after it is gone, so that none is left behind."""
    while os.getppid() == parent and launcher is not None and is_running(launcher):
        time.sleep(1.0)
    log.error("the launcher of this run is gone: ending")
    if MARK in os.environ:
        # The other ranks come last: they are doing the same, and whoever is killed first must leave nothing undone.
        left = marked(f"{MARK}={os.environ[MARK]}")
        send(
            sorted(left, key=lambda process: "submitit.core._submit" in arguments(process.pid)),
            signal.SIGKILL,
        )
    os._exit(FAILED)
