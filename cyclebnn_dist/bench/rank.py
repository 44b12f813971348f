"""One local rank of a benchmark: ``python -m cyclebnn_dist.bench.rank BENCHMARK RESULT``, started by ``local_ranks``.

Settings come as one line of JSON on standard input. Its end means that the process that started this one is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cyclebnn_dist.world import World, discover_world, join_world, leave_world

TIMEOUT_SECONDS = 600.0


def main() -> None:
    """Measure one launch; rank 0 writes what came of it."""
    benchmark, result = sys.argv[1:]
    measure = read_settings(benchmark, sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    world = join_world(discover_world(), timeout_seconds=TIMEOUT_SECONDS)
    measured = measure(world)
    if world.is_main:
        Path(result).write_text(json.dumps(measured))
    leave_world()


def read_settings(benchmark: str, line: str) -> Callable[[World], dict[str, Any]]:
    """What a rank is to do, by the name of its benchmark and the settings of it as JSON."""
    values = json.loads(line)
    if benchmark == "convergence":
        from cyclebnn_dist.bench import convergence_rounds

        runs = convergence_rounds.Settings(**values)
        return lambda world: convergence_rounds.measure_runs(world, runs)
    if benchmark == "mixbin":
        from cyclebnn_dist.bench import mixbin_runs

        networks = mixbin_runs.Settings(**values)
        return lambda world: mixbin_runs.measure_choices(world, networks)
    if benchmark == "engines":
        from cyclebnn_dist.bench import engine_rounds

        of_engines = engine_rounds.Settings(**values)
        return lambda world: engine_rounds.measure_engines(world, of_engines)
    from cyclebnn_dist.bench import comm_rounds

    assert benchmark == comm_rounds.Settings.benchmark, benchmark
    launch = comm_rounds.Settings(**values)
    return lambda world: comm_rounds.measure_launch(world, launch)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
