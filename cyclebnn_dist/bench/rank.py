"""One local rank of ``bench comm``: ``python -m cyclebnn_dist.bench.rank RESULT``, started by ``local_ranks``.

Settings come as one line of JSON on standard input. Its end means that the process that started this one is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from cyclebnn_dist.bench.comm_rounds import Settings, measure_launch
from cyclebnn_dist.world import discover_world, join_world, leave_world

TIMEOUT_SECONDS = 600.0


def main() -> None:
    """Measure one launch; rank 0 writes what came of it."""
    settings = Settings(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    world = join_world(discover_world(), timeout_seconds=TIMEOUT_SECONDS)
    measured = measure_launch(world, settings)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(measured))
    leave_world()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
