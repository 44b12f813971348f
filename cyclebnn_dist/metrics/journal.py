"""The journal: metrics.jsonl, one JSON object a line, the record of truth of a run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from cyclebnn_dist import disk
from cyclebnn_dist.run_folder import JOURNAL

log = logging.getLogger(__name__)

MAX_WAITING_ROWS = 10_000


class Journal:
    """Appends rows to ``run_dir/metrics.jsonl``; every row carries the ``life`` (start count) that wrote it.

    Rows that the disk does not take wait in memory, the newest ``MAX_WAITING_ROWS`` of them, until it does.
    """

    def __init__(self, run_dir: Path, *, life: int) -> None:
        self._life = life
        self._path = run_dir / JOURNAL
        self._file = self._path.open("a+b", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._warned = False
        self._lost = 0
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._append(b"\n")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null. The system has it when this returns, or it waits."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(json.dumps({"life": self._life, **finite}, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; rows that wait still are lost, and counted in a warning."""
        self._append(b"")
        if self._waiting:
            log.warning("%d rows of %s could not be written", len(self._waiting) + self._lost, self._path)
        try:
            self._file.close()
        except OSError as error:
            log.warning("%s: %s", self._path, disk.cause(error))

    def _append(self, line: bytes) -> None:
        if line:
            self._waiting.append(line)
        try:
            while self._waiting:
                written = self._file.write(self._waiting[0])
                # A disk may take the beginning of a line only; the rest then stays the first to be written.
                self._waiting[0] = self._waiting[0][written:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except OSError as error:
            self._keep(error)
            return
        if self._warned:
            self._warned = False
            log.warning(
                "%s can be written again%s", self._path, f"; {self._lost} rows are lost" * (self._lost > 0)
            )
            self._lost = 0

    def _keep(self, error: OSError) -> None:
        if len(self._waiting) > MAX_WAITING_ROWS:
            # Not the first: its beginning may be in the file.
            del self._waiting[1]
            self._lost += 1
        if not self._warned:
            self._warned = True
            log.error(
                "%s: %s; its rows wait in memory. What to do: %s",
                self._path,
                disk.cause(error),
                disk.cure(error.errno),
            )


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """Rows in order of step, without those that a later life wrote again and without torn lines."""
    path = run_dir / JOURNAL
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("event") == "start":
            rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
        rows.append(row)
    return rows
