"""Runs with teachers. Without these a restart would teach something else, or ranks would learn from different teachers."""

import json
import logging

import pytest
import torch
from launching import TINY_RECIPE
from safetensors.torch import load_file, save_file
from test_teachers import CONVNEXT, EFFICIENTNET, network
from test_train import newest, run, stop_at

from cyclebnn_dist.guards.exit_status import PREEMPTED
from cyclebnn_dist.metrics import read_journal

TEACHERS = f"distill: {{teacher: {EFFICIENTNET}, assistants: [{CONVNEXT}, test_resnet], amp: fp32"


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    """10 steps; the second assistant takes over at step 5."""
    weights = {
        name: str(tmp_path / f"{name}.safetensors") for name in (CONVNEXT, EFFICIENTNET, "test_resnet")
    }
    for name, path in weights.items():
        save_file(network(name).state_dict(), path)
    path = tmp_path / "tiny.yaml"
    tiny = TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data)
    path.write_text(f"{tiny}{TEACHERS}, weights: {json.dumps(weights)}}}\n")
    return path


@pytest.fixture
def one_teacher(recipe_file):
    """The recipe without assistants; whose weights are the command line's to tell."""
    text = recipe_file.read_text().partition("distill:")[0]
    recipe_file.write_text(f"{text}distill: {{teacher: {EFFICIENTNET}}}\n")
    return recipe_file


def states(run_dir):
    return {path.name: load_file(path) for path in newest(run_dir).glob("*.safetensors")}


def test_a_run_stopped_before_and_behind_a_change_of_teachers_equals_the_undisturbed_one(ranks, recipe_file):
    undisturbed, stopped = recipe_file.parent / "undisturbed", recipe_file.parent / "run"
    assert ranks(2, run, recipe_file, [f"run.dir={undisturbed}"]) == [0, 0]
    for steps in (3, 3):
        assert ranks(2, stop_at, recipe_file, steps) == [PREEMPTED] * 2
    assert ranks(2, run, recipe_file, []) == [0, 0]
    expected, found = states(undisturbed), states(stopped)
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, found[file][key]), f"{file}: {key}"
    rows, again = (
        [row for row in read_journal(folder) if row["event"] == "train"] for folder in (undisturbed, stopped)
    )
    start, *_ = read_journal(stopped)
    assert [text.split()[0] for text in start["teachers"].split(", ")] == [
        CONVNEXT,
        "test_resnet",
        EFFICIENTNET,
    ]
    assert [row["assistant"] for row in rows] == [0] * 5 + [1] * 5
    for row, other in zip(rows, again, strict=True):
        for name in ("step", "assistant", "loss", "teacher_loss", "assistant_loss"):
            assert row[name] == other[name]
        assert 0.5 * min(row["teacher_loss"], row["assistant_loss"]) < row["loss"] < row["teacher_loss"]
        assert "label_loss" not in row


def run_with_own_file(rank, size, path):
    """As ``run``; rank 1 finds other weights of the teacher, where its machine has them."""
    own = path.with_name(f"of_rank_{rank}.safetensors")
    save_file(network(EFFICIENTNET, seed=rank).state_dict(), own)
    try:
        return run(rank, size, path, [f"distill.weights={{{EFFICIENTNET}: {own}}}"])
    except RuntimeError as error:
        return str(error)


def test_ranks_with_other_teachers_stop_before_the_first_step(ranks, one_teacher):
    answers = ranks(2, run_with_own_file, one_teacher)
    assert answers[0] == answers[1]
    assert "ranks disagree in teachers" in answers[0]
    assert not (one_teacher.parent / "run" / "recipe.yaml").exists()


def run_without_a_file(rank, size, path):
    if rank == 1:
        file = path.with_name("absent.safetensors")
    else:
        file = path.with_name(f"{EFFICIENTNET}.safetensors")
    return run(rank, size, path, [f"distill.weights={{{EFFICIENTNET}: {file}}}"])


def test_a_teacher_that_one_rank_has_not_ends_all_with_its_refusal(ranks, one_teacher):
    answers = ranks(2, run_without_a_file, one_teacher)
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"distill.weights.{EFFICIENTNET}: there is no file")
    assert not (one_teacher.parent / "run" / "recipe.yaml").exists()


def warnings_of_a_run(rank, size, path):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("cyclebnn_dist.resume").addHandler(handler)
    assert run(rank, size, path, []) == 0
    return "\n".join(records)


def test_other_weights_of_a_teacher_at_a_restart_are_told(ranks, recipe_file):
    assert ranks(2, stop_at, recipe_file, 2) == [PREEMPTED] * 2
    save_file(
        network(EFFICIENTNET, seed=9).state_dict(), recipe_file.with_name(f"{EFFICIENTNET}.safetensors")
    )
    (told,) = ranks(1, warnings_of_a_run, recipe_file)
    assert "teachers have other weights than before" in told
