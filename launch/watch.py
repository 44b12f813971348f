"""The watch over a local run: shows rank 0's log, ends the siblings of a rank that died, and leaves nothing behind.

submitit's local controller starts the ranks and waits until all of them have ended, however long one hangs after
another was killed. The watch sees each rank's process end and takes care of the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import submitit
from submitit.core.utils import JobPaths, pickle_load

from launch import processes
from launch.job import FAILED, FINISHED, INTERRUPTED, MARK, PREEMPTED, Outcome
from launch.processes import Process

SIBLING_SECONDS = 10.0
"""How long the other ranks may take to end by themselves after one died; they usually do, and say why."""

SAVE_SECONDS = 60.0
"""How long ranks may take to save and end after Ctrl-C."""

QUIET = ("submitit INFO", "submitit WARNING", "submitit ERROR")
"""What submitit itself logs; its errors come with the rank's own traceback."""
LAST_LINES = 15


@dataclass(frozen=True)
class Rank:
    """The process of one rank, in its present life."""

    rank: int
    process: Process
    stale_result: int
    """Modification time of a result file of an earlier life; 0 where there is none."""
    ended: float | None = None
    exit_status: int | None = None


def watch(job: submitit.LocalJob[Any], *, mark: str, tasks: int, out: TextIO = sys.stdout) -> Outcome:
    """Follow a local run to its end and return how it ended; when this returns none of its processes is left.

    Args:
        job: what start_local returned.
        mark: the mark given to start_local.
        tasks: number of ranks.
        out: where rank 0's log lines go.
    """
    with _signals() as received:
        return _Watch(job, mark=mark, tasks=tasks, out=out, received=received).run()


class _Watch:
    def __init__(
        self,
        job: submitit.LocalJob[Any],
        *,
        mark: str,
        tasks: int,
        out: TextIO,
        received: list[signal.Signals],
    ) -> None:
        self.job = job
        self.mark = f"{MARK}={mark}"
        self.tasks = tasks
        self.out = out
        self.received = received
        self.paths = [JobPaths(job.paths.folder, job.job_id, rank) for rank in range(tasks)]
        self.ranks: dict[int, Rank] = {}
        self.read_bytes = 0
        self.stop_asked: float | None = None
        self.remind_at = 0.0
        self.siblings_killed = False
        self.controller_lost = False

    def run(self) -> Outcome:
        controller = self.job._process
        assert controller is not None
        try:
            while controller.poll() is None:
                self.discover()
                # A rank must be seen before it can be missed, however short its life.
                seconds = 0.2 if len(self.ranks) == self.tasks else 0.02
                processes.wait_for_any((r.process for r in self.running()), seconds=seconds)
                self.note_ends()
                self.show_log()
                self.end_siblings()
                self.obey_signals()
        finally:
            self.note_ends()
            self.controller_lost = controller.poll() is not None and bool(self.running())
            self.sweep()
        controller.wait()
        self.note_ends()
        self.show_log(to_end=True)
        return self.conclude(controller.returncode)

    def running(self) -> list[Rank]:
        return [rank for rank in self.ranks.values() if rank.ended is None]

    def discover(self) -> None:
        """Find the ranks' processes; a rank with another process than before has been started again by submitit."""
        self.note_ends()
        if len(self.running()) == self.tasks:
            return
        ranks = [
            p for p in processes.marked(self.mark) if "submitit.core._submit" in processes.arguments(p.pid)
        ]
        pids = {process.pid for process in ranks}
        for process in ranks:
            variables = dict(text.partition("=")[::2] for text in processes.environment(process.pid))
            number = variables.get("SUBMITIT_LOCAL_GLOBALID", "")
            if process.parent in pids or not number.isdigit():
                continue  # a child of a rank, or gone already
            known = self.ranks.get(int(number))
            if known is not None and known.process.pid == process.pid:
                continue
            if known is not None and not self.running():
                self.ranks.clear()
                self.siblings_killed = False
                self.say("the ranks are started again and go on from the newest checkpoint")
            written = _modified(self.paths[int(number)].result_pickle)
            stale = written if written < processes.started_ns(process) else 0
            self.ranks[int(number)] = Rank(int(number), process, stale)

    def note_ends(self) -> None:
        """Note which ranks ended since the last look; of several the likely cause of the others' ends first.

        That is one which a signal ended, or else the one that fell silent first.
        """
        now = time.monotonic()
        seen = self._ended()
        if not seen:
            return
        # Looked at again: an end that was seen may come from that of another rank, a moment before.
        ended = {rank.rank: rank for rank in (*self._ended(), *seen)}
        for rank in sorted(ended.values(), key=lambda r: (not _by_signal(r), _modified(self.log(r.rank)))):
            del self.ranks[rank.rank]
            self.ranks[rank.rank] = replace(rank, ended=now)

    def _ended(self) -> list[Rank]:
        """Return the ranks not yet noted whose process has ended, with the exit status where it can be seen."""
        found = []
        for rank in self.running():
            seen = processes.look(rank.process.pid)
            if seen is None or seen.start != rank.process.start:
                found.append(rank)
            elif not seen.running:
                found.append(replace(rank, exit_status=seen.exit_status))
        return found

    def outcome(self, rank: Rank) -> Outcome | None:
        """Return what a rank returned, or None where it ended otherwise (or has not ended)."""
        path = self.paths[rank.rank].result_pickle
        if _modified(path) == rank.stale_result:
            return None
        kind, value = pickle_load(path)
        return value if kind == "success" else None

    def first_failure(self) -> Rank | None:
        """Return the rank that ended first of those that neither finished nor stopped on request."""
        for rank in self.ranks.values():
            if rank.ended is not None:
                outcome = self.outcome(rank)
                if outcome is None or outcome.status not in (FINISHED, PREEMPTED, INTERRUPTED):
                    return rank
        return None

    def end_siblings(self) -> None:
        failed = self.first_failure()
        if failed is None or failed.ended is None or self.siblings_killed:
            return
        if self.running() and time.monotonic() - failed.ended > SIBLING_SECONDS:
            others = ", ".join(str(rank.rank) for rank in self.running())
            self.say(
                f"rank {failed.rank} {processes.manner_of_end(failed.exit_status)}; ending the others too: {others}"
            )
            self.siblings_killed = True
            self.kill_ranks()

    def obey_signals(self) -> None:
        if not self.received:
            return
        now = time.monotonic()
        if self.stop_asked is None:
            self.stop_asked = now
            if self.running():
                self.say(f"{self.received[0].name}: the ranks save and end; once more ends them at once")
        if now >= self.remind_at:  # a rank that was still starting has not heard the first
            self.remind_at = now + 5.0
            processes.send((rank.process for rank in self.running()), signal.SIGTERM)
        if len(self.received) > 1 or now - self.stop_asked > SAVE_SECONDS or not self.ranks:
            self.sweep()

    def kill_ranks(self) -> None:
        """Kill every process of the run but the controller, which then ends by itself."""
        controller = self.controller_pids()
        processes.send((p for p in processes.marked(self.mark) if p.pid not in controller), signal.SIGKILL)

    def controller_pids(self) -> set[int]:
        """Return the pids of submitit's controller and of the shell around it, if there is one."""
        return {rank.process.parent for rank in self.ranks.values()} | {int(self.job.job_id)}

    def sweep(self) -> None:
        """Kill whatever is left of the run; after a run that ended by itself its helpers get a moment to end."""
        controller = self.job._process
        patience = 3.0 if controller is not None and controller.poll() is not None else 0.0
        deadline = time.monotonic() + patience
        while (left := processes.marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        while left:
            processes.send(left, signal.SIGKILL)
            if controller is not None:
                controller.poll()
            time.sleep(0.02)
            left = processes.marked(self.mark)

    def conclude(self, controller_status: int | None) -> Outcome:
        outcomes = {number: self.outcome(rank) for number, rank in self.ranks.items()}
        ended = {None if outcome is None else outcome.status for outcome in outcomes.values()}
        if self.received and (len(outcomes) < self.tasks or ended != {FINISHED}):
            saved = len(outcomes) == self.tasks and ended <= {PREEMPTED, INTERRUPTED}
            words = "stopped, and everything is saved" if saved else "stopped"
            status = PREEMPTED if saved else FAILED
            return Outcome(
                INTERRUPTED if self.received[0] == signal.SIGINT else status,
                f"{words}: the same command goes on from the newest checkpoint",
            )
        if self.controller_lost:
            return Outcome(
                FAILED,
                f"submitit's controller (process {self.job.job_id}) ended before its ranks; they are ended too",
            )
        failed = self.first_failure()
        if failed is not None:
            returned = outcomes[failed.rank]
            message = "\n".join(o.message for o in outcomes.values() if o is not None and o.message)
            if returned is not None and message:
                return Outcome(returned.status, message)
            return Outcome(FAILED, self.failure_text(failed))
        if len(outcomes) < self.tasks:
            missing = next(number for number in range(self.tasks) if number not in outcomes)
            how = f"never started (the controller ended with {controller_status}), or ended at once"
            return Outcome(FAILED, f"rank {missing} {how}; its log: {self.log(missing)}")
        status = max(o.status for o in outcomes.values() if o is not None)
        words = "a signal stopped the run; the same command goes on from the newest checkpoint"
        return Outcome(status, words if status == PREEMPTED else "")

    def failure_text(self, failed: Rank) -> str:
        path = self.log(failed.rank)
        lines = [line for line in _lines(path) if not line.startswith(QUIET)][-LAST_LINES:]
        head = f"rank {failed.rank} (process {failed.process.pid}) {processes.manner_of_end(failed.exit_status)}; all ranks have ended"
        return "\n".join([head, f"the last lines of its log, {path}:", *(f"  {line}" for line in lines)])

    def log(self, rank: int) -> Path:
        return self.paths[rank].stdout

    def show_log(self, *, to_end: bool = False) -> None:
        """Pass on the lines that rank 0 has logged since the last call, without submitit's own."""
        try:
            with open(self.log(0), "rb") as stream:
                stream.seek(self.read_bytes)
                data = stream.read()
        except OSError:
            return
        if not to_end:
            data = data[: data.rfind(b"\n") + 1]
        self.read_bytes += len(data)
        for line in data.decode(errors="replace").splitlines():
            if not line.startswith(QUIET):
                self.say(line)

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT, SIGTERM and SIGHUP in the list that is given, instead of being ended by them."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous: list[Callable[[int, FrameType | None], Any] | int | None] = [
        signal.signal(n, note) for n in numbers
    ]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _by_signal(rank: Rank) -> bool:
    return rank.exit_status is not None and os.WIFSIGNALED(rank.exit_status)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
