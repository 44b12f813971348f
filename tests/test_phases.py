"""Without these a run in two phases would train or report other weights than it says, or a restart would change it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from equations import polynomial, random_tensor, signs, straight_through
from hypothesis import given
from hypothesis import strategies as st
from launching import TINY_RECIPE
from safetensors.torch import load_file
from test_train import evaluated, newest, run
from torch import nn
from torch.nn import functional
from worlds import make_world

from cyclebnn_dist.binary import (
    METHODS,
    BinaryConv2d,
    BinaryLinear,
    check_two_valued,
    set_progress,
    using_real_weights,
)
from cyclebnn_dist.checkpoint import best_checkpoint, read_meta
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import FirstPhaseConfig, OptimConfig, Recipe, TrainConfig
from cyclebnn_dist.evaluate import evaluate_checkpoint
from cyclebnn_dist.metrics import Totals, read_journal
from cyclebnn_dist.optimizer import learning_rate
from cyclebnn_dist.phases import build_phases
from cyclebnn_dist.precision.cost import training_saving
from cyclebnn_dist.precision.schedule import Widths


def phases_of(first, second, *, schedule="linear", warmup=0, restart=True):
    """Of ``first`` and ``second`` steps, an epoch each."""
    return build_phases(
        Recipe(
            train=TrainConfig(epochs=float(first + second)),
            optim=OptimConfig(lr=0.1, schedule=schedule, warmup_epochs=float(warmup)),
            first_phase=FirstPhaseConfig(epochs=float(first), lr=0.4, restart_optimizer=restart),
        ),
        total_steps=first + second,
        steps_per_epoch=1,
    )


@given(
    first=st.integers(1, 40),
    second=st.integers(1, 40),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.integers(0, 3),
    restart=st.booleans(),
)
def test_two_phases_are_two_runs_one_after_the_other(first, second, schedule, warmup, restart):
    phases = phases_of(first, second, schedule=schedule, warmup=warmup, restart=restart)
    moments = [phases.at(step) for step in range(first + second)]
    assert [moment.first_phase for moment in moments] == [True] * first + [False] * second
    assert [moment.progress for moment in moments] == [0.0] * first + [s / second for s in range(second)]
    assert [moment.restarts_optimizer for moment in moments] == [
        restart and step == first for step in range(first + second)
    ]
    expected = [
        learning_rate(step, config, total_steps=steps, steps_per_epoch=1)
        for lr, steps in ((0.4, first), (0.1, second))
        for config in [OptimConfig(lr=lr, schedule=schedule, warmup_epochs=float(warmup))]
        for step in range(steps)
    ]
    assert [moment.lr for moment in moments] == expected
    after = [phases.weights_after(step) for step in range(1, first + second + 1)]
    assert after == ["real"] * first + ["binary"] * second


@given(steps=st.integers(1, 50), warmup=st.integers(0, 3))
def test_a_run_without_a_first_phase_is_one_run(steps, warmup):
    phases = build_phases(
        Recipe(optim=OptimConfig(warmup_epochs=float(warmup))), total_steps=steps, steps_per_epoch=1
    )
    config = OptimConfig(warmup_epochs=float(warmup))
    for step in range(steps):
        rate = learning_rate(step, config, total_steps=steps, steps_per_epoch=1)
        assert phases.at(step) == (False, rate, step / steps, False)
        assert phases.weights_after(step) == "binary"


@pytest.mark.parametrize("epochs", [0.04, 9.96])
def test_a_phase_without_a_step_is_refused(epochs):
    recipe = Recipe(train=TrainConfig(epochs=10.0), first_phase=FirstPhaseConfig(epochs=epochs))
    with pytest.raises(RecipeError, match=r"first_phase\.epochs"):
        build_phases(recipe, total_steps=100, steps_per_epoch=10)


def input_signs(method, layer, x):
    if method == "reactnet":
        shifted = x + layer.binarizer.bias.view(-1, 1, 1)
        return straight_through(signs(shifted), polynomial(shifted))
    alpha, beta = layer.binarizer.alpha, layer.binarizer.beta
    scaled = (x - beta) / alpha
    return alpha * straight_through(signs(scaled), polynomial(scaled)) + beta


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["reactnet", "adabin"])
def test_the_first_phase_multiplies_binary_inputs_with_the_weights_themselves(method, training):
    real = nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    layer = BinaryConv2d.from_real(real, method=method).double().train(training)
    with torch.no_grad():
        for offset, parameter in enumerate(layer.binarizer.parameters()):
            parameter += 0.1 * random_tensor(*parameter.shape, seed=offset)
    set_progress(layer, 0.0, real_weights=True)
    x = random_tensor(3, 4, 9, 7, seed=5).requires_grad_()
    upstream = random_tensor(3, 6, 5, 4, seed=6)
    leaves = [x, *layer.parameters()]
    result = layer(x)
    expected = functional.conv2d(input_signs(method, layer, x), layer.weight, layer.bias, 2, 1)
    torch.testing.assert_close(result, expected)
    for found, right in zip(
        torch.autograd.grad(result, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_parameter_of_every_method_takes_part_in_the_first_phase(method):
    """DDP waits for the gradient of each; and no weight may pass the rule it is bypassing."""
    layer = BinaryLinear.from_real(nn.Linear(9, 5), method=method)
    before = layer.weight.detach().clone().mul_(100.0)
    with torch.no_grad():
        layer.weight.copy_(before)
    set_progress(layer, 0.0, real_weights=True)
    layer(torch.randn(4, 9)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad.count_nonzero() == layer.weight.numel()
    set_progress(layer, 0.0)
    check_two_valued(layer.eval())


def test_real_weights_do_not_pass_for_binary_ones():
    layer = BinaryLinear.from_real(nn.Linear(9, 5), method="reactnet")
    check_two_valued(layer)
    with using_real_weights(layer, True), pytest.raises(RuntimeError, match="5 of 5 filters"):
        check_two_valued(layer)
    check_two_valued(layer)


def test_steps_with_real_weights_save_no_operations_and_are_stored():
    class Counts:
        scheduled_macs, unscheduled_macs = 3, 1

    low = Widths(4, 8, 8)
    whole, half = (
        training_saving(Counts, {low: 10}, full_steps=full_steps).binary_layers for full_steps in (0, 10)
    )
    assert half == pytest.approx(whole / 2)
    totals, again = Totals(), Totals()
    for real in (True, True, False):
        totals.add_step(
            low,
            real_weights=real,
            images=1,
            seconds=1.0,
            data_seconds=0.0,
            agreement_seconds=0.0,
            skipped=False,
        )
    again.load_state_dict(json.loads(json.dumps(totals.state_dict())))
    assert (again.steps, again.real_weight_steps) == ({low: 3}, {low: 2})


TWO_PHASES = [
    "binary.method=reactnet",
    "binary.activation=rprelu",
    "optim.name=adam",
    "optim.binary_weight_decay=0",
    "optim.schedule=linear",
    "first_phase.epochs=1",
    "first_phase.lr=2e-3",
    "first_phase.binary_weight_decay=0.01",
    "run.keep_checkpoints=20",
]


def forget_all_after(folder, step):
    """What a kill in the step after ``step`` leaves of a run."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    for name in ("summary.json", "summary.txt"):
        (folder / name).unlink()


def test_a_run_is_killed_and_goes_on_across_the_border_and_says_which_weights_it_evaluates(
    ranks, tmp_path, tiny_data
):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    assert ranks(2, run, path, TWO_PHASES) == [0, 0]
    undisturbed = tmp_path / "run"
    expected = {file.name: load_file(file) for file in newest(undisturbed).glob("*.safetensors")}
    for step in (4, 5):
        killed = tmp_path / f"killed_{step}"
        shutil.copytree(undisturbed, killed)
        forget_all_after(killed, step)
        assert ranks(2, run, path, [*TWO_PHASES, f"run.dir={killed}"]) == [0, 0]
        assert newest(killed).name == "step_000000010"
        for name, tensors in expected.items():
            found = load_file(newest(killed) / name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(tensor, found[key]) for key, tensor in tensors.items()), (step, name)

    rows = [row for row in read_journal(undisturbed) if row["event"] == "eval"]
    assert [(row["step"], row["weights"]) for row in rows] == [(5, "real"), (10, "binary")]
    rates = [row["lr"] for row in read_journal(undisturbed) if row["event"] == "train"]
    assert rates == pytest.approx(
        [2e-3 * (1 - s / 5) for s in range(5)] + [1e-3 * (1 - s / 5) for s in range(5)]
    )
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["eval_weights"], summary["best_step"]) == ("binary", 10)
    assert summary["best_top1"] == rows[1]["top1"]
    folders = {step: undisturbed / "checkpoints" / f"step_{step:09d}" for step in (5, 6, 10)}
    assert best_checkpoint(undisturbed) == folders[10]
    assert [read_meta(folder)["weights"] for folder in folders.values()] == ["real", "binary", "binary"]
    assert ranks(1, evaluate_one, path, str(folders[5])) == [("real", rows[0]["top1"], rows[0]["ema_top1"])]
    (result, _), _ = ranks(2, evaluated, path, [])
    assert (result["weights"], result["top1"]) == ("binary", summary["eval_top1"])


def evaluate_one(rank, size, path, folder):
    result = evaluate_checkpoint(Path(folder), make_world(rank, size))
    return result["weights"], result["top1"], result["ema_top1"]
