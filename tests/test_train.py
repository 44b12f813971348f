"""Runs in live ranks. Without these a recipe would train something else than it says, or a restart would change it."""

import json
import signal

import numpy as np
import pytest
import torch
from launching import TINY_RECIPE
from safetensors.torch import load_file
from worlds import make_world

from cyclebnn_dist import agreement, evaluate, resume, train
from cyclebnn_dist.agreement import parameter_hash
from cyclebnn_dist.binary.methods import CycleBNN
from cyclebnn_dist.comm import Reducer
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.data.pack import ShardSize, pack_folder
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.metrics import read_journal

BACKEND = Reducer.backend


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


def run(rank, size, path, overrides):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        return train.run_recipe(
            load_recipe(path, [*overrides, "wandb.mode=disabled"]), make_world(rank, size)
        )
    except RecipeError as error:
        return f"{error.key}: {error.problem}"


def newest(run_dir):
    return max((run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("mode", ["quantized", "bf16", "fp32"])
def test_parameters_are_bit_identical_on_all_ranks_and_bytes_are_those_of_the_mode(ranks, recipe_file, mode):
    """comm.check_every=1 compares the bytes of all parameters after every step and raises where they differ."""
    overrides = [f"comm.mode={mode}", "train.epochs=1", "comm.error_feedback=false"]
    assert ranks(3, run, recipe_file, [*overrides, "train.global_batch_size=15"]) == [0, 0, 0]
    summary = json.loads((recipe_file.parent / "run" / "summary.json").read_text())
    ratio = summary["fp32_bytes"] / summary["sent_bytes"]
    expected = {"quantized": (5.0, 12.0), "bf16": (1.8, 2.0), "fp32": (0.9, 1.0)}[mode]
    assert expected[0] < ratio < expected[1]
    assert summary["bits"]["communication"]["max"] == {"quantized": 8, "bf16": 16, "fp32": 32}[mode]


def test_time_in_the_exchange_is_in_every_row_and_in_the_summary(ranks, recipe_file):
    assert ranks(2, run, recipe_file, ["train.epochs=1", "run.log_every=2"]) == [0, 0]
    run_dir = recipe_file.parent / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [row for row in read_journal(run_dir) if row["event"] == "train"]
    steps = [2, 2, 1]
    for name in ("encode", "wire", "decode", "exposed"):
        per_step = [row[f"{name}_seconds"] for row in rows]
        assert min(per_step) > 0
        total = sum(seconds * n for seconds, n in zip(per_step, steps, strict=True))
        assert total == pytest.approx(summary[f"exchange_{name}_seconds"])
    agreeing = sum(row["agreement_seconds"] * n for row, n in zip(rows, steps, strict=True))
    assert 0 < agreeing == pytest.approx(summary["agreement_seconds"])
    text = (run_dir / "summary.txt").read_text()
    assert "not hidden by the backward pass" in text
    assert "ranks agreeing" in text


def test_another_number_of_ranks_goes_on_from_the_same_weights(ranks, recipe_file):
    assert ranks(2, run, recipe_file, ["train.epochs=1"]) == [0, 0]
    run_dir = recipe_file.parent / "run"
    before = load_file(newest(run_dir) / "model.safetensors")
    longer = ["train.epochs=1.2", "run.extend_epochs=true", "optim.lr=1e-3"]
    assert ranks(1, run, recipe_file, longer) == [0]
    rows = read_journal(run_dir)
    assert [(r["step"], r["ranks"]) for r in rows if r["event"] == "start"] == [(0, 2), (5, 1)]
    after = load_file(newest(run_dir) / "model.safetensors")
    moved = [
        (after[name] - before[name]).abs().max().item() for name in before if name.endswith("conv1.weight")
    ]
    assert 0 < max(moved) < 0.05, "one more step at the end of the schedule moves weights a little"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["sent_bytes"] > 0
    two, one = summary["worlds"]
    assert [(w["ranks"], w["first_step"], w["steps"], w["images"]) for w in (two, one)] == [
        (2, 0, 5, 80),
        (1, 5, 1, 16),
    ]
    assert (two["sent_bytes"], one["sent_bytes"]) == (summary["sent_bytes"], 0)
    assert summary["images_per_second"] == one["images"] / one["train_seconds"]
    text = (run_dir / "summary.txt").read_text()
    assert "images/s over 2 ranks (steps 0 to 4) on cpu" in text
    assert "images/s over 1 rank (step 5) on cpu" in text
    assert "none over 1 rank (step 5): one rank has nobody to send to" in text


def resume_and_stop(rank, size, path, step):
    """As ``stop_at``; also the residuals that this rank began with."""
    restore, begun_with = resume.restore, {}

    def watched(run, folder):
        restore(run, folder)
        for phase, errors in run.reducer.state_dict()["residuals"].items():
            begun_with[phase] = {name: error.clone() for name, error in errors.items()}

    resume.restore = watched
    try:
        return stop_at(rank, size, path, step), begun_with
    finally:
        resume.restore = restore


def mean_of_sent_residuals(run_dir):
    """By parameter, over the ranks that wrote the newest checkpoint."""
    files = [load_file(path) for path in sorted(newest(run_dir).glob("rank_*.safetensors"))]
    names = [key for key in files[0] if key.startswith("reducer/residuals/gradient/")]
    return {name.split("/")[-1]: sum(file[name].double() for file in files) / len(files) for name in names}


def test_four_ranks_two_ranks_four_ranks_owe_the_same_gradient(ranks, recipe_file):
    assert ranks(4, stop_at, recipe_file, 2) == [train.PREEMPTED] * 4
    for size, step in [(2, 3), (4, 99)]:
        saved = mean_of_sent_residuals(recipe_file.parent / "run")
        outcomes = ranks(size, resume_and_stop, recipe_file, step)
        assert [status for status, _ in outcomes] == [train.PREEMPTED if step < 99 else train.FINISHED] * size
        assert saved.keys() == outcomes[0][1]["gradient"].keys()
        assert max(float(error.abs().max()) for error in saved.values()) > 0
        for name, expected in saved.items():
            found = sum(begun["gradient"][name].double() for _, begun in outcomes) / size
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    starts = [row for row in read_journal(recipe_file.parent / "run") if row["event"] == "start"]
    assert [(row["step"], row["ranks"]) for row in starts] == [(0, 4), (3, 2), (7, 4)]


def test_a_longer_run_needs_the_flag_that_says_so(ranks, recipe_file):
    assert ranks(1, run, recipe_file, ["train.epochs=0.2"]) == [0]
    (answer,) = ranks(1, run, recipe_file, ["train.epochs=0.4"])
    assert "train.epochs" in answer
    assert "0.2 -> 0.4" in answer


def stop_at(rank, size, path, step, overrides=()):
    """Signal rank 1 in the middle of training step ``step``, as a cluster would; return status and result folder."""
    backward = DDPEngine.backward
    calls = []

    def counted(self, loss):
        backward(self, loss)
        calls.append(loss)
        if len(calls) == step and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    DDPEngine.backward = counted
    try:
        return run(rank, size, path, overrides)
    finally:
        DDPEngine.backward = backward


@pytest.fixture
def other_formats(tmp_path, tiny_data):
    """Overrides of a run on the sample set as shards, and on a small set in CIFAR's format."""
    pack_folder(tiny_data, tmp_path / "shards", shard_size=ShardSize(images=9), workers=1)
    random = np.random.default_rng(0)
    for file in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        records = random.integers(0, 256, size=(16, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / file)
    return {
        "shards": [f"data.path={tmp_path / 'shards'}", "data.shuffle_shards=3"],
        "cifar10": [f"data.path={tmp_path}", "data.format=cifar10", "model.small_stem=true"],
    }


@pytest.mark.parametrize("name", ["shards", "cifar10"])
def test_runs_on_shards_and_cifar_stop_and_go_on_like_the_undisturbed_run(
    ranks, recipe_file, other_formats, name
):
    """Only runs on folders would survive the night."""
    overrides = [*other_formats[name], "train.epochs=1"]
    undisturbed, stopped = recipe_file.parent / "undisturbed", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [*overrides, f"run.dir={undisturbed}"]) == [0, 0]
    assert ranks(2, stop_at, recipe_file, 2, overrides) == [train.PREEMPTED, train.PREEMPTED]
    assert ranks(2, run, recipe_file, overrides) == [0, 0]
    expected, found = (load_file(newest(folder) / "model.safetensors") for folder in (undisturbed, stopped))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    summary = json.loads((stopped / "summary.json").read_text())
    (result, _), _ = ranks(2, evaluated, recipe_file, [])
    assert result["images"] == {"shards": 30, "cifar10": 16}[name]
    assert result["top1"] == summary["eval_top1"]


def test_a_signal_to_one_rank_saves_all_and_the_next_start_equals_the_undisturbed_run(ranks, recipe_file):
    undisturbed = recipe_file.parent / "undisturbed"
    assert ranks(2, run, recipe_file, [f"run.dir={undisturbed}"]) == [0, 0]
    assert ranks(2, stop_at, recipe_file, 3) == [train.PREEMPTED, train.PREEMPTED]
    stopped = recipe_file.parent / "run"
    assert not (stopped / "summary.json").exists()
    assert newest(stopped).name == "step_000000004", "agreed at the step after the signal"
    assert ranks(2, run, recipe_file, []) == [0, 0]
    for name in ("model", "ema", "shared", "rank_0", "rank_1"):
        expected = load_file(newest(undisturbed) / f"{name}.safetensors")
        found = load_file(newest(stopped) / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name


def test_saving_and_evaluating_more_often_does_not_change_the_run(ranks, recipe_file):
    often, seldom = recipe_file.parent / "often", recipe_file.parent / "seldom"
    assert ranks(2, run, recipe_file, [f"run.dir={often}", "eval.every_epochs=0.2"]) == [0, 0]
    assert ranks(2, run, recipe_file, [f"run.dir={seldom}", "run.save_every=100", "eval.every_epochs=9"]) == [
        0,
        0,
    ]
    for name in ("model", "ema", "rank_0", "rank_1"):
        expected = load_file(newest(often) / f"{name}.safetensors")
        found = load_file(newest(seldom) / f"{name}.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name


def test_measuring_health_does_not_change_the_run_and_gives_one_row_for_all_ranks(ranks, recipe_file):
    measured, without = recipe_file.parent / "measured", recipe_file.parent / "without"
    common = ["train.epochs=0.8", "train.accumulation=2"]
    assert ranks(2, run, recipe_file, [*common, f"run.dir={measured}"]) == [0, 0]
    assert ranks(2, run, recipe_file, [*common, f"run.dir={without}", "run.health_every=0"]) == [0, 0]
    for name in ("model", "ema", "rank_0", "rank_1"):
        expected = load_file(newest(without) / f"{name}.safetensors")
        found = load_file(newest(measured) / f"{name}.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
    rows = [row for row in read_journal(measured) if row["event"] == "health"]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        for measure in ("flip_rate", "saturated_inputs", "latent_magnitude"):
            own = [value for key, value in row.items() if key.startswith(f"{measure}/layer")]
            assert len(own) == 16
            assert row[f"{measure}_min"] == min(own)
            assert row[f"{measure}_max"] == max(own)
        assert 0 < row["flip_rate_mean"] < 0.5
        assert 0 < row["saturated_inputs_mean"] < 1
    assert not [row for row in read_journal(without) if row["event"] == "health"]


def soften(rank, size, path):
    """A method that forgot to harden its weights for evaluation."""
    binarize = CycleBNN.binarize_weight
    CycleBNN.binarize_weight = lambda self, weight: weight
    try:
        run(rank, size, path, ["train.epochs=0.2"])
    except RuntimeError as error:
        return str(error)
    finally:
        CycleBNN.binarize_weight = binarize


def test_an_accuracy_of_weights_that_are_not_binary_is_never_reported(ranks, recipe_file):
    for message in ranks(2, soften, recipe_file):
        assert "not two-valued in evaluation: layer1.0.conv1 (CycleBNN)" in message
    assert not [row for row in read_journal(recipe_file.parent / "run") if row["event"] == "eval"]


def test_accumulated_passes_give_the_gradient_of_the_whole_batch(ranks, recipe_file):
    """A float model normalized per image, whose gradient is the mean over images however they are cut."""
    kwargs = "model.kwargs={channels: [8, 8, 8, 8], norm_layer: layernorm2d}"
    common = [
        "binary.method=none",
        kwargs,
        "train.epochs=0.2",
        "comm.mode=fp32",
        "train.ema_decay=0",
        "optim.name=sgd",
    ]
    whole, cut = recipe_file.parent / "whole", recipe_file.parent / "cut"
    assert ranks(1, run, recipe_file, [*common, f"run.dir={whole}"]) == [0]
    assert ranks(2, run, recipe_file, [*common, f"run.dir={cut}", "train.accumulation=4"]) == [0, 0]
    expected, found = (load_file(newest(d) / "model.safetensors") for d in (whole, cut))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def evaluated(rank, size, path, overrides):
    recipe = load_recipe(path)
    return evaluate.evaluate_checkpoint(
        path.parent / "run", make_world(rank, size), overrides=overrides
    ), recipe


def test_evaluating_the_checkpoint_gives_what_training_reported(ranks, recipe_file):
    assert ranks(2, run, recipe_file, []) == [0, 0]
    summary = json.loads((recipe_file.parent / "run" / "summary.json").read_text())
    for size in (1, 3):
        results = [result for result, _ in ranks(size, evaluated, recipe_file, [])]
        for result in results:
            assert result["images"] == 30
            assert result["forward_bits"] == 6
            for name in ("top1", "top5", "ema_top1"):
                assert result[name] == summary[f"eval_{name}"], name


@pytest.mark.parametrize("override", ["model.name=resnet34", "optim.lr=1"])
def test_an_evaluation_refuses_keys_it_would_ignore(ranks, recipe_file, override):
    with pytest.raises(RecipeError, match="does not concern an evaluation"):
        evaluate.check_overrides([override])
    assert evaluate.check_overrides(["eval.forward_bits=4", "data.path=/x"]) == [
        "eval.forward_bits=4",
        "data.path=/x",
    ]


@pytest.mark.parametrize(
    ("overrides", "size", "bits"),
    [
        (["binary.method=none"], 2, {"forward": 32, "backward": 32, "communication": 8}),
        (["binary.method=bireal"], 1, {"forward": 32, "backward": 32, "communication": 32}),
        ([], 1, {"forward": 6, "backward": 8, "communication": 32}),
    ],
)
def test_only_widths_that_were_used_are_reported(ranks, recipe_file, overrides, size, bits):
    assert ranks(size, run, recipe_file, ["train.epochs=1", *overrides]) == [0] * size
    summary = json.loads((recipe_file.parent / "run" / "summary.json").read_text())
    assert {channel: used["max"] for channel, used in summary["bits"].items()} == bits
    assert summary["eval_forward_bits"] == bits["forward"]


def refused(rank, size, path, overrides):
    return run(rank, size, path, overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.amp=fp16"], "train.amp"),
        (["model.sync_bn=true"], "model.sync_bn"),
        (["model.num_classes=11"], "model.num_classes"),
        (["train.global_batch_size=17"], "train.global_batch_size"),
        (["train.global_batch_size=800"], "train.global_batch_size"),
        (["model.name=resnet19"], "model.name"),
        (["data.path=/nowhere"], "data.path"),
    ],
)
def test_what_cannot_be_is_refused_by_every_rank_and_leaves_nothing(ranks, recipe_file, overrides, key):
    answers = ranks(2, refused, recipe_file, overrides)
    assert all(str(answer).startswith(f"{key}: ") for answer in answers), answers
    assert not (recipe_file.parent / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(ranks, recipe_file):
    (answer,) = ranks(1, run, recipe_file, [f"run.dir={recipe_file}/below/a/file"])
    assert answer.startswith("run.dir: ")
    assert "is a file" in answer


def test_a_folder_that_is_no_runs_is_left_alone(ranks, recipe_file):
    folder = recipe_file.parent / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (answer,) = ranks(1, run, recipe_file, [])
    assert "thesis.tex" in answer
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def diverge(rank, size, path, steps):
    """Rank 1 alone finds the averaged gradient of some steps not to be finite; what it then does to the weights."""
    clip = DDPEngine.clip
    seen = []

    def poisoned(self, max_norm):
        norm = clip(self, max_norm)
        seen.append(parameter_hash(self.module))
        return norm * float("nan") if rank == 1 and len(seen) - 1 in steps else norm

    DDPEngine.clip = poisoned
    try:
        answer = run(rank, size, path, ["train.max_skipped_steps=3", "train.epochs=0.8"])
    except RuntimeError as error:
        answer = str(error)
    finally:
        DDPEngine.clip = clip
    return answer, seen


def test_what_one_rank_finds_not_finite_all_skip(ranks, recipe_file):
    (first, hashes), (second, of_second) = ranks(2, diverge, recipe_file, [1, 2])
    assert first == second == train.FINISHED
    assert hashes == of_second
    assert hashes[0] != hashes[1] == hashes[2] == hashes[3], "steps 1 and 2 moved nothing"
    assert json.loads((recipe_file.parent / "run" / "summary.json").read_text())["skipped_steps"] == 2


def test_gradients_that_stay_non_finite_end_the_run_with_the_steps_named(ranks, recipe_file):
    for message, _ in ranks(2, diverge, recipe_file, [0, 1, 2]):
        assert "non-finite gradients in 3 steps in a row, 0 to 2" in message


def diverge_and_stop(rank, size, path, poisoned, stop):
    """Gradients of some steps of this life are not finite; rank 1 is signalled in step number ``stop`` of it."""
    clip, count = DDPEngine.clip, []

    def clip_and_poison(self, max_norm):
        norm = clip(self, max_norm)
        count.append(1)
        if rank == 1 and len(count) - 1 == stop:
            signal.raise_signal(signal.SIGTERM)
        return norm * float("nan") if len(count) - 1 in poisoned else norm

    DDPEngine.clip = clip_and_poison
    try:
        return run(rank, size, path, ["train.max_skipped_steps=3"])
    except RuntimeError as error:
        return str(error)
    finally:
        DDPEngine.clip = clip


def test_a_streak_of_skipped_steps_is_counted_over_a_restart(ranks, recipe_file):
    """A run that is stopped every hour would skip every step for days."""
    assert ranks(2, diverge_and_stop, recipe_file, [1, 2], 1) == [train.PREEMPTED] * 2
    for message in ranks(2, diverge_and_stop, recipe_file, [0], None):
        assert "non-finite gradients in 3 steps in a row, 1 to 3" in message


def differ(rank, size, path, what):
    """One rank is started with something else than the others; what each says."""
    overrides, restore, versions = [], resume.restore, agreement.library_versions
    other = rank == 1
    if other:
        overrides = {
            "recipe": ["optim.lr=2e-3"],
            "schedule": ["precision.communication.cycles=1"],
            "parameter layout": ["model.kwargs={channels: [16, 32, 32, 32]}"],
            "codec": ["comm.codec=absmax"],
        }.get(what, [])
    if other and what == "step":

        def restore_older(run, folder):
            restore(run, folder)
            run.step -= 1

        resume.restore = restore_older
    if other and what == "library versions":
        agreement.library_versions = lambda: "torch 1.0"
    if other and what == "backend":
        Reducer.backend = property(lambda self: "torch over gloo")
    try:
        return str(run(rank, size, path, [*overrides, "run.collective_timeout_seconds=10"]))
    except RuntimeError as error:
        return str(error)
    finally:
        resume.restore, agreement.library_versions, Reducer.backend = restore, versions, BACKEND


@pytest.mark.parametrize(
    "what", ["recipe", "schedule", "parameter layout", "codec", "backend", "library versions", "step"]
)
def test_a_rank_started_otherwise_stops_all_and_is_named(ranks, recipe_file, what):
    if what == "step":
        assert ranks(2, stop_at, recipe_file, 3) == [train.PREEMPTED, train.PREEMPTED]
    messages = ranks(2, differ, recipe_file, what)
    for message in messages:
        (first, *details) = message.splitlines()
        assert first.startswith("ranks disagree in ")
        assert what in first
        (detail,) = [line for line in details if line.startswith(f"  {what}: ")]
        assert "on rank 0; " in detail
        assert detail.endswith("on rank 1")
