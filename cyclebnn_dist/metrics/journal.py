"""The journal: metrics.jsonl, one JSON object a line, the record of truth of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cyclebnn_dist.run_folder import JOURNAL


class Journal:
    """Appends rows to ``run_dir/metrics.jsonl``; every row carries the ``life`` (start count) that wrote it."""

    def __init__(self, run_dir: Path, *, life: int) -> None:
        self._life = life
        path = run_dir / JOURNAL
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = path.open("a", buffering=1)
        if torn:
            self._file.write("\n")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null. The system has it when this returns."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps({"life": self._life, **finite}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


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
