"""A search that is killed, shared or repeated must find the same layers, and do nothing twice."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import fill, read_only, small_disk
from launching import ROOT, wait_until

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.binary import count
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.pattern import read_pattern
from cyclebnn_dist.config.recipe import SearchConfig
from cyclebnn_dist.config.search_rules import check_searchable
from cyclebnn_dist.data import scan_folder
from cyclebnn_dist.models import build_model
from cyclebnn_dist.search.costs import count_costs
from cyclebnn_dist.search.folder import Folder, read_outcome, read_weights, write_outcome, write_weights
from cyclebnn_dist.search.held_out import hold_out
from cyclebnn_dist.search.mixbin import search
from cyclebnn_dist.search.plot import chosen_in
from cyclebnn_dist.search.selection import Outcome
from cyclebnn_dist.world import World

RECIPE = """\
run: {{dir: {run_dir}, deterministic: true}}
model: {{name: resnet18, num_classes: 10, kwargs: {{layers: [1, 1, 1, 1], channels: [16, 16, 24, 32]}}}}
binary: {{activation: prelu, include: [layer1.*, layer4.*]}}
data: {{path: {data}, image_size: 32, threads: 1, augment: none}}
train: {{global_batch_size: 16, clip_norm: 5.0, label_smoothing: 0.1}}
optim: {{lr: 2e-3}}
eval: {{batch_size: 16}}
search: {{budget: 0.81, strategy: shrink, pretrain_steps: 2, steps: 2, finetune_steps: 1, batch_size: 16, eval_images: 30}}
"""


def write_recipe(folder, data):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(run_dir=folder / "run", data=data))
    return path


def made(folder):
    """Content of every finished file of a search, and which file it is: a file made anew is another one."""
    paths = sorted(p for p in folder.rglob("round_*/*") if p.is_file())
    contents = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return contents, {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in paths}


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """Recipe file and folder of a search that was left in peace, by one process."""
    folder = tmp_path_factory.mktemp("search")
    recipe = write_recipe(folder, tiny_data)
    assert main(["search", "mixbin", str(recipe)]) == 0
    return recipe, folder / "run-mixbin"


def test_what_is_found_keeps_the_budget_and_says_how_it_was_found(undisturbed, capsys):
    recipe, folder = undisturbed
    pattern = read_pattern(folder / "pattern.json")
    config = load_recipe(recipe, [f"binary.pattern={folder / 'pattern.json'}"])
    model, swap = build_model(config.model, config.binary, image_size=32)
    assert {row.name for row in swap.rows if row.swapped} == set(pattern.binary)
    counts = count(model, input_size=(3, 32, 32))
    share = counts.ops / (counts.bops + counts.flops)
    assert share <= 0.81
    assert pattern.cost == pytest.approx(share, abs=1e-6)
    assert {"conv1", "fc"} & {*pattern.real, *pattern.binary} == set()
    rounds = pattern.found["rounds"]
    assert len(rounds) >= 2
    assert rounds[-1]["cost"] == pattern.cost
    assert "not public" in pattern.found["by"]
    assert (folder / "pattern.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for number, each in enumerate(rounds, start=1):
        place = folder / f"round_{number:03d}"
        assert len(list(place.glob("*.json"))) == each["candidates"] + 1
        assert round(read_outcome(place / f"{each['layer']}.json").accuracy, 4) == each["top1"]
    assert main(["summary", str(recipe), f"binary.pattern={folder / 'pattern.json'}"]) == 0
    assert "real by pattern" in capsys.readouterr().out


def test_a_finished_search_is_told_again_without_training(undisturbed, capsys, monkeypatch):
    recipe, folder = undisturbed
    _, before = made(folder)
    monkeypatch.setattr("cyclebnn_dist.search.mixbin.ShortTraining", None)
    assert main(["search", "mixbin", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "pattern.json").read_text())
    assert made(folder)[1] == before


def search_as_rank(rank, size, path):
    torch.set_num_threads(1)
    world = World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), source="environment")
    return search(load_recipe(path), world, worker=rank).layers


def test_killed_and_gone_on_with_by_two_ranks_it_equals_the_undisturbed_search(
    undisturbed, tiny_data, tmp_path, ranks
):
    recipe, folder = write_recipe(tmp_path, tiny_data), tmp_path / "run-mixbin"
    ended = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        have = len(list(folder.glob("round_*/*.json")))
        process = subprocess.Popen(
            [sys.executable, "-m", "cyclebnn_dist", "search", "mixbin", str(recipe)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert wait_until(lambda have=have: len(list(folder.glob("round_*/*.json"))) > have, seconds=120)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        ended.append((process.returncode, said))
    assert ended[0][0] == 75
    assert "the same command goes on" in ended[0][1]
    assert ended[1][0] == -signal.SIGKILL
    _, before = made(folder)
    assert len([name for name in before if name.endswith(".json") and "/." not in name]) >= 2
    expected = read_pattern(undisturbed[1] / "pattern.json").layers
    assert ranks(2, search_as_rank, recipe) == [expected, expected]
    contents, after = made(folder)
    finished = {name for name in before if ".partial" not in name}
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert contents == made(undisturbed[1])[0]
    assert (folder / "pattern.json").read_bytes() == (undisturbed[1] / "pattern.json").read_bytes()


def test_the_picture_says_in_which_rounds_a_layer_was_chosen(undisturbed):
    recipe, folder = undisturbed
    pattern, costs = read_pattern(folder / "pattern.json"), count_costs(load_recipe(recipe))
    told = dict(zip(costs.names, chosen_in(pattern, costs), strict=True))
    for number, each in enumerate(pattern.found["rounds"], start=1):
        assert str(number) in told[each["layer"]].split(", ")
    assert sum(len(text.split(", ")) for text in told.values() if text) == len(pattern.found["rounds"])


def test_candidates_start_alike_and_differ_in_one_layer(undisturbed):
    _, folder = undisturbed
    outcomes = {path.stem: read_outcome(path) for path in (folder / "round_001").glob("*.json")}
    assert len({outcome.loss for outcome in outcomes.values()}) == len(outcomes)
    keys = [set(read_weights(path)) for path in sorted(folder.glob("round_*/weights.safetensors"))]
    first = json.loads((folder / "pattern.json").read_text())["found"]["rounds"][0]["layer"]
    assert not any(".binarizer." in key for key in keys[0])
    assert {key.partition(".binarizer.")[0] for key in keys[1] - keys[0]} <= {first}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.budget=0.5"], r"search.budget: 0.5 is not possible.*choose from 0\.7\d+ to 1"),
        (["search.budget=1.5"], "search.budget: 1.5 is out of range"),
        (["search.steps=0"], "search.steps: 0 is out of range"),
        (["search.eval_images=60"], "search.eval_images: 60 of 80 training images"),
        (["model.num_classes=7"], "model.num_classes: 7, but"),
        (["model.weights=/none.safetensors"], "model.weights: there is no file"),
        (["search.batch_size=64"], "search.batch_size: 64 of 50 images left"),
        (["binary.method=none"], "binary.method: none leaves nothing to search"),
        (["binary.keep_stem=false"], "binary.keep_stem: false, but a search leaves"),
        (["binary.layers={fc: real}"], "binary.layers: is what a search is to find"),
        (["train.amp=fp16"], "train.amp: fp16 needs a loss scale"),
    ],
)
def test_what_cannot_be_searched_is_refused(overrides, words, tiny_data, tmp_path, capsys):
    recipe = write_recipe(tmp_path, tiny_data)
    assert main(["search", "mixbin", str(recipe), *overrides]) == 2
    assert re.search(words, capsys.readouterr().err, flags=re.DOTALL)
    assert not (tmp_path / "run-mixbin").exists(), "it would belong to the refused recipe"


def test_a_folder_belongs_to_one_search(undisturbed, tmp_path, capsys):
    recipe, folder = undisturbed
    assert main(["search", "mixbin", str(recipe), "search.budget=0.9", f"search.dir={folder}"]) == 2
    error = capsys.readouterr().err
    assert "search.budget: 0.81 -> 0.9" in error
    assert "search.dir" in error
    (tmp_path / "note.txt").write_text("mine")
    assert main(["search", "mixbin", str(recipe), f"search.dir={tmp_path}"]) == 2
    assert "is not the folder of a search" in capsys.readouterr().err


def test_a_search_holds_out_images_of_every_class_and_trains_with_the_others(tiny_data):
    whole = scan_folder(str(tiny_data), "train", num_classes=10)
    train, score = hold_out(whole, SearchConfig(eval_images=20, batch_size=16))
    assert (len(train), len(score)) == (60, 20)
    names = [[part.name(i) for i in range(len(part))] for part in (train, score)]
    assert sorted(names[0] + names[1]) == sorted(whole.name(i) for i in range(len(whole)))
    assert np.bincount(score.labels, minlength=10).tolist() == [2] * 10
    assert train.digest != score.digest != whole.digest
    for part in (train, score):
        index = part.name(5)
        assert whole.labels[[whole.name(i) for i in range(80)].index(index)] == part.labels[5]
        assert part.encoded(5) == Path(index).read_bytes()


class Shards:
    """Images whose classes take turns, as some shards hold them."""

    labels = np.arange(24) % 3
    shard_sizes = (10, 1, 13)
    digest = 1

    def __len__(self):
        return 24


def test_images_held_out_are_of_every_class_however_classes_lie_in_shards():
    train, score = hold_out(Shards(), SearchConfig(eval_images=8, batch_size=2))
    assert sorted(np.bincount(score.labels, minlength=3).tolist()) == [2, 3, 3]
    assert np.bincount(train.labels, minlength=3).min() >= 5


def test_parts_of_shards_know_how_many_images_each_shard_has_left():
    parts = hold_out(Shards(), SearchConfig(eval_images=8, batch_size=2))
    for part in parts:
        ids = part._ids.tolist()
        places = (range(10), range(10, 11), range(11, 24))
        assert list(part.shard_sizes) == [sum(i in place for i in ids) for place in places]
    together = [a + b for a, b in zip(*(part.shard_sizes for part in parts), strict=True)]
    assert together == list(Shards.shard_sizes)


def test_a_damaged_score_is_named(tmp_path):
    path = tmp_path / "score.json"
    write_outcome(Outcome(12.5, float("nan")), path)
    assert read_outcome(path) == Outcome(12.5, float("inf"))
    path.write_text('{"accuracy": 1')
    with pytest.raises(RecipeError, match=r"score\.json: is damaged"):
        read_outcome(path)


def test_what_fails_leaves_no_file_behind_and_can_be_made_again(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / ".locks").mkdir()

    def fail(path):
        path.write_text("half")
        raise RecipeError("data.path", "cannot read image")

    with pytest.raises(RecipeError):
        folder.make_all({"round_001/a.json": fail}, told=lambda done: None)
    assert list((tmp_path / "round_001").iterdir()) == []
    told = []
    folder.make_all({"round_001/a.json": lambda path: path.write_text("whole")}, told=told.append)
    assert (tmp_path / "round_001" / "a.json").read_text() == "whole"
    assert told == [0, 1]


@pytest.mark.parametrize("name", ["sample_bireal", "sample_adabin", "sample_bnext", "sample_reactnet"])
def test_a_paper_s_network_can_be_searched_from_either_end(name):
    """Networks differ in which layers are binary, and in nothing else: not in their shortcuts either."""
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    check_searchable(recipe)
    costs, reports = count_costs(recipe), []
    for binary in ((), costs.names[:1], costs.names):
        layers = {each: "binary" if each in binary else "real" for each in costs.names}
        rules = replace(recipe.binary, layers=layers)
        _, report = build_model(recipe.model, rules, image_size=recipe.data.image_size)
        reports.append((report.shortcuts, report.activations, report.narrow))
    assert reports[0] == reports[1] == reports[2]
    if recipe.binary.shortcut == "convolution":
        assert len(reports[0][0]) == len(costs.names) // 2


def test_of_two_who_made_the_same_file_the_first_counts(tmp_path):
    """A score that changed after others had read it would let processes choose different layers."""
    folder = Folder(tmp_path)
    (tmp_path / ".locks").mkdir()
    score = tmp_path / "round_001" / "a.json"

    def make_slowly(path):
        path.write_text("late")
        score.write_text("first")  # of a process on a machine whose locks are not seen here

    folder.make_all({"round_001/a.json": make_slowly}, told=lambda done: None)
    assert score.read_text() == "first"
    assert [path.name for path in score.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_time_and_nothing_else(number, tmp_path, monkeypatch, caplog):
    """Lustre says ENOSYS; a lock file that only its owner may remove would outlive a killed search."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".locks").mkdir()
    places = ["round_001/a.json", "round_001/b.json"]
    other = Folder(tmp_path)

    def make_while_another_does(path):
        path.write_text("one")
        other.make_all({places[0]: lambda path: path.write_text("two")}, told=lambda done: None)
        assert path.exists(), "it is at work on that"

    folder = Folder(tmp_path)
    makers = {places[0]: make_while_another_does, places[1]: lambda path: path.write_text("b")}
    folder.make_all(makers, told=lambda done: None)
    assert [(tmp_path / place).read_text() for place in places] == ["two", "b"]
    assert caplog.text.count("cannot be locked") == 2, "by each once"


def test_a_disk_that_is_full_or_may_only_be_read_is_named(undisturbed, tmp_path, capsys):
    with small_disk(tmp_path / "disk", megabytes=1) as path:
        (path / ".locks").mkdir()
        filling = fill(path)
        makers = {"round_001/weights.safetensors": partial(write_weights, {"a": torch.zeros(1 << 20)})}
        with pytest.raises(RecipeError, match=r"search\.dir: cannot write .*No space left.*\n.*free space"):
            Folder(path).make_all(makers, told=lambda done: None)
        filling.unlink()
        with pytest.raises(RecipeError, match="No space left"):
            Folder(path).make_all(makers, told=lambda done: None)
        assert list((path / "round_001").iterdir()) == []
    recipe, folder = undisturbed
    with read_only(folder):
        assert main(["search", "mixbin", str(recipe)]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_damaged_weights_are_named(tmp_path):
    path = tmp_path / "round_002" / "weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(
            RecipeError, match=r"weights\.safetensors: is damaged or gone.*\n.*delete round_002"
        ):
            read_weights(path)
        path.unlink(missing_ok=True)


def test_candidates_are_the_layers_the_rules_make_binary(tiny_data, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_data), ["binary.exclude=[layer4.*]"])
    assert count_costs(recipe).names == ("layer1.0.conv1", "layer1.0.conv2")
