"""The command ``python -m launch``: start a recipe, or a grid of it, on this machine or submit it to a cluster."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclebnn_dist.batching import per_rank_batch
from cyclebnn_dist.config import Recipe, RecipeError, load_recipe, render_reference, to_dict
from cyclebnn_dist.guards.exit_status import FAILED, REFUSED
from cyclebnn_dist.run_folder import LAUNCHER_FOLDER, check_run_folder, finished_summary
from launch import manage, record
from launch.grid import Point, grid_points
from launch.profile import ClusterProfile, load_profile, num_tasks_per_node

EXAMPLES = """\
examples:
  python -m launch recipes/quickstart.yaml --local --tasks-per-node 2
  python -m launch recipes/quickstart.yaml --local optim.lr=0.002 run.dir=runs/lr2
  python -m launch recipes/quickstart.yaml --cluster slurm/gpu.yaml --nodes 4
  python -m launch recipes/quickstart.yaml --cluster slurm/gpu.yaml --dry-run
  python -m launch recipes/quickstart.yaml --cluster slurm/gpu.yaml --grid optim.lr=1e-3,3e-4 train.epochs=1,2
  python -m launch status runs/quickstart          (also: logs, cancel; python -m launch status --help)

The same command in the same run folder goes on from the newest checkpoint.

exit status: 0 finished, submitted or shown; 1 failed; 2 refused (recipe, profile, data); 75 stopped by a signal, with
everything saved; 130 stopped by Ctrl-C (the first saves, the second ends at once).
"""

HOW = "say where to run: --local (this machine), --cluster FILE (a profile such as slurm/gpu.yaml) or --debug"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start a recipe on this machine, or submit it to a cluster, through submitit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; `cyclebnn config` lists every key")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="recipe keys to change, e.g. optim.lr=0.002"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cluster", metavar="FILE", help="submit under this cluster profile")
    where.add_argument(
        "--local", action="store_true", help="run here and wait: one process per GPU, or --tasks-per-node"
    )
    where.add_argument(
        "--debug", action="store_true", help="run one rank in this process; an error opens pdb"
    )
    parser.add_argument("--nodes", metavar="N", help="instead of the profile's nodes")
    parser.add_argument(
        "--tasks-per-node", metavar="N", help="instead of the profile's tasks_per_node (ranks a node)"
    )
    parser.add_argument(
        "--grid",
        metavar="key=v1,v2",
        nargs="+",
        action="extend",
        help="one run for every combination of these values, in folders of its own: on Slurm an array, here one by one",
    )
    parser.add_argument(
        "--max-parallel", metavar="N", type=int, help="how many runs of a grid Slurm may start at a time"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="submit also what has a job in the queue; the new one starts when that has ended",
    )
    parser.add_argument(
        "--no-snapshot",
        action="store_true",
        help="let a queued job import the code as it is when it starts, not as it is now",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show sbatch text and layer table; submit and write nothing"
    )
    parser.add_argument(
        "--profile-reference", action=_ProfileReference, help="explain every key of a profile and exit"
    )
    return parser


class _ProfileReference(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(render_reference(settings=ClusterProfile), end="")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] and words[0] in manage.COMMANDS:
            return manage.main(words)
        arguments = build_parser().parse_intermixed_args(words)
        if not (arguments.cluster or arguments.local or arguments.debug):
            raise RecipeError("python -m launch", HOW, "see python -m launch --help")
        return _launch(arguments)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _launch(arguments: argparse.Namespace) -> int:
    flags = {"nodes": arguments.nodes, "tasks_per_node": arguments.tasks_per_node}
    if not arguments.cluster:
        flags["cluster"] = "local" if arguments.local else "debug"
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    profile = load_profile(
        arguments.cluster, overrides=[f"{key}={value}" for key, value in flags.items() if value is not None]
    )
    if arguments.grid:
        return _launch_grid(arguments, profile)
    if arguments.max_parallel is not None:
        raise RecipeError("--max-parallel", "there is no grid", "it goes with --grid key=value,value")
    run_dir = Path(recipe.run.dir).absolute()
    _check(recipe, profile, run_dir)
    if arguments.dry_run:
        return _show(arguments, profile, run_dir / LAUNCHER_FOLDER)
    if _is_finished(recipe, run_dir):
        return 0
    if profile.cluster == "slurm":
        return _submit(arguments, profile, run_dir, {run_dir: recipe})
    if profile.cluster == "local":
        return _run_here(recipe, profile, run_dir)
    return _debug(recipe, run_dir)


def _launch_grid(arguments: argparse.Namespace, profile: ClusterProfile) -> int:
    base, points = grid_points(arguments.recipe, arguments.overrides, arguments.grid)
    folder = Path(base.run.dir).absolute()
    if profile.cluster == "debug":
        raise RecipeError("--grid", "many runs do not fit into one process", "use --local or --cluster")
    if arguments.max_parallel is not None and (profile.cluster == "local" or arguments.max_parallel < 1):
        problem = "this machine takes one after another" if profile.cluster == "local" else "is less than 1"
        raise RecipeError("--max-parallel", problem, "leave it out, or give --cluster and at least 1")
    for point in points:
        _check(point.recipe, profile, point.run_dir)
    if arguments.dry_run:
        print(f"{len(points)} points:")
        for point in points:
            print(f"  {point.run_dir}\n    {' '.join(point.overrides)}")
        print()
        return _show(arguments, profile, folder / LAUNCHER_FOLDER, points=points)
    left = [point for point in points if not _is_finished(point.recipe, point.run_dir)]
    if not left:
        return 0
    if profile.cluster == "slurm":
        return _submit(arguments, profile, folder, {point.run_dir: point.recipe for point in left})
    for number, point in enumerate(left):
        print(f"point {number + 1} of {len(left)}: {point.name}", flush=True)
        status = _run_here(point.recipe, profile, point.run_dir)
        if status:
            return status
    return 0


def _check(recipe: Recipe, profile: ClusterProfile, run_dir: Path) -> None:
    per_rank_batch(recipe.train, world_size=count_ranks(profile))
    check_run_folder(run_dir, recipe)


def _is_finished(recipe: Recipe, run_dir: Path) -> bool:
    done = finished_summary(run_dir, recipe)
    if done is not None:
        print(f"this run is finished already: {run_dir}\n{done.rstrip()}")
    return done is not None


def _show(
    arguments: argparse.Namespace, profile: ClusterProfile, folder: Path, *, points: Sequence[Point] = ()
) -> int:
    from launch.preview import layer_table, submission_text
    from launch.snapshot import snapshot_path

    code = None if arguments.no_snapshot else snapshot_path(folder)
    count, parallel = max(1, len(points)), arguments.max_parallel or max(1, len(points))
    print(submission_text(profile, folder=folder, code=code, count=count, max_parallel=parallel))
    overrides = [*arguments.overrides, *(points[0].overrides if points else ())]
    status, table = layer_table(arguments.recipe, overrides)
    if points:
        print(f"the first point, {points[0].name}:")
    print(table, end="")
    return status


def count_ranks(profile: ClusterProfile) -> int:
    """How many ranks a launch under this profile starts."""
    if profile.cluster == "debug":
        return 1
    from launch.submit import choose_gpus

    gpus = len(choose_gpus(profile)) if profile.cluster == "local" else 0
    return profile.nodes * num_tasks_per_node(profile, visible_gpus=gpus)


def _submit(
    arguments: argparse.Namespace, profile: ClusterProfile, folder: Path, runs: Mapping[Path, Recipe]
) -> int:
    """Submit one run, or those of a grid whose folder is given; several become one array."""
    from launch.job import Job
    from launch.submit import after, submit_slurm

    queued = manage.jobs_in_queue(runs)
    if arguments.again:
        profile = after(profile, [job for of_run in queued.values() for job in of_run])
    elif queued and not arguments.grid:
        manage.refuse(folder, queued[folder])
    else:
        runs = {run_dir: recipe for run_dir, recipe in runs.items() if run_dir not in queued}
        for run_dir, of_run in queued.items():
            print(f"left out, job {', '.join(of_run)} is in the queue\n  run folder  {run_dir}")
    if not runs:
        return 0
    logs = folder / LAUNCHER_FOLDER
    existed = _existing(logs)
    try:
        jobs, code = submit_slurm(
            [Job(to_dict(recipe), str(run_dir)) for run_dir, recipe in runs.items()],
            profile=profile,
            folder=logs,
            with_code=not arguments.no_snapshot,
            max_parallel=arguments.max_parallel or len(runs),
        )
    except RecipeError:
        _forget(logs, existed)
        raise
    for job, run_dir in zip(jobs, runs, strict=True):
        submission = record.Submission(
            job.job_id, "slurm", count_ranks(profile), str(logs), code=str(code or "")
        )
        record.add(run_dir, submission)
        print(f"submitted job {job.job_id}\n  run folder  {run_dir}\n  log         {submission.log(0)}")
    print(f"  code        {code or 'as it is when the job starts'}")
    all_runs, first = shlex.quote(str(folder)), shlex.quote(str(next(iter(runs))))
    print(f"  follow      python -m launch logs {first} --follow")
    print(f"  state       python -m launch status {all_runs}")
    print(f"  cancel      python -m launch cancel {all_runs}")
    return 0


def _run_here(recipe: Recipe, profile: ClusterProfile, run_dir: Path) -> int:
    from launch.job import Job
    from launch.submit import choose_gpus, start_local
    from launch.watch import watch

    gpus = choose_gpus(profile)
    tasks = num_tasks_per_node(profile, visible_gpus=len(gpus))
    folder, existed = run_dir / LAUNCHER_FOLDER, _existing(run_dir / LAUNCHER_FOLDER)
    devices = (
        ",".join(gpus)
        if gpus or profile.gpus_per_node is not None
        else os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    mark = uuid.uuid4().hex
    job = start_local(
        Job(to_dict(recipe), str(run_dir), devices), profile=profile, folder=folder, mark=mark, tasks=tasks
    )
    record.add(run_dir, record.local_submission(str(job.job_id), ranks=tasks, logs=folder))
    print(f"{tasks} rank{'s' if tasks > 1 else ''} on this machine, run folder {run_dir}")
    print(f"logs: {folder}/{job.job_id}_<rank>_log.out", flush=True)
    outcome = watch(job, mark=mark, tasks=tasks)
    if outcome.status == REFUSED:
        _forget(folder, existed)
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    return outcome.status


def _debug(recipe: Recipe, run_dir: Path) -> int:
    import submitit

    from launch.job import Job
    from launch.submit import environ, stale_ranks

    existed = _existing(run_dir / LAUNCHER_FOLDER)
    with environ(stale_ranks()):
        outcome = (
            submitit.AutoExecutor(run_dir / LAUNCHER_FOLDER, cluster="debug")
            .submit(Job(to_dict(recipe), str(run_dir)))
            .result()
        )
    if outcome.status == REFUSED:
        _forget(run_dir / LAUNCHER_FOLDER, existed)
        print(outcome.message, file=sys.stderr)
    return outcome.status


def _existing(folder: Path) -> set[Path]:
    """Return which of a folder, its content and its parents exist."""
    return {path for path in (folder, *folder.parents, *folder.glob("*")) if path.exists()}


def _forget(folder: Path, existed: set[Path]) -> None:
    """Remove the job files of a refused run, and the folders made for them where nothing else came into them."""
    for path in set(folder.glob("*")) - existed:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder, *folder.parents):
        if path in existed or not path.is_dir() or any(path.iterdir()):
            return
        path.rmdir()


if __name__ == "__main__":
    sys.exit(main())
