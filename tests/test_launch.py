"""Launching: what is submitted is what was asked for, and a local run never outlives one of its ranks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

import launch.job
import launch.watch
from cyclebnn_dist.config import Recipe, RecipeError, load_recipe, save_recipe
from cyclebnn_dist.config.schema import leaves
from launch import processes
from launch.job import FAILED, FINISHED, MARK, PREEMPTED, REFUSED, Job, Outcome, prepare_rank
from launch.preview import submission_text
from launch.profile import ClusterProfile, ContainerConfig, load_profile, num_tasks_per_node
from launch.queue import JobState
from launch.submit import environ, sbatch_text, start_local
from launch.watch import watch

ROOT = Path(__file__).parents[1]


def run_ranks(
    call: Callable[[], object], folder: Path, *, tasks: int = 2, setup: tuple[str, ...] = ()
) -> tuple[Outcome, str]:
    """Run a function as the ranks of a local run; return how it ended and what the terminal showed."""
    mark = os.urandom(8).hex()
    profile = ClusterProfile(cluster="local", setup=setup)
    job = start_local(call, profile=profile, folder=folder, mark=mark, tasks=tasks)
    out = io.StringIO()
    outcome = watch(job, mark=mark, tasks=tasks, out=out)
    assert processes.marked(f"{MARK}={mark}") == [], "processes were left behind"
    return outcome, out.getvalue()


def launched(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {dir: run}\nmodel: {num_classes: 10}\n")
    return path


# --- profiles and what they become ---------------------------------------------------------------------------------


def test_the_profiles_in_the_repository_load():
    gpu, local = load_profile(ROOT / "slurm/gpu.yaml"), load_profile(ROOT / "slurm/local.yaml")
    assert (gpu.cluster, num_tasks_per_node(gpu)) == ("slurm", 8)
    assert (local.cluster, num_tasks_per_node(local)) == ("local", 2)


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("partion: gpu", "partion", "did you mean partition?"),
        ("nodes: two", "nodes", "'two' is not an integer"),
        ("cluster: slum", "cluster", "did you mean slurm?"),
        ("nodes: 0", "nodes", "at least 1"),
        ("{cluster: local, nodes: 2}", "nodes", "one machine"),
        ("timeout_min: 1\nsignal_delay_s: 90", "signal_delay_s", "time limit"),
        ("timeout_min: 60\nsignal_delay_s: 721", "signal_delay_s", "below 10 minutes"),
        ("{cluster: local, container: {image: a.sif}}", "container.image", "within the container"),
        ("container: {image: a.sif, runtime: docker}", "container.runtime", "is not one of"),
        ("environment: {OMP_NUM_THREADS: 4}", "environment.OMP_NUM_THREADS", "quotes"),
        ("environment: {'A B': x}", "environment.A B", "environment variable"),
        ("additional_parameters: {exclusive: [1]}", "additional_parameters.exclusive", "sbatch option"),
    ],
)
def test_a_mistake_in_a_profile_is_answered_like_one_in_a_recipe(tmp_path, text, key, part):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_profile(path)
    assert caught.value.key == key
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_key_of_a_profile_is_explained():
    for leaf in leaves(ClusterProfile):
        assert leaf.doc, f"{leaf.key} has no docstring under it"
    shown = launched("--profile-reference", cwd=ROOT)
    assert shown.returncode == 0
    assert "  partition = null   (text or null)\n      Slurm partition." in shown.stdout


def test_the_batch_file_asks_for_exactly_what_the_profile_says(tmp_path):
    profile = ClusterProfile(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        mem_gb=0,
        timeout_min=90,
        partition="gpu",
        account="a",
        qos="q",
        constraint="a100|h100",
        exclude="n[1-2]",
        setup=("module load cuda",),
        srun_args=("--kill-on-bad-exit=1",),
        environment={"NCCL_DEBUG": "two words"},
        additional_parameters={"exclusive": True, "reservation": "mine"},
        python="singularity exec image.sif python",
    )
    text = sbatch_text(profile, folder=tmp_path / "myrun" / "submitit")
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert set(options) == {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=6",
        "mem=0M",
        "time=90",
        "partition=gpu",
        "account=a",
        "qos=q",
        "constraint='a100|h100'",
        "exclude='n[1-2]'",
        "exclusive",
        "reservation=mine",
        "requeue",
        "signal=USR2@120",
        "open-mode=append",
        "job-name=myrun",
        f"output={tmp_path}/myrun/submitit/%j_0_log.out",
    }
    assert "export NCCL_DEBUG='two words'\nmodule load cuda\n" in text
    (srun,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert "--cpus-per-task=6 --kill-on-bad-exit=1 singularity exec image.sif python -u -m submitit" in srun
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_container_sees_the_run_and_starts_its_own_python(tmp_path, monkeypatch, runtime):
    monkeypatch.chdir(tmp_path)
    container = ContainerConfig("image.sif", runtime, ("/data:/mnt/data",))
    folder = tmp_path / "run/submitit"
    text = sbatch_text(ClusterProfile(gpus_per_node=1, container=container), folder=folder)
    (srun,) = [line for line in text.splitlines() if line.startswith("srun")]
    if runtime == "apptainer":
        bind = f"{tmp_path},{tmp_path}/run,/data:/mnt/data"
        assert f" apptainer exec --nv --bind {bind} image.sif python3 -u -m submitit" in srun
    else:
        mounts = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/mnt/data"
        assert f"--container-image=image.sif --container-mounts={mounts} python3 -u -m submitit" in srun


def test_a_site_that_forbids_requeueing_is_obeyed(tmp_path):
    text = sbatch_text(ClusterProfile(requeue=False), folder=tmp_path)
    assert "#SBATCH --no-requeue" in text
    assert "#SBATCH --requeue" not in text


def test_a_local_preview_names_every_process(tmp_path):
    text = submission_text(ClusterProfile(cluster="local", tasks_per_node=3), folder=tmp_path)
    assert text.startswith("3 processes")
    assert "OMP_NUM_THREADS=" in text
    assert "rank 2: " in text


# --- the command ---------------------------------------------------------------------------------------------------


def test_without_saying_where_nothing_starts(recipe_file):
    done = launched(str(recipe_file), cwd=recipe_file.parent)
    assert done.returncode == REFUSED
    for part in ("--local", "--cluster", "--debug"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--local", "optim.lrr=3"], "did you mean optim.lr?"),
        (["--local", "train.global_batch_size=6", "--tasks-per-node", "4"], "cannot be cut into 4 ranks"),
        (["--local", "--tasks-per-node", "many"], "'many' is not an integer"),
        (["--local", "--nodes", "2"], "one machine"),
        (["--cluster", "nothing.yaml"], "no such file"),
        (["--cluster", str(ROOT / "slurm/gpu.yaml")], "no Slurm on this machine"),
    ],
)
def test_what_cannot_be_started_is_refused_and_leaves_nothing(recipe_file, arguments, part):
    done = launched(str(recipe_file), *arguments, cwd=recipe_file.parent, PATH="/nowhere")
    assert done.returncode == REFUSED, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(recipe_file.parent) == [recipe_file.name]


def test_a_dry_run_shows_the_batch_file_and_writes_nothing(recipe_file):
    profile = str(ROOT / "slurm/gpu.yaml")
    done = launched(
        str(recipe_file),
        "--cluster",
        profile,
        "--nodes",
        "3",
        "--dry-run",
        "model.name=no_such_model",
        "train.global_batch_size=240",
        cwd=recipe_file.parent,
    )
    assert "#SBATCH --nodes=3\n" in done.stdout
    assert f"{recipe_file.parent}/run/submitit" in done.stdout
    assert "layer table" in done.stdout, "a table that cannot be had is explained"
    assert os.listdir(recipe_file.parent) == [recipe_file.name]


@pytest.fixture
def finished_run(recipe_file):
    run_dir = recipe_file.parent / "run"
    run_dir.mkdir()
    save_recipe(load_recipe(recipe_file), run_dir / "recipe.yaml")
    (run_dir / "summary.json").write_text(json.dumps({"finished": True, "epochs": 90.0}))
    (run_dir / "summary.txt").write_text("validation top-1 91 %\n")
    return recipe_file


def test_a_finished_run_says_so_at_once_without_torch_or_processes(finished_run):
    code = f"""
        import sys
        from launch.__main__ import main
        status = main([{str(finished_run)!r}, "--local", "--tasks-per-node", "2"])
        assert not {{"torch", "timm", "nvidia"}} & set(sys.modules)
        sys.exit(status)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=finished_run.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == FINISHED, done.stderr
    assert "finished already" in done.stdout
    assert "validation top-1 91 %" in done.stdout
    assert sorted(os.listdir(finished_run.parent / "run")) == ["recipe.yaml", "summary.json", "summary.txt"]


def test_the_folder_of_another_recipe_is_refused_by_the_key_that_differs(finished_run):
    save_recipe(Recipe(), finished_run.parent / "run" / "recipe.yaml")
    done = launched(str(finished_run), "--local", cwd=finished_run.parent)
    assert done.returncode == REFUSED
    assert "model.num_classes: 1000 -> 10" in done.stderr


# --- a Slurm job that was told to stop ------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "comes_back"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_saved_job_asks_for_another_life_unless_somebody_ends_it(monkeypatch, state, comes_back):
    """Slurm counts a job that ends by itself in its time of grace as completed, and a cancelled one must stay so."""
    asked = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(launch.job, "job_states", lambda jobs: {jobs[0]: JobState(state)})
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    try:
        launch.job.requeue_preempted()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert asked == ([signal.SIGUSR2] if comes_back else [])


def test_a_job_that_cannot_ask_slurm_waits_for_its_end(monkeypatch):
    def no_answer(jobs):
        raise RecipeError("squeue", "Slurm's commands are not on this machine")

    slept = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(launch.job, "job_states", no_answer)
    monkeypatch.setattr(launch.job.time, "sleep", slept.append)
    launch.job.requeue_preempted()
    assert slept == [launch.job.UNKNOWN_STATE_SECONDS]


# --- the ranks of a local run --------------------------------------------------------------------------------------


def test_ranks_find_each_other_and_rank_0_is_heard(tmp_path):
    def call():
        prepare_rank()
        names = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
        )
        print(*(f"{name}={os.environ[name]}" for name in names), flush=True)
        assert "TORCHELASTIC_RUN_ID" not in os.environ
        return Outcome(FINISHED)

    stale = {
        "RANK": "7",
        "WORLD_SIZE": "9",
        "MASTER_ADDR": "far",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
    }
    with environ({**stale, "OMP_NUM_THREADS": None}):
        outcome, shown = run_ranks(call, tmp_path)
        assert os.environ["RANK"] == "7", "the shell's own variables come back"
    assert outcome == Outcome(FINISHED)
    (line,) = [line for line in shown.splitlines() if line.startswith("RANK")]
    assert line.startswith(
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT="
    )
    assert "MASTER_PORT=1 " not in line
    assert line.endswith(f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_its_siblings_and_is_named(tmp_path, monkeypatch, victim):
    monkeypatch.setattr(launch.watch, "SIBLING_SECONDS", 0.5)

    def call():
        prepare_rank()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"rank {os.environ['RANK']} is at work", flush=True)
        if os.environ["RANK"] == str(victim):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        child.wait()

    outcome, shown = run_ranks(call, tmp_path)
    assert outcome.status == FAILED
    assert f"rank {victim} (process " in outcome.message
    assert f"_{victim}_log.out" in outcome.message
    assert f"rank {victim} is at work" in outcome.message
    assert f"ending the others too: {1 - victim}" in shown


def test_setup_lines_run_before_the_ranks(tmp_path):
    def call():
        print(f"tasted {os.environ['FROM_SETUP']}", flush=True)
        return Outcome(FINISHED)

    outcome, shown = run_ranks(call, tmp_path, setup=("export FROM_SETUP=salt", "true"))
    assert outcome == Outcome(FINISHED)
    assert "tasted salt" in shown


def test_ranks_that_never_start_are_a_failure(tmp_path):
    outcome, _ = run_ranks(lambda: Outcome(FINISHED), tmp_path, setup=("exit 3",))
    assert outcome.status == FAILED
    assert "never started (the controller ended with 3)" in outcome.message


@pytest.mark.parametrize("siblings_say_why", [True, False])
def test_a_killed_rank_is_named_though_the_siblings_die_of_it_at_once(tmp_path, siblings_say_why):
    def call():
        prepare_rank()
        mine = tmp_path / os.environ["RANK"]
        mine.write_text(str(os.getpid()))
        while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
            time.sleep(0.01)
        if os.environ["RANK"] == "1":
            print("rank 1 is at work", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while processes.look(int((tmp_path / "1").read_text() or os.getpid())).running:
            time.sleep(0.001)
        if siblings_say_why:
            print("lost connection to rank 1", flush=True)
        os._exit(1)

    outcome, _ = run_ranks(call, tmp_path / "submitit")
    assert outcome.status == FAILED
    assert "rank 1 (process " in outcome.message


def test_a_failing_rank_shows_the_last_lines_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.watch, "SIBLING_SECONDS", 0.5)

    def call():
        prepare_rank()
        if os.environ["RANK"] == "1":
            raise RuntimeError("the disk is on fire")
        time.sleep(600)

    outcome, _ = run_ranks(call, tmp_path)
    assert outcome.status == FAILED
    assert "rank 1 (process " in outcome.message
    assert "RuntimeError: the disk is on fire" in outcome.message


def test_a_refusal_reaches_the_terminal_once_without_a_traceback(tmp_path):
    def call():
        prepare_rank()
        message = "data.path: no such folder" if os.environ["RANK"] == "0" else ""
        return Outcome(REFUSED, message)

    outcome, shown = run_ranks(call, tmp_path)
    assert outcome == Outcome(REFUSED, "data.path: no such folder")
    assert "Traceback" not in shown


class Requeued:
    """Asks submitit to be requeued in its first life, as the trainer does after a pre-emption, and ends in its second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Outcome:
        prepare_rank()
        if os.environ["RANK"] != "0":
            return Outcome(FINISHED if (self.folder / "life").exists() else PREEMPTED)
        if (self.folder / "life").exists():
            print("second life", flush=True)
            return Outcome(FINISHED)
        (self.folder / "life").touch()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(600)
        raise AssertionError

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def test_a_requeued_run_is_followed_through_its_next_life(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    outcome, shown = run_ranks(Requeued(tmp_path), tmp_path / "submitit")
    assert outcome == Outcome(FINISHED)
    assert "started again" in shown
    assert "second life" in shown


def test_the_job_is_requeued_as_it_was_submitted():
    job = Job({"optim": {"lr": 0.1}}, "runs/a")
    again = job.checkpoint()
    assert again.function == job
    assert again.args == ()


def test_a_refusal_on_slurm_is_in_the_log_and_fails_the_job():
    code = "from launch.job import Job; Job({'optim': {'lr': 'fast'}}, 'run')()"
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    for rank, text in (("0", "optim.lr: 'fast' is not a number"), ("1", "")):
        environment = {
            **os.environ,
            **slurm,
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == REFUSED
        assert done.stderr.strip() == text


LAUNCHER = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from launch.job import Outcome, prepare_rank
    from launch.profile import ClusterProfile
    from launch.submit import start_local
    from launch.watch import watch

    def call():
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        prepare_rank()
        if os.environ["RANK"] == "1":
            subprocess.Popen(["sleep", "600"])
        time.sleep(0.3)
        print("training", flush=True)
        while not asked:
            time.sleep(0.05)
        return Outcome(75)

    if __name__ == "__main__":
        job = start_local(call, profile=ClusterProfile(cluster="local"), folder=Path(sys.argv[1]), mark=sys.argv[2], tasks=2)
        outcome = watch(job, mark=sys.argv[2], tasks=2)
        print(outcome.message)
        sys.exit(outcome.status)
"""


@pytest.fixture
def launcher(tmp_path):
    mark = os.urandom(8).hex()
    script = tmp_path / "launcher.py"
    script.write_text(textwrap.dedent(LAUNCHER))
    command = [sys.executable, str(script), str(tmp_path / "submitit"), mark]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "training\n"
        yield process, f"{MARK}={mark}"
    finally:
        process.kill()
        process.communicate()
        processes.send(processes.marked(f"{MARK}={mark}"), signal.SIGKILL)


def test_ctrl_c_lets_the_ranks_save_and_leaves_none(launcher):
    process, mark = launcher
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "everything is saved" in output
    assert processes.marked(mark) == []


def test_a_killed_launcher_takes_its_ranks_with_it(launcher):
    process, mark = launcher
    assert processes.marked(mark) != []
    process.kill()
    deadline = time.monotonic() + 25
    while processes.marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes.marked(mark) == []
