"""Runs whose data are mixed, or bad. Without these a restart would mix otherwise, and a bad file hang the other ranks."""

import json
import shutil
import signal

import pytest
import torch
from launching import TINY_RECIPE
from pictures import encoded
from safetensors.torch import load_file
from worlds import make_world

from cyclebnn_dist import train
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.metrics import read_journal

MIXED = (
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "data.erasing=0.5",
    "data.erasing_mode=pixel",
    "data.augment=autoaugment",
    "data.color_jitter=[0.4, 0.4, 0.4, 0.1]",
    "data.dtype=bf16",
    "train.amp=bf16",
    "train.label_smoothing=0.1",
    "train.global_batch_size=16",
    "train.accumulation=2",
    "loss.kurtosis_weight=1",
)


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    """The tiny recipe on a copy of the tiny data set, 12 images a step: 6 steps an epoch, with one image less too."""
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "tiny.yaml"
    text = TINY_RECIPE.format(run_dir=tmp_path / "run", data=tmp_path / "data")
    path.write_text(text.replace("global_batch_size: 16", "global_batch_size: 12"))
    return path


def run(rank, size, path, overrides, stop_at=None):
    """A run, which a signal to rank 1 stops in its pass number ``stop_at``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    backward, passes = DDPEngine.backward, []

    def counted(self, loss):
        backward(self, loss)
        passes.append(loss)
        if len(passes) == stop_at and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    DDPEngine.backward = counted
    try:
        return train.run_recipe(
            load_recipe(path, [*overrides, "wandb.mode=disabled"]), make_world(rank, size)
        )
    except RecipeError as error:
        return f"{error.key}: {error.problem}"
    finally:
        DDPEngine.backward = backward


def newest(run_dir):
    return max((run_dir / "checkpoints").glob("step_*"))


def test_a_restart_mixes_as_the_undisturbed_run(ranks, recipe_file):
    undisturbed, stopped = recipe_file.parent / "undisturbed", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [*MIXED, f"run.dir={undisturbed}", "train.epochs=1"], None) == [0, 0]
    assert ranks(2, run, recipe_file, [*MIXED, "train.epochs=1"], 5) == [train.PREEMPTED] * 2
    assert newest(stopped).name < newest(undisturbed).name
    assert ranks(2, run, recipe_file, [*MIXED, "train.epochs=1"], None) == [0, 0]
    for name in ("model", "ema", "rank_0", "rank_1"):
        expected = load_file(newest(undisturbed) / f"{name}.safetensors")
        found = load_file(newest(stopped) / f"{name}.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name
    losses = [row["loss"] for row in read_journal(undisturbed) if row["event"] == "train"]
    assert all(1.0 < loss < 10.0 for loss in losses)


def test_mixing_changes_the_run(ranks, recipe_file):
    """A recipe could ask for it and train without."""
    losses = []
    for number, mixup in enumerate(([], ["data.mixup=0.8"], ["data.cutmix=1.0"])):
        run_dir = recipe_file.parent / str(number)
        assert ranks(1, run, recipe_file, [*mixup, f"run.dir={run_dir}", "train.epochs=0.3"], None) == [0]
        losses.append(next(row["loss"] for row in read_journal(run_dir) if row["event"] == "train"))
    assert len(set(losses)) == 3


def test_odd_batches_to_mix_are_refused_by_every_rank_before_anything_is_written(ranks, recipe_file):
    for answer in ranks(2, run, recipe_file, ["data.mixup=1", "train.global_batch_size=10"], None):
        assert answer.startswith("data.mixup: ")
    assert not (recipe_file.parent / "run").exists()


def spoil(recipe_file, split):
    """Make one image of a split unreadable, and return its path."""
    bad = sorted((recipe_file.parent / "data" / split).glob("*/*.JPEG"))[17]
    bad.write_bytes(bad.read_bytes()[:300])
    return bad


@pytest.mark.parametrize(("split", "accumulation"), [("train", 1), ("train", 2), ("val", 1)])
def test_a_bad_file_ends_all_ranks_with_its_name_and_a_skip_list_goes_on(
    ranks, recipe_file, split, accumulation
):
    """One rank meets it; the others would wait for it until a time limit, and say nothing of the file."""
    bad = spoil(recipe_file, split)
    common = [f"train.accumulation={accumulation}", "train.epochs=1"]
    for answer in ranks(2, run, recipe_file, common, None):
        assert answer.startswith("data.path: ")
        assert str(bad) in answer
    skip_list = recipe_file.parent / "skip.txt"
    skip_list.write_text(f"# found in the third day\n{bad.relative_to(recipe_file.parent / 'data')}\n")
    assert ranks(2, run, recipe_file, [*common, f"data.skip_list={skip_list}"], None) == [0, 0]
    summary = json.loads((recipe_file.parent / "run" / "summary.json").read_text())
    assert summary["steps"] == 6


def test_the_last_file_with_a_problem_is_mended_and_the_run_goes_on(ranks, recipe_file):
    """A repaired file needs no list: the same command goes on."""
    bad = spoil(recipe_file, "train")
    assert all(str(bad) in answer for answer in ranks(2, run, recipe_file, ["train.epochs=1"], None))
    bad.write_bytes(encoded())
    assert ranks(2, run, recipe_file, ["train.epochs=1"], None) == [0, 0]
