"""Grids: every combination of values is one run, in a folder that the same point finds again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import TINY_RECIPE, Launched

from cyclebnn_dist.config import Recipe, RecipeError, WandbConfig, save_recipe
from launch.grid import grid_points, point_name
from launch.job import REFUSED
from launch.record import read

ROOT = Path(__file__).parents[1]


def launched(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {dir: runs/sweep}\nmodel: {num_classes: 10}\n")
    return path


def test_the_points_are_the_product_of_the_values(recipe_file):
    _, points = grid_points(
        str(recipe_file), ["optim.weight_decay=0"], ["optim.lr=1e-3,3e-4", "precision.communication.low=2,4"]
    )
    settings = [(p.recipe.optim.lr, p.recipe.precision.communication.low) for p in points]
    assert settings == [(1e-3, 2), (1e-3, 4), (3e-4, 2), (3e-4, 4)]
    assert points[1].run_dir == recipe_file.parent / "runs/sweep/lr=0.001,low=4"
    assert {p.recipe.wandb.group for p in points} == {"sweep"}
    assert {p.recipe.optim.weight_decay for p in points} == {0.0}
    assert not (recipe_file.parent / "runs").exists()


def test_a_point_keeps_its_folder_however_it_is_written(recipe_file):
    def folders(*axes):
        return {p.run_dir for p in grid_points(str(recipe_file), [], axes)[1]}

    expected = folders("optim.lr=1e-3,3e-4", "precision.communication.low=2,4")
    assert folders("precision.communication.low=4,2", "optim.lr=0.0003,0.001") == expected


def test_keys_of_the_same_name_and_values_with_commas_stay_apart(recipe_file):
    axes = [
        "precision.forward.low=2,3",
        "precision.communication.low=4",
        "model.kwargs={a: 1, b: 2},{a: [3, 4]}",
    ]
    _, points = grid_points(str(recipe_file), [], axes)
    assert [p.recipe.model.kwargs for p in points[:2]] == [{"a": 1, "b": 2}, {"a": [3, 4]}]
    assert all("precision.communication.low=4,precision.forward.low=" in p.name for p in points)
    assert len({p.run_dir for p in points}) == 4


def test_the_recipes_own_group_is_kept(recipe_file):
    _, points = grid_points(str(recipe_file), ["wandb.group=mine"], ["run.seed=1,2"])
    assert {p.recipe.wandb.group for p in points} == {"mine"}


@given(st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=2, unique=True))
def test_any_values_give_folders_that_can_be_and_differ(texts):
    names = [point_name(Recipe(wandb=WandbConfig(group=text)), ["wandb.group"]) for text in texts]
    assert names[0] != names[1]
    assert all(re.fullmatch(r"group=[A-Za-z0-9.+=_-]{1,32}", name) for name in names)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--grid", "optim.lrr=1,2"], "did you mean optim.lr?"),
        (["--grid", "optim.lr=1e-3,fast"], "'fast' is not a number"),
        (["--grid", "optim.lr"], "not of the form key=value,value"),
        (["--grid", "optim.lr=1e-3,,2"], "not of the form key=value,value"),
        (["--grid", "optim.lr=1e-3,0.001"], "the point lr=0.001 is there already"),
        (["--grid", "optim.lr=1e-3", "optim.lr=2e-3"], "a key is there twice"),
        (["optim.lr=1e-4", "--grid", "optim.lr=1e-3,2e-3"], "optim.lr varies, and is also set"),
        (["--grid", "run.dir=a,b"], "run.dir cannot vary"),
        (["--grid", f"run.seed={','.join(map(str, range(1001)))}"], "1001 points"),
        (["--grid", "train.global_batch_size=16,7", "--tasks-per-node", "2"], "cannot be cut into 2 ranks"),
        (["--grid", "run.seed=1,2", "--max-parallel", "2"], "this machine takes one after another"),
        (["--max-parallel", "2"], "there is no grid"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_made(recipe_file, arguments, part):
    done = launched(str(recipe_file), "--local", *arguments, cwd=recipe_file.parent)
    assert done.returncode == REFUSED, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(recipe_file.parent) == [recipe_file.name]


def test_a_grid_does_not_go_into_the_folder_of_a_run(recipe_file):
    (recipe_file.parent / "runs/sweep").mkdir(parents=True)
    save_recipe(Recipe(), recipe_file.parent / "runs/sweep/recipe.yaml")
    with pytest.raises(RecipeError, match="is the folder of a run"):
        grid_points(str(recipe_file), [], ["run.seed=1,2"])


SBATCH = """#!/bin/sh
cat "$1" > "$SUBMITTED"
[ -z "$REFUSE" ] || { echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; }
echo "Submitted batch job 41"
"""


@pytest.fixture
def slurm(tmp_path):
    """sbatch and srun as far as a submission sees them; nothing is run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    profile = tmp_path / "cluster.yaml"
    profile.write_text("cluster: slurm\npartition: gpu\n")
    return profile, {"PATH": f"{folder}:{os.environ['PATH']}", "SUBMITTED": str(tmp_path / "batch")}


GRID = ("--grid", "run.seed=1,2,3", "--max-parallel", "2")


def test_a_dry_run_lists_the_points_and_shows_what_is_then_submitted(recipe_file, slurm):
    profile, variables = slurm
    arguments = (str(recipe_file), "--cluster", str(profile), *GRID, "model.name=no_such_model")
    before = sorted(os.listdir(recipe_file.parent))
    shown = launched(*arguments, "--dry-run", cwd=recipe_file.parent, **variables)
    assert sorted(os.listdir(recipe_file.parent)) == before
    for seed in (1, 2, 3):
        assert f"{recipe_file.parent}/runs/sweep/seed={seed}\n" in shown.stdout
    done = launched(*arguments, cwd=recipe_file.parent, **variables)
    assert done.returncode == 0, done.stderr
    batch = Path(variables["SUBMITTED"]).read_text()
    assert "#SBATCH --array=0-2%2\n" in batch
    assert batch in shown.stdout, "the dry run shows the very text"
    code = recipe_file.parent / "runs/sweep/submitit/code"
    assert f"{code}/{next(code.iterdir()).name}" in batch
    for index, seed in enumerate((1, 2, 3)):
        (submission,) = read(recipe_file.parent / f"runs/sweep/seed={seed}")
        assert submission.job == f"41_{index}"
        assert submission.log(0) == recipe_file.parent / f"runs/sweep/submitit/41_{index}_0_log.out"
        assert "--max-parallel 2" in submission.command


def test_a_refused_array_leaves_nothing(recipe_file, slurm):
    profile, variables = slurm
    arguments = (str(recipe_file), "--cluster", str(profile), *GRID)
    done = launched(*arguments, cwd=recipe_file.parent, REFUSE="1", **variables)
    assert done.returncode == REFUSED
    assert "invalid partition" in done.stderr
    assert not (recipe_file.parent / "runs").exists()


def test_without_a_snapshot_the_batch_file_names_none(recipe_file, slurm):
    profile, variables = slurm
    arguments = (str(recipe_file), "--cluster", str(profile), "--no-snapshot")
    done = launched(*arguments, cwd=recipe_file.parent, **variables)
    assert done.returncode == 0, done.stderr
    assert "CYCLEBNN_CODE" not in Path(variables["SUBMITTED"]).read_text()
    assert not (recipe_file.parent / "runs/sweep/submitit/code").exists()


SQUEUE = """#!/bin/sh
echo "$QUEUE"
"""


@pytest.fixture
def queued(slurm):
    """The same with a queue, told by QUEUE."""
    profile, variables = slurm
    squeue = profile.parent / "bin/squeue"
    squeue.write_text(SQUEUE)
    squeue.chmod(0o755)
    return profile, variables


def test_a_run_with_a_job_in_the_queue_is_refused_unless_the_new_one_waits(recipe_file, queued):
    """Two jobs on one run folder: the second would fail at the lock when its turn comes."""
    profile, variables = queued
    arguments = (str(recipe_file), "--cluster", str(profile), "--no-snapshot")
    assert launched(*arguments, cwd=recipe_file.parent, **variables).returncode == 0
    run_dir, batch = recipe_file.parent / "runs/sweep", Path(variables["SUBMITTED"])
    live = {**variables, "QUEUE": "41|PENDING|Priority|0:00|"}
    batch.unlink()
    done = launched(*arguments, cwd=recipe_file.parent, **live)
    assert done.returncode == REFUSED
    assert f"{run_dir} has job 41 in the queue" in done.stderr
    assert not batch.exists()
    assert len(read(run_dir)) == 1

    done = launched(*arguments, "--again", cwd=recipe_file.parent, **live)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --dependency=afterany:41\n" in batch.read_text()

    ended = {**variables, "QUEUE": "41|FAILED|None|0:10|node1"}
    assert launched(*arguments, "--again", cwd=recipe_file.parent, **ended).returncode == 0
    assert "dependency" not in batch.read_text()

    profile.write_text(profile.read_text() + "additional_parameters: {dependency: singleton}\n")
    done = launched(*arguments, "--again", cwd=recipe_file.parent, **live)
    assert done.returncode == REFUSED
    assert "additional_parameters.dependency" in done.stderr


def test_points_of_a_grid_that_are_in_the_queue_are_left_out(recipe_file, queued):
    profile, variables = queued
    arguments = (str(recipe_file), "--cluster", str(profile), "--no-snapshot", *GRID)
    assert launched(*arguments, cwd=recipe_file.parent, **variables).returncode == 0
    batch, sweep = Path(variables["SUBMITTED"]), recipe_file.parent / "runs/sweep"
    queue = ["41_0|RUNNING|None|0:10|node1", "41_1|FAILED|None|0:10|node1", "41_2|COMPLETED|None|0:10|node1"]
    done = launched(*arguments, cwd=recipe_file.parent, **variables, QUEUE="\n".join(queue))
    assert done.returncode == 0, done.stderr
    assert f"left out, job 41_0 is in the queue\n  run folder  {sweep}/seed=1\n" in done.stdout
    assert "#SBATCH --array=0-1%2\n" in batch.read_text()
    assert [len(read(sweep / f"seed={seed}")) for seed in (1, 2, 3)] == [1, 2, 2]


@pytest.fixture
def tiny(tmp_path, tiny_data):
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "sweep", data=tiny_data))
    return path


def test_a_cancelled_local_grid_saves_and_starts_no_further_point(tiny):
    sweep = tiny.parent / "sweep"
    overrides = ("train.epochs=1000", "--grid", "run.seed=1,2")
    started = Launched(tiny, sweep / "seed=1", ranks=1, overrides=overrides)
    try:
        started.wait_for_step(1, seconds=120)
        assert "job at work" not in launched("status", str(sweep), cwd=tiny.parent).stdout
        cancelled = launched("cancel", str(sweep), cwd=tiny.parent)
        assert cancelled.stdout.startswith("cancelled local run"), cancelled.stderr
        status, output = started.wait(seconds=60)
    finally:
        if not started.ended:
            started.end()
    assert status == 75, output
    assert not (sweep / "seed=2").exists()
    shown = launched("status", str(sweep), cwd=tiny.parent).stdout
    assert "not finished, and no job at work" in shown
    assert "newest checkpoint: step " in shown


def test_a_local_grid_runs_its_points_one_after_another(tiny):
    sweep = tiny.parent / "sweep"
    arguments = (str(tiny), "--local", "--tasks-per-node", "1", "train.epochs=0.4", "--grid", "run.seed=1,2")
    done = launched(*arguments, cwd=tiny.parent)
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        assert json.loads((sweep / f"seed={seed}/summary.json").read_text())["finished"]
    assert launched("status", str(sweep), cwd=tiny.parent).stdout.count("\n  finished\n") == 2
    assert "starting: resnet18" in launched("logs", str(sweep / "seed=2"), cwd=tiny.parent).stdout
    assert launched(*arguments, cwd=tiny.parent).stdout.count("finished already") == 2
