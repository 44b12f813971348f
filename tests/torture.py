"""The torture of a run: 2 ranks, killed and signalled at random moments, also while they write checkpoints.

    make torture ROUNDS=100

A run that was struck again and again must end with every tensor, metric and count of one that was left in peace.
Every round starts the run as a user does, or finds it requeued, and strikes it once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from launching import TINY_RECIPE, Launched, alive, wait_until
from safetensors.torch import load_file

from cyclebnn_dist.checkpoint import complete_checkpoints, damaged_parts
from cyclebnn_dist.data.sample import generate_sample
from cyclebnn_dist.metrics import read_journal

RANKS = 2
SAVE_EVERY = 5
STEPS_PER_EPOCH = 5
LENGTH = ("run.save_every=5", "eval.every_epochs=7")
LIFE_SECONDS = 180.0
"""A life that is struck ends, or begins anew, well within this."""


@dataclass(frozen=True)
class Blow:
    """What is done to a run in one round."""

    signal: signal.Signals
    victims: tuple[int, ...]
    moment: str
    """``any`` time of a life, start-up included; the first moments of a checkpoint's ``writing``; during a ``step``."""

    def __str__(self) -> str:
        return f"{self.signal.name} to {'all' if len(self.victims) == RANKS else 'one'}, {self.moment}"


@dataclass
class Report:
    """What a tortured run lived through."""

    blows: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    """Of every life that was killed: steps with a row in the metrics that the newest checkpoint does not hold."""
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{sum(self.blows.values())} blows in {self.seconds:.0f} s:"]
        lines += [f"  {count:4}  {blow}" for blow, count in sorted(self.blows.items())]
        return "\n".join([*lines, f"  most steps done again after a blow: {max(self.lost_steps, default=0)}"])


def draw_blow(chance: random.Random) -> Blow:
    """SIGKILL half of the time; USR2 is the scheduler's warning, TERM its last one."""
    sent = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])
    victims = chance.choice([(0,), (1,), (0, 1)])
    return Blow(sent, victims, chance.choice(["any", "writing", "writing", "step"]))


def torture(
    folder: Path,
    *,
    data: Path,
    rounds: int,
    seed: int,
    epochs: float,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Strike a run ``rounds`` times (fewer if it ends before), let it end, and compare it with ``folder/undisturbed``.

    Raises:
        AssertionError: it hung, left a process, went back behind a checkpoint, or did not end in the same state.
    """
    begun, chance, report = time.monotonic(), random.Random(seed), Report()
    run_dir = folder / f"tortured_{seed}"
    run: Launched | None = None
    newest = 0
    try:
        for _ in range(rounds):
            if run is None or run.ended:
                run = start(folder, run_dir.name, data=data, epochs=epochs)
            blow = draw_blow(chance)
            pids = strike(run, blow, chance)
            if not pids:
                break  # it has come to its end
            report.blows[str(blow)] += 1
            outlive(run, blow, pids)
            step = newest_step(run_dir)
            assert step >= newest, f"the checkpoint of step {newest} is gone after {blow}"
            report.lost_steps.append(max(last_row(run_dir) - step, 0))
            newest = step
            tell(f"blow {len(report.lost_steps)}: {blow}; the newest checkpoint is of step {step}")
        if run is None or run.ended:
            run = start(folder, run_dir.name, data=data, epochs=epochs)
        status, output = run.wait(seconds=3600)
        assert status == 0, output
    finally:
        if run is not None and not run.ended:
            run.end()
    compare(folder / "undisturbed", run_dir)
    report.seconds = time.monotonic() - begun
    return report


def start(folder: Path, name: str, *, data: Path, epochs: float) -> Launched:
    """Start or resume a run."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(TINY_RECIPE.format(run_dir=folder / name, data=data))
    return Launched(recipe, folder / name, ranks=RANKS, overrides=(*LENGTH, f"train.epochs={epochs}"))


def strike(run: Launched, blow: Blow, chance: random.Random) -> set[int]:
    """Wait for the moment and send the signal; returns the ranks' process ids, none if the run ended before."""
    if not wait_until(lambda: run.ended or len(run.rank_pids()) == RANKS, seconds=LIFE_SECONDS) or run.ended:
        return set()
    checkpoints = run.run_dir / "checkpoints"
    if blow.moment == "any":
        time.sleep(chance.uniform(0.0, 12.0))
    elif blow.moment == "writing":
        end = time.monotonic() + LIFE_SECONDS
        leftovers = set(checkpoints.glob(".partial_*"))  # of an earlier life
        while (
            not run.ended and time.monotonic() < end and not set(checkpoints.glob(".partial_*")) - leftovers
        ):
            time.sleep(0.0005)
        time.sleep(chance.choice([0.0, chance.uniform(0.0, 0.05)]))
    else:
        rows = last_row(run.run_dir)
        wait_until(lambda: run.ended or last_row(run.run_dir) > rows, seconds=LIFE_SECONDS)
        time.sleep(chance.uniform(0.0, 0.5))
    pids = run.rank_pids() if not run.ended else {}
    for rank in blow.victims:
        if rank in pids and psutil.pid_exists(pids[rank]):
            os.kill(pids[rank], blow.signal)
    return set(pids.values())


def outlive(run: Launched, blow: Blow, pids: set[int]) -> None:
    """Wait until the processes that were struck are gone; the run has ended then, or submitit has started it again."""
    assert wait_until(lambda: not alive(pids), seconds=LIFE_SECONDS), (
        f"{alive(pids)} live on after {blow}\n{logs(run.run_dir)}"
    )
    wait_until(lambda: run.ended or bool(set(run.rank_pids().values()) - pids), seconds=60)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must be as it was written; 0 if there is none yet."""
    found = complete_checkpoints(run_dir)
    if not found:
        return 0
    assert not damaged_parts(found[0])
    return int(found[0].name.removeprefix("step_"))


def last_row(run_dir: Path) -> int:
    """The last step with a row in the metrics."""
    return max((row["step"] for row in rows(run_dir, "train")), default=0)


def rows(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The rows of an event in metrics.jsonl, a last one that is not whole left out."""
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [row for row in read_journal(run_dir) if row["event"] == event]


def logs(run_dir: Path) -> str:
    """The ends of all logs of a run."""
    found = sorted((run_dir / "submitit").rglob("*_log.*"), key=lambda path: path.stat().st_mtime)
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in found[-4:])


def compare(undisturbed: Path, tortured: Path) -> None:
    """Assert that two runs ended alike: tensors, losses, evaluations, counts; and that nothing is left lying about."""
    folders = [max((run / "checkpoints").glob("step_*")) for run in (undisturbed, tortured)]
    assert folders[0].name == folders[1].name
    names = {path.name for path in folders[0].glob("*.safetensors")}
    assert names == {path.name for path in folders[1].glob("*.safetensors")}
    for name in names:
        expected, found = (load_file(folder / name) for folder in folders)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}: {key}"
    for event, measured in (("train", ("loss", "grad_norm", "lr")), ("eval", ("top1", "loss"))):
        of_runs = []
        for run in (undisturbed, tortured):
            by_step: dict[int, tuple[Any, ...]] = {}
            for row in rows(run, event):
                values = tuple(row[name] for name in measured)
                assert by_step.setdefault(row["step"], values) == values, (
                    f"step {row['step']} again, otherwise"
                )
            of_runs.append(by_step)
        assert of_runs[0] == of_runs[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (undisturbed, tortured)]
    for key in ("steps", "bits", "eval_top1", "eval_images"):
        assert summaries[0][key] == summaries[1][key], key
    left = [path for path in (tortured / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, f"left in the run folder: {left}"


def main() -> None:
    """Torture one run after another until there have been so many rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        generate_sample(data, num_train=80, num_val=30, image_size=40)
        epochs = 4.0 + 1.0 * min(arguments.rounds, 100)
        begun = time.monotonic()
        peace = start(Path(folder), "undisturbed", data=data, epochs=epochs)
        status, output = peace.wait(seconds=3600)
        assert status == 0, output
        print(
            f"the undisturbed run: {epochs * STEPS_PER_EPOCH:.0f} steps, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        done, seed = 0, arguments.seed
        while done < arguments.rounds:
            report = torture(
                Path(folder),
                data=data,
                rounds=arguments.rounds - done,
                seed=seed,
                epochs=epochs,
                tell=partial(print, flush=True),
            )
            print(f"seed {seed}: {report}\nthe final state is that of the undisturbed run", flush=True)
            done, seed = done + sum(report.blows.values()), seed + 1


if __name__ == "__main__":
    main()
