"""Recipes: what a user writes arrives typed and checked, and a mistake is answered with the key and the cure."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.config import (
    MAY_CHANGE,
    Recipe,
    RecipeError,
    WidthConfig,
    load_recipe,
    load_saved,
    recipe_digest,
    recipe_from_dict,
    render_reference,
    resume_differences,
    save_recipe,
    to_dict,
    validate,
)
from cyclebnn_dist.config.schema import flatten, leaves


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert len(str(caught.value).splitlines()) <= 3
    return caught.value


def changed(recipe: Recipe, **values: object) -> Recipe:
    """Return a recipe with dotted keys (written with __) changed."""
    for key, value in values.items():
        names = key.split("__")
        groups = [recipe]
        for name in names[:-1]:
            groups.append(getattr(groups[-1], name))
        new: object = value
        for group, name in zip(reversed(groups), reversed(names), strict=True):
            new = dataclasses.replace(group, **{name: new})
        recipe = new  # type: ignore[assignment]
    return recipe


def test_defaults_base_recipe_and_command_line_win_in_this_order(tmp_path):
    write(
        tmp_path, "optim: {lr: 0.1, name: sgd, momentum: 0.8}\nmodel: {kwargs: {drop_rate: 0.1}}", "base.yaml"
    )
    (tmp_path / "sub").mkdir()
    text = "base: ../base.yaml\noptim: {lr: 0.2, momentum: 0.7}\nmodel: {kwargs: {drop_path_rate: 0.2}}"
    path = write(tmp_path / "sub", text)
    recipe = load_recipe(path, ["optim.momentum=0.6", "precision.forward={low: 3}", "model.kwargs.depth=4"])
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.momentum) == ("sgd", 0.2, 0.6)
    assert recipe.optim.betas == (0.9, 0.999)
    assert (recipe.precision.forward.low, recipe.precision.forward.high) == (3, 6)
    assert recipe.model.kwargs == {"drop_rate": 0.1, "drop_path_rate": 0.2, "depth": 4}


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "# nothing\n")) == Recipe()
    assert load_recipe(write(tmp_path, "optim:\n")) == Recipe()


def test_values_refer_to_other_keys_wherever_those_were_set(tmp_path):
    path = write(tmp_path, "run: {dir: 'runs/${model.name}-${train.epochs}'}")
    assert load_recipe(path, ["model.name=resnet50", "train.epochs=3"]).run.dir == "runs/resnet50-3"


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1", 1.0), (".5", 0.5), ("'2e-4'", 2e-4)]
)
def test_numbers_are_numbers_however_they_are_written(tmp_path, written, value):
    for recipe in (
        load_recipe(write(tmp_path, f"optim: {{lr: {written}}}")),
        load_recipe(write(tmp_path, ""), [f"optim.lr={written}"]),
    ):
        assert recipe.optim.lr == value
        assert type(recipe.optim.lr) is float


def test_text_on_the_command_line_needs_no_quotes_against_yaml(tmp_path):
    path = write(tmp_path, "")
    for text in ("no", "off", "012", "1:30", "a: b", "1e-3", "", "{x"):
        assert load_recipe(path, [f"wandb.group={text}"]).wandb.group == text
    assert load_recipe(path, ["wandb.group='no'"]).wandb.group == "no"
    assert refused(write(tmp_path, "wandb: {group: no}")).cure.endswith("put it in quotes")


@pytest.mark.parametrize(
    ("override", "key", "part"),
    [
        ("optim.lrr=1", "optim.lrr", "did you mean optim.lr?"),
        ("epochs=3", "epochs", "did you mean train.epochs or first_phase.epochs?"),
        ("optim.learning_rate=3", "optim.learning_rate", "optim has: name, lr,"),
        ("optimizer.lr=1", "optimizer.lr", "did you mean optim.lr?"),
        ("optim.lr", "optim.lr", "key=value"),
        ("=3", "=3", "key=value"),
        ("optim.lr=", "optim.lr", "has no value"),
        ("optim.lr=fast", "optim.lr", "'fast' is not a number"),
        ("optim.lr=.inf", "optim.lr", "finite"),
        ("optim.lr=true", "optim.lr", "true is not a number"),
        ("data.threads=true", "data.threads", "true is not an integer"),
        ("data.threads=2.0", "data.threads", "whole number"),
        ("data.threads=4x", "data.threads", "'4x' is not an integer"),
        ("model.compile=1", "model.compile", "true or false"),
        ("binary.method=cyclebn", "binary.method", "did you mean cyclebnn?"),
        ("comm.small_bits=8", "comm.small_bits", "16, 32"),
        ("data.scale=[0.1]", "data.scale", "list of 2 numbers"),
        ("data.mean=[0.1, a, 2]", "data.mean[1]", "'a' is not a number"),
        ("binary.exclude=layer4", "binary.exclude", "in brackets"),
        ("optim.milestones={a: 1}", "optim.milestones", "in brackets"),
        ("engine.bucket_mb=1e300", "engine.bucket_mb", "at most"),
        ("engine.deepspeed=[log_level]", "engine.deepspeed", "is not a mapping"),
        ("precision.forward=4", "precision.forward", "low, high"),
        ("precision={forward: {hihg: 4}}", "precision.forward.hihg", "precision.forward.high"),
        ("binary.include=[*]", "binary.include", "YAML"),
        ("run.dir=${nowhere.x}", "run.dir", "nowhere.x"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_its_cure(tmp_path, override, key, part):
    error = refused(write(tmp_path, ""), override)
    assert error.key == key
    assert part in str(error)
    assert "command line" in str(error)


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("optim: {lrr: 1}", "optim.lrr", "did you mean optim.lr?"),
        ("optim.lr: 1", "optim.lr", "nested: optim: {lr: ...}"),
        ("optim: 3", "optim", "group of keys"),
        ("optim: {1: 3}", "optim.1", "unknown key"),
        ("train: {epochs: many}", "train.epochs", "'many' is not a number"),
        ("comm: {block_size: 100}", "comm.block_size", "power of two"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, key, part):
    write(tmp_path, text, "base.yaml")
    path = write(tmp_path, "base: base.yaml\nrun: {seed: 1}")
    error = refused(path)
    assert error.key == key
    assert part in str(error)
    assert error.file == str(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a", "not a mapping"),
        ("{a: ", "not valid YAML"),
        ("optim: {lr: 1, lr: 2}", "duplicate key"),
        ("a: b: c", "not valid YAML"),
        ("\t", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_without_a_traceback(tmp_path, text, part):
    path = write(tmp_path, text)
    assert part in str(refused(path))
    assert str(path) in str(refused(path))


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such file" in str(refused(tmp_path / "nothing.yaml"))
    assert "folder" in str(refused(tmp_path))
    assert "base" in refused(write(tmp_path, "base: nothing.yaml")).key
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not valid YAML" in str(refused(tmp_path / "bytes.yaml"))


def test_recipes_that_inherit_in_a_circle_are_refused_not_followed(tmp_path):
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: ./a.yaml", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in str(refused(tmp_path / "a.yaml"))


PIECES = ["precision.forward.schedule=piecewise", "precision.forward.pieces=[[0, 6], [30.5, 2]]"]


def test_pieces_are_read_saved_and_told(tmp_path):
    recipe = load_recipe(write(tmp_path, ""), PIECES)
    assert recipe.precision.forward.pieces == ((0.0, 6), (30.5, 2))
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_saved(tmp_path / "saved.yaml") == recipe
    assert "list of [number, integer] pairs" in render_reference()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.global_batch_size=0"], "train.global_batch_size"),
        (["train.global_batch_size=6", "train.accumulation=4"], "train.accumulation"),
        (["train.epochs=0"], "train.epochs"),
        (["train.label_smoothing=1"], "train.label_smoothing"),
        (["loss.kurtosis_weight=-1"], "loss.kurtosis_weight"),
        (["loss.kurtosis_target=0.9"], "loss.kurtosis_target"),
        (["optim.other_weight_decay=-1"], "optim.other_weight_decay"),
        (['optim.weight_decay_of={"conv1.*": -1}'], "optim.weight_decay_of.conv1.*"),
        (["binary.keep_stem=false", "binary.keep_deep_stem=true"], "binary.keep_deep_stem"),
        (['binary.methods={"layer4.*": bnm}'], "binary.methods.layer4.*"),
        (["train.clip_norm=-1"], "train.clip_norm"),
        (["train.ema_decay=1"], "train.ema_decay"),
        (["run.keep_checkpoints=0"], "run.keep_checkpoints"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas"),
        (["optim.warmup_epochs=90"], "optim.warmup_epochs"),
        (["optim.min_lr=1"], "optim.min_lr"),
        (["optim.schedule=step", "optim.milestones=[3, 2]"], "optim.milestones"),
        (["optim.schedule=step", "train.epochs=10"], "optim.milestones"),
        (["optim.name=sgd", "optim.momentum=0"], "optim.momentum"),
        (["optim.warmup_lr=1e-5"], "optim.warmup_lr"),
        (["optim.warmup_epochs=5", "optim.warmup_lr=-1"], "optim.warmup_lr"),
        (["first_phase.epochs=-1"], "first_phase.epochs"),
        (["first_phase.epochs=90"], "first_phase.epochs"),
        (["first_phase.epochs=9", "binary.method=none"], "first_phase.epochs"),
        (["first_phase.lr=0.1"], "first_phase.lr"),
        (["first_phase.restart_optimizer=false"], "first_phase.restart_optimizer"),
        (["first_phase.epochs=9", "first_phase.lr=0"], "first_phase.lr"),
        (["first_phase.epochs=9", "first_phase.other_weight_decay=-1"], "first_phase.other_weight_decay"),
        (
            ["first_phase.epochs=9", 'first_phase.weight_decay_of={"fc.*": -1}'],
            "first_phase.weight_decay_of.fc.*",
        ),
        (["first_phase.epochs=5", "optim.warmup_epochs=5"], "optim.warmup_epochs"),
        (["first_phase.epochs=85", "optim.warmup_epochs=5"], "optim.warmup_epochs"),
        (["first_phase.epochs=50", "optim.schedule=step"], "optim.milestones"),
        (["first_phase.epochs=9", "first_phase.lr=1e-4", "optim.min_lr=5e-4"], "optim.min_lr"),
        (["data.scale=[1, 0.5]"], "data.scale"),
        (["data.ratio=[0, 1]"], "data.ratio"),
        (["data.crop_pct=1.1"], "data.crop_pct"),
        (["data.std=[1, 1, 0]"], "data.std"),
        (["comm.block_size=8"], "comm.block_size"),
        (["comm.block_size=131072"], "comm.block_size"),
        (["precision.forward.low=1"], "precision.forward.low"),
        (["precision.forward.low=7"], "precision.forward.low"),
        (["precision.forward.high=33"], "precision.forward.high"),
        (["precision.forward.high=32"], "precision.forward.high"),
        (["precision.communication.high=12"], "precision.communication.high"),
        (["precision.communication.high=16"], "precision.communication.high"),
        (["precision.communication.low=0"], "precision.communication.low"),
        (["precision.communication.cycles=0"], "precision.communication.cycles"),
        (["precision.communication.warmup_epochs=90"], "precision.communication.warmup_epochs"),
        (["precision.forward.schedule=triangular"], "precision.forward.schedule"),
        (["precision.forward.schedule=piecewise"], "precision.forward.pieces"),
        (["precision.forward.pieces=[[0, 4]]"], "precision.forward.pieces"),
        ([*PIECES, "precision.forward.pieces=[[1, 4]]"], "precision.forward.pieces"),
        ([*PIECES, "precision.forward.pieces=[[0, 4], [9, 3], [5, 4]]"], "precision.forward.pieces"),
        ([*PIECES, "precision.forward.pieces=[[0, 4], [90, 3]]"], "precision.forward.pieces"),
        (
            [*PIECES, "precision.forward.pieces=[[0, 1]]", "precision.forward.low=2"],
            "precision.forward.pieces",
        ),
        ([*PIECES, "precision.forward.pieces=[[0, 7]]"], "precision.forward.pieces"),
        ([*PIECES, "precision.forward.pieces=[[0, 4.5]]"], "precision.forward.pieces[0][1]"),
        ([*PIECES, "precision.forward.pieces=[[0, 4, 5]]"], "precision.forward.pieces[0]"),
        ([*PIECES, "precision.forward.warmup_epochs=1"], "precision.forward.warmup_epochs"),
        (["model.pretrained=true", "model.weights=w.safetensors"], "model.weights"),
        (["distill.assistants=[resnet18]"], "distill.assistants"),
        (["distill.label_loss=1"], "distill.label_loss"),
        (["distill.weights={a: b}"], "distill.weights"),
        (["distill.teacher=resnet18", "distill.weights={resnet34: w}"], "distill.weights.resnet34"),
        (["distill.teacher=resnet18", "distill.weights={resnet18: ''}"], "distill.weights.resnet18"),
        (["distill.teacher=resnet18", "distill.assistants=['']"], "distill.assistants"),
        (["distill.teacher=resnet18", "distill.temperature=0"], "distill.temperature"),
        (["distill.teacher=resnet18", "distill.label_loss=-1"], "distill.label_loss"),
        (["distill.teacher=resnet18", "train.label_smoothing=0.1"], "train.label_smoothing"),
        (["model.kwargs.num_classes=3"], "model.kwargs.num_classes"),
        (["eval.forward_bits=1"], "eval.forward_bits"),
        (["run.dir="], "run.dir"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_starts(tmp_path, overrides, key):
    error = refused(write(tmp_path, ""), *overrides)
    assert error.key == key
    assert error.file == "the command line"


@pytest.mark.parametrize(
    "width",
    [
        WidthConfig(low=1, high=8),
        WidthConfig(low=4, high=4),
        WidthConfig(low=32, high=32),
        WidthConfig(schedule="constant", low=2, high=16),
        WidthConfig(schedule="piecewise", low=1, high=16, pieces=((0.0, 16), (1.0, 8), (2.0, 1))),
    ],
)
def test_every_width_the_reducer_has_is_accepted(width):
    validate(changed(Recipe(), precision__communication=width))


def test_the_defaults_are_valid():
    validate(Recipe())


plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: "${" not in text
)


@pytest.mark.parametrize("change", [{"wandb__tags": ("a", "${b")}, {"model__kwargs": {"${b": 1}}])
def test_text_that_would_be_a_reference_once_saved_is_refused(change):
    with pytest.raises(RecipeError, match=next(iter(change)).replace("__", ".")):
        validate(changed(Recipe(), **change))


@given(
    lr=st.floats(1e-12, 1e6),
    group=plain_text,
    tags=st.lists(plain_text, max_size=3).map(tuple),
    kwargs=st.dictionaries(plain_text, st.none() | st.booleans() | st.integers() | plain_text, max_size=3),
    pretrained=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_saved_recipe_comes_back_equal_whatever_text_and_numbers_it_holds(
    tmp_path_factory, lr, group, tags, kwargs, pretrained
):
    path = tmp_path_factory.mktemp("saved") / "recipe.yaml"
    recipe = changed(
        Recipe(),
        optim__lr=lr,
        wandb__group=group,
        wandb__tags=tags,
        model__kwargs=kwargs,
        model__pretrained=pretrained,
    )
    save_recipe(recipe, path)
    assert load_saved(path) == recipe
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert os.listdir(path.parent) == ["recipe.yaml"]


def test_a_kill_while_saving_leaves_the_recipe_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    save_recipe(Recipe(), path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_recipe(changed(Recipe(), run__seed=5), path)
    assert load_saved(path) == Recipe()
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_the_digest_is_the_same_in_every_process_and_sees_only_what_trains(tmp_path):
    digest = recipe_digest(Recipe())
    code = "from cyclebnn_dist.config import *; print(recipe_digest(Recipe()))"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert int(other.stdout) == digest
    assert 0 <= digest < 2**63
    assert recipe_digest(changed(Recipe(), run__dir="elsewhere", data__threads=9, wandb__group="g")) == digest
    assert recipe_digest(changed(Recipe(), train__epochs=90)) == digest, "an integer means the same number"
    assert recipe_digest(changed(Recipe(), optim__lr=0.01)) != digest
    assert recipe_digest(changed(Recipe(), model__kwargs={"drop_rate": 0.1})) != digest


def test_paths_threads_and_logging_may_change_on_resume():
    new = changed(Recipe(), data__path="/other", data__threads=7, run__log_every=3, wandb__mode="offline")
    assert resume_differences(Recipe(), new) == {
        "data.path": ("sample_data", "/other"),
        "data.threads": (2, 7),
        "run.log_every": (10, 3),
        "wandb.mode": ("auto", "offline"),
    }


def test_every_other_change_on_resume_is_refused_by_name():
    new = changed(Recipe(), optim__lr=0.5, precision__forward__high=4, data__path="/other")
    with pytest.raises(RecipeError) as caught:
        resume_differences(Recipe(), new)
    for part in ("optim.lr: 0.001 -> 0.5", "precision.forward.high: 6 -> 4", "run.dir"):
        assert part in str(caught.value)
    assert "data.path" not in str(caught.value)


def test_another_length_needs_the_flag_that_says_so():
    longer = changed(Recipe(), train__epochs=100.0)
    with pytest.raises(RecipeError, match=r"run\.extend_epochs=true"):
        resume_differences(Recipe(), longer)
    allowed = resume_differences(Recipe(), changed(longer, run__extend_epochs=True))
    assert allowed["train.epochs"] == (90.0, 100.0)


def test_the_keys_that_may_change_exist():
    assert set(flatten(Recipe())) >= MAY_CHANGE


def test_every_field_is_explained_in_both_forms_of_the_reference():
    text, markdown = render_reference(), render_reference("markdown")
    for leaf in leaves(Recipe):
        assert leaf.doc, f"{leaf.key} has no docstring under it"
        assert f"\n  {leaf.key} = " in text
        assert f"\n| `{leaf.key}` | " in markdown
    assert "one of none, bnn" in text
    assert "CycleBNN" in text
    assert all(line.count(" | ") == 3 for line in markdown.splitlines() if line.startswith("| `"))


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("run.dir=runs/50%t", "run.dir", "percent"),
        ("wandb.project=team/project", "wandb.project", "refuses"),
        ("data.path=???", "data.path", "has no value"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(tmp_path, override, key, words):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {seed: 1}\n")
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path, [override])
    assert caught.value.key == key


def test_a_base_may_leave_a_key_open_for_those_that_inherit_from_it(tmp_path):
    (tmp_path / "base.yaml").write_text('data: {path: "???"}\n')
    (tmp_path / "filled.yaml").write_text("base: base.yaml\ndata: {path: images}\n")
    assert load_recipe(tmp_path / "filled.yaml").data.path == "images"
    with pytest.raises(RecipeError, match="has no value"):
        load_recipe(tmp_path / "base.yaml")


def test_the_compiler_and_small_buckets_do_not_go_together(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {compile: true}\nengine: {bucket_mb: 0.5}\n")
    with pytest.raises(RecipeError, match="below 1"):
        load_recipe(path)


def test_a_run_may_be_made_longer_but_not_shorter():
    saved = replace(Recipe(), train=replace(Recipe().train, epochs=10.0))
    for epochs, allowed in ((12.0, True), (8.0, False)):
        new = replace(
            saved, train=replace(saved.train, epochs=epochs), run=replace(saved.run, extend_epochs=True)
        )
        if allowed:
            assert resume_differences(saved, new)["train.epochs"] == (10.0, 12.0)
        else:
            with pytest.raises(RecipeError, match=r"10\.0 -> 8\.0"):
                resume_differences(saved, new)


def test_globs_as_keys_come_back_from_the_run_folder(tmp_path):
    """A dot in a key must not be taken for a level of the recipe."""
    path = write(tmp_path, "binary: {methods: {layer4.*: bireal}}\noptim: {weight_decay_of: {conv1.*: 1e-8}}")
    recipe = load_recipe(path)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_saved(tmp_path / "saved.yaml") == recipe
    assert recipe.binary.methods == {"layer4.*": "bireal"}
    assert recipe.optim.weight_decay_of == {"conv1.*": 1e-8}
