"""The commands for runs that were started: ``python -m launch status | logs | cancel RUN_DIR``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from cyclebnn_dist.config import SAVED_NAME, RecipeError
from cyclebnn_dist.run_folder import LAUNCHER_FOLDER
from launch import processes, queue, record
from launch.progress import describe, read_progress
from launch.queue import JobState
from launch.record import Submission, local_launcher

COMMANDS = ("status", "logs", "cancel")

SHOWN_JOBS = 3
"""How many of a run's submissions status lists."""
POLL_SECONDS = 0.5
TAIL_BYTES = 4096
"""How much of a log is shown before it is followed."""

EXAMPLES = """\
examples:
  python -m launch status runs/imagenet_resnet18
  python -m launch status runs/sweep               all points of a grid
  python -m launch logs runs/imagenet_resnet18 --follow
  python -m launch cancel runs/sweep/lr=0.001

exit status: 0 done, 2 refused.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Look after runs that were started. A grid's folder stands for all its points.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="how far runs are, and what became of their jobs")
    status.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    logs = commands.add_parser("logs", help="the log of one rank of the newest job")
    logs.add_argument("run_dir", metavar="RUN_DIR")
    logs.add_argument("--rank", metavar="N", type=int, default=0, help="instead of rank 0")
    logs.add_argument("--follow", action="store_true", help="go on showing what is written, until Ctrl-C")
    cancel = commands.add_parser("cancel", help="end the jobs of runs for good; what was saved stays")
    cancel.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one of the commands and return its exit status.

    Raises:
        RecipeError: a folder that no run was started in, no Slurm here, no such log.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.command == "logs":
        return show_log(Path(arguments.run_dir), rank=arguments.rank, follow=arguments.follow)
    runs = [run for text in arguments.run_dirs for run in find_runs(Path(text))]
    return show_status(runs) if arguments.command == "status" else cancel_runs(runs)


def find_runs(folder: Path) -> list[Path]:
    """Return the folder, where a run was started in it, else the runs of the grid it holds.

    Raises:
        RecipeError: it is neither.
    """
    if _is_run(folder):
        return [folder]
    points = sorted(path for path in folder.glob("*/") if _is_run(path)) if folder.is_dir() else []
    if not points:
        problem = "no run was started in this folder" if folder.is_dir() else "no such folder"
        raise RecipeError(str(folder), problem, "name the run folder (run.dir), or a grid's")
    return points


def _is_run(folder: Path) -> bool:
    return (folder / SAVED_NAME).is_file() or (folder / LAUNCHER_FOLDER / record.RECORD).is_file()


def show_status(runs: Sequence[Path]) -> int:
    """Print how far every run is and what became of its newest jobs."""
    submissions = {run: record.read(run) for run in runs}
    jobs = [s.job for of_run in submissions.values() for s in of_run[-SHOWN_JOBS:] if s.cluster == "slurm"]
    note, states = "", {}
    try:
        states = queue.job_states(jobs)
    except RecipeError as error:
        note = f"the state of jobs is not known here: {error.problem}"
    for run in runs:
        progress = read_progress(run)
        shown = [(s, _state(s, states)) for s in submissions[run][-SHOWN_JOBS:]]
        alive = [submission.describe() for submission, state in shown if state.live]
        if progress.finished:
            head = "finished"
        elif alive:
            head = f"{'; '.join(alive)}: {', '.join(state.state.lower() for _, state in shown if state.live)}"
        elif note and any(s.cluster == "slurm" for s, _ in shown):
            head = "not finished"
        else:
            head = "not finished, and no job at work; the same command goes on from the newest checkpoint"
        print(f"{run}\n  {head}")
        for line in describe(progress):
            print(f"  {line}")
        for submission, state in shown:
            print(
                f"  {submission.describe()}  {f'{state.state} {state.detail}'.strip()}  submitted {submission.submitted}"
            )
            print(f"    {submission.command}")
    if note:
        print(note)
    return 0


def _state(submission: Submission, states: dict[str, JobState]) -> JobState:
    if submission.cluster == "slurm":
        return states.get(submission.job, JobState("UNKNOWN"))
    try:
        return JobState("ENDED" if local_launcher(submission) is None else "RUNNING")
    except RecipeError as error:
        return JobState("UNKNOWN", f"({error.cure})")


def jobs_in_queue(runs: Iterable[Path]) -> dict[Path, list[str]]:
    """Return the Slurm jobs of runs that wait or run; runs without any are left out.

    Raises:
        RecipeError: a run was submitted before, and Slurm does not answer.
    """
    jobs = {run: [s.job for s in record.read(run) if s.cluster == "slurm"] for run in runs}
    states = queue.job_states([job for of_run in jobs.values() for job in of_run])
    live = {run: [job for job in of_run if states[job].live] for run, of_run in jobs.items()}
    return {run: of_run for run, of_run in live.items() if of_run}


def refuse(run_dir: Path, jobs: Sequence[str]) -> NoReturn:
    """Refuse to submit a run that has these jobs in the queue.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        "run.dir",
        f"{run_dir} has job {', '.join(jobs)} in the queue",
        f"leave it to that job, or end it with `python -m launch cancel {shlex.quote(str(run_dir))}`; "
        "--again submits another that starts when it has ended",
    )


def cancel_runs(runs: Sequence[Path]) -> int:
    """End every job of the runs that is in the queue or at work, and print which."""
    submissions = [(run, submission) for run in runs for submission in record.read(run)]
    slurm = [submission.job for _, submission in submissions if submission.cluster == "slurm"]
    states = queue.job_states(slurm)
    live = [job for job in slurm if states[job].live]
    if live:
        queue.cancel(live)
    ended = [(run, s) for run, s in submissions if s.cluster == "slurm" and s.job in live]
    elsewhere = []
    for run, submission in submissions:
        if submission.cluster == "local":
            try:
                launcher = local_launcher(submission)
            except RecipeError:
                if submission == record.read(run)[-1]:  # older ones have most likely ended
                    elsewhere.append((run, submission))
                continue
            if launcher is not None:
                processes.send([launcher], signal.SIGTERM)
                ended.append((run, submission))
    for run, submission in ended:
        print(f"cancelled {submission.describe()}  {run}")
    for run, submission in elsewhere:
        print(f"not looked after, ask there: {submission.describe()}  {run}")
    if not ended:
        print("no job of these runs is in the queue or at work")
    return 0


def show_log(run_dir: Path, *, rank: int, follow: bool) -> int:
    """Print the log of a rank of the newest job; ``follow`` goes on until Ctrl-C.

    Raises:
        RecipeError: nothing was started in this folder, or there is no such log.
    """
    if not _is_run(run_dir):
        points = find_runs(run_dir)
        raise RecipeError(str(run_dir), f"holds {len(points)} runs", f"name one, e.g. {points[0]}")
    submissions = record.read(run_dir)
    if not submissions:
        raise RecipeError(
            str(run_dir), "no submission is recorded in it", "it was not started by python -m launch"
        )
    newest = submissions[-1]
    if not 0 <= rank < newest.ranks:
        raise RecipeError(
            "--rank", f"there is no rank {rank}", f"{newest.describe()} has ranks 0 to {newest.ranks - 1}"
        )
    log = newest.log(rank)
    if not log.exists() and not follow:
        raise RecipeError(
            "logs", f"{newest.describe()} has not written {log} yet", "see python -m launch status"
        )
    try:
        _pass_on(log, follow=follow)
    except KeyboardInterrupt:
        print()
    return 0


def _pass_on(log: Path, *, follow: bool) -> None:
    if not log.exists():
        print(f"waiting for {log}", file=sys.stderr)
    while not log.exists():
        time.sleep(POLL_SECONDS)
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES) if follow else 0)
        if stream.tell():
            stream.readline()
        while True:
            sys.stdout.write(stream.read().decode(errors="replace"))
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(POLL_SECONDS)
