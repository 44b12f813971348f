"""Without these a signal at 3 a.m. would find a run that does not listen, and cost it all since its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from launching import ROOT, TINY_RECIPE, Launched
from safetensors.torch import load_file
from worlds import make_world

from cyclebnn_dist import assembly, checkpoint, run_lock, train
from cyclebnn_dist.checkpoint.writing import Writing
from cyclebnn_dist.comm import verdict
from cyclebnn_dist.config import Recipe, RecipeError, load_recipe, to_dict
from cyclebnn_dist.data import EvalLoader
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.guards.exit_status import FINISHED, INTERRUPTED, PREEMPTED
from cyclebnn_dist.guards.preempt import Preempted, PreemptionFlag, listening
from cyclebnn_dist.guards.stop_vote import StopVote
from cyclebnn_dist.meeting import free_port
from cyclebnn_dist.metrics import read_journal

USR2, TERM, INT = signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


def run(rank, size, path, overrides=()):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return train.run_recipe(load_recipe(path, [*overrides, "wandb.mode=disabled"]), make_world(rank, size))


def newest(run_dir):
    return max((run_dir / "checkpoints").glob("step_*"))


def leave_evaluation(rank, size, path, batch, overrides=()):
    """Signal rank 1 before its validation batch number ``batch``, counted over all evaluations of this life."""
    iterate, seen = EvalLoader.__iter__, []

    def counted(self):
        for each in iterate(self):
            seen.append(1)
            if rank == 1 and len(seen) == batch:
                signal.raise_signal(TERM)
            yield each

    EvalLoader.__iter__ = counted
    try:
        return run(rank, size, path, overrides), len(seen)
    finally:
        EvalLoader.__iter__ = iterate


def eval_rows(run_dir):
    return [
        {name: value for name, value in row.items() if name != "life"}
        for row in read_journal(run_dir)
        if row["event"] == "eval"
    ]


def test_an_evaluation_is_left_between_two_batches_and_done_again(ranks, recipe_file):
    """Two models of 4 batches each are evaluated after 5 and 10 steps; a life is stopped in each of the evaluations."""
    common = ["eval.batch_size=4"]
    undisturbed, stopped = recipe_file.parent / "undisturbed", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [*common, f"run.dir={undisturbed}"]) == [FINISHED] * 2
    for batch, step in [(2, 5), (8 + 6, 10)]:
        outcomes = ranks(2, leave_evaluation, recipe_file, batch, common)
        assert [status for status, _ in outcomes] == [PREEMPTED] * 2
        assert all(seen - batch in (0, 1) for _, seen in outcomes), "they went on after the signal"
        assert newest(stopped).name == f"step_{step:09d}"
    assert not (stopped / "summary.json").exists()
    assert ranks(2, run, recipe_file, common) == [FINISHED] * 2
    for name in ("model", "ema", "shared", "rank_0", "rank_1"):
        expected = load_file(newest(undisturbed) / f"{name}.safetensors")
        found = load_file(newest(stopped) / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
    assert [row["step"] for row in eval_rows(stopped)] == [5, 10], "one row for every evaluation that is due"
    assert eval_rows(stopped) == eval_rows(undisturbed)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (undisturbed, stopped)]
    for key in ("eval_top1", "eval_ema_top1", "eval_loss", "best_top1", "eval_step"):
        assert summaries[0][key] == summaries[1][key]


def vote_over(rank, size, lengths, signalled, unreadable):
    """Things this rank got before it was told to stop, or before it met what cannot be read."""

    def things():
        for number in range(lengths[rank]):
            if rank == unreadable and number == 1:
                raise RecipeError("data.path", "cannot read image", "mend it")
            yield number

    flag, got = PreemptionFlag(), []
    vote = StopVote(make_world(rank, size), flag)
    try:
        for thing in vote.over(things(), rounds=max(lengths)):
            got.append(thing)
            if (rank, thing) == signalled:
                flag.received.append(TERM)
    except Preempted:
        return got, "left", sorted(flag.of_others)
    except RecipeError:
        return got, "refused", []
    return got, "done", []


def test_ranks_with_fewer_batches_take_part_in_the_vote_to_the_end(ranks):
    lengths = [4, 2, 0]
    assert ranks(3, vote_over, lengths, None, None) == [(list(range(n)), "done", []) for n in lengths]
    for got, end, signals in ranks(3, vote_over, lengths, (0, 0), None):
        assert len(got) <= 2
        assert (end, signals) == ("left", [TERM])
    assert [end for _, end, _ in ranks(3, vote_over, lengths, None, 1)] == ["done", "refused", "done"]


def twice(rank, size, path, first, then, *, reached):
    """Signal ``reached`` with ``first`` in the third step, and with ``then`` inside the save; who was handed over to."""
    backward, outcome, calls, handed = DDPEngine.backward, Writing.outcome, [], []
    before = signal.signal(USR2, lambda *_: handed.append(rank))

    def counted(self, loss):
        backward(self, loss)
        calls.append(loss)
        if len(calls) == 3 and rank in reached:
            signal.raise_signal(first)

    def disturbed(self):
        if rank in reached and then is not None and calls:
            calls.clear()
            signal.raise_signal(then)
        return outcome(self)

    DDPEngine.backward, Writing.outcome = counted, disturbed
    try:
        return run(rank, size, path, ["run.save_every=100"]), handed
    finally:
        DDPEngine.backward, Writing.outcome = backward, outcome
        signal.signal(USR2, before)


def twice_on_both(rank, size, path, first, then):
    return twice(rank, size, path, first, then, reached=(0, 1))


def twice_on_rank_1(rank, size, path, first, then):
    return twice(rank, size, path, first, then, reached=(1,))


@pytest.mark.parametrize("function", [twice_on_both, twice_on_rank_1])
@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (USR2, None, PREEMPTED),
        (USR2, TERM, PREEMPTED),
        (USR2, USR2, PREEMPTED),
        (USR2, INT, PREEMPTED),
        (TERM, USR2, PREEMPTED),
        (TERM, TERM, PREEMPTED),
        (TERM, INT, PREEMPTED),
        (INT, TERM, PREEMPTED),
        (INT, None, INTERRUPTED),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_second_signal_breaks_neither_the_save_nor_the_requeue(
    ranks, recipe_file, function, first, then, status
):
    answers = ranks(2, function, recipe_file, first, then)
    assert [found for found, _ in answers] == [status] * 2
    requeued = [[0], []] if USR2 in (first, then) else [[], []]
    assert [handed for _, handed in answers] == requeued, "rank 0 alone, once, wherever USR2 arrived"
    run_dir = recipe_file.parent / "run"
    assert newest(run_dir).name == "step_000000004"
    assert checkpoint.damaged_parts(newest(run_dir)) == []


def starting(rank, size, path, phase, reached):
    """Signal one rank in a phase of the start; the status, and how many steps were begun."""
    steps, begin = [], DDPEngine.begin_step
    places = {
        "scan": (train, "scan_images"),
        "lock": (run_lock, "_acquire"),
        "model": (assembly, "build_model"),
    }
    places |= {
        "auto": (verdict, "measure_codec"),
        "restore": (train, "announce"),
        "finished": (train, "on_main"),
    }
    module, name = places[phase]
    function = getattr(module, name)

    def signalled(*args, **kwargs):
        if phase == "lock" or (phase == "scan" and rank == reached):
            threading.Timer(0.3, os.kill, args=(os.getpid(), TERM)).start()
            time.sleep(50)  # a lock that is held, a data set on a slow file server
        elif rank == reached:
            signal.raise_signal(TERM)
        return function(*args, **kwargs)

    setattr(module, name, signalled)
    DDPEngine.begin_step = lambda self, *args, **kwargs: (steps.append(1), begin(self, *args, **kwargs))
    begun = time.monotonic()
    try:
        status = run(rank, size, path, ["train.epochs=0.4", "comm.mode=auto"])
    finally:
        setattr(module, name, function)
        DDPEngine.begin_step = begin
    return status, len(steps), time.monotonic() - begun < 40


@pytest.mark.parametrize(
    ("phase", "reached"),
    [("lock", 0), ("scan", 0), ("model", 1), ("auto", 1), ("auto", 0), ("restore", 1)],
)
def test_a_signal_before_the_first_step_ends_all_ranks_before_it(ranks, recipe_file, phase, reached):
    assert ranks(2, starting, recipe_file, phase, reached) == [(PREEMPTED, 0, True)] * 2
    if phase != "restore":
        assert not (recipe_file.parent / "run").exists()
    assert ranks(2, run, recipe_file, ["train.epochs=0.4", "comm.mode=auto"]) == [FINISHED] * 2


ALONE = """
import signal, sys
from cyclebnn_dist.guards import preempt
preempt.START_SECONDS = preempt.REQUEUE_SECONDS = preempt.INTERRUPT_SECONDS = 0.5
from cyclebnn_dist.__main__ import main
def requeue(*_):
    print("requeued", flush=True)
    sys.exit(144)
signal.signal(signal.SIGUSR2, requeue)
print("begun", flush=True)
sys.exit(main(["train", sys.argv[1], "wandb.mode=disabled"]))
"""


@pytest.fixture
def unmet(recipe_file):
    """``unmet(rank)``: a rank of two that waits inside torch's library for one that never comes."""
    processes = []

    def start(rank):
        port = free_port()
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", ALONE, str(recipe_file)],
                cwd=ROOT,
                env={**os.environ, **place, "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert processes[-1].stdout.readline() == "begun\n"
        time.sleep(12.0)  # it imports torch; a signal in there is heard as well
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("rank", "numbers", "status", "said"),
    [
        (1, [TERM], PREEMPTED, "still not over"),
        (0, [USR2], 144, "still not over"),
        (1, [INT, INT], INTERRUPTED, "without saving"),
    ],
)
def test_a_start_that_hangs_inside_a_library_is_left(unmet, rank, numbers, status, said):
    process = unmet(rank)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors
    assert said in errors
    assert (output == "requeued\n") == (USR2 in numbers)
    assert "Traceback" not in errors


@pytest.mark.parametrize("then", [TERM, USR2], ids=["TERM", "USR2"])
def test_a_time_limit_under_submitit_starts_the_ranks_again_whatever_follows_the_warning(recipe_file, then):
    run_dir = recipe_file.parent / "run"
    started = Launched(recipe_file, run_dir, ranks=2)
    try:
        started.wait_for_step(2, seconds=120)
        pids = started.rank_pids()
        for number in (USR2, then):
            for pid in pids.values():
                os.kill(pid, number)
        status, output = started.wait(seconds=200)
    finally:
        if not started.ended:
            started.end()
    assert status == FINISHED, output
    assert "the ranks are started again and go on from the newest checkpoint" in output
    assert "resuming from the checkpoint of step" in output
    starts = [row for row in read_journal(run_dir) if row["event"] == "start"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 3


@pytest.mark.parametrize(
    ("executor", "status"),
    [("slurm", FINISHED), ("slurm", PREEMPTED), ("slurm", INTERRUPTED), ("slurm", 2), ("local", PREEMPTED)],
)
def test_slurm_sees_the_status_and_a_local_launcher_the_outcome(monkeypatch, executor, status):
    from launch import job

    def main(recipe, *, preemption):
        if status == 2:
            raise RecipeError("data.path", "is not there", "mend it")
        return status

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(job, "prepare_rank", lambda devices: None)
    monkeypatch.setattr(job, "requeue_preempted", lambda: None)  # test_slurm has the real queue
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    monkeypatch.setenv("RANK", "0")
    call = job.Job(to_dict(Recipe()), "runs/a")
    if executor == "slurm" and status != FINISHED:
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == status
    else:
        assert call().status == status


def test_handlers_are_put_back_and_a_finished_listener_hears_nothing():
    heard = []
    before = signal.signal(TERM, lambda *_: heard.append(1))
    try:
        with listening() as flag:
            signal.raise_signal(TERM)
            assert flag.requested
        assert heard == []
        signal.raise_signal(TERM)
        assert heard == [1]
    finally:
        signal.signal(TERM, before)
