"""Without these weights would be decayed or stepped by another rule than the recipe's."""

import copy
import math

import pytest
import torch
from torch import nn

from cyclebnn_dist import optimizer as optimizer_module
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import FirstPhaseConfig, OptimConfig
from cyclebnn_dist.optimizer import (
    build_optimizer,
    forget_updates,
    learning_rate,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    set_learning_rate,
    set_weight_decay,
)

OPTIMIZERS = ["sgd", "adam", "adamw", "lamb"]
KINDS = {"0.weight": "binary", "0.bias": "other", "1.weight": "real", "1.bias": "other"}


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_kind_of_parameter_has_its_own_decay_and_rate(name):
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.3, binary_weight_decay=0.2, binary_lr_scale=0.5)
    optimizer = build_optimizer(small_model(), config, kinds=KINDS)
    set_learning_rate(optimizer, 0.04)
    found = {name: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for name in g["names"]}
    assert found == {
        "0.weight": (0.2, 0.02),
        "1.weight": (0.3, 0.04),
        "0.bias": (0.0, 0.04),
        "1.bias": (0.0, 0.04),
    }


def settings(optimizer):
    return {name: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for name in g["names"]}


def test_norms_and_biases_can_decay_and_have_a_rate_too():
    """BNext decays everything but 4-D weights by 1e-3, and those by 1e-8."""
    config = OptimConfig(
        lr=0.1, weight_decay=1e-3, binary_weight_decay=1e-8, other_weight_decay=1e-3, other_lr_scale=0.5
    )
    optimizer = build_optimizer(small_model(), config, kinds=KINDS)
    set_learning_rate(optimizer, 0.1)
    assert settings(optimizer) == {
        "0.weight": (1e-8, 0.1),
        "1.weight": (1e-3, 0.1),
        "0.bias": (1e-3, 0.05),
        "1.bias": (1e-3, 0.05),
    }


def test_patterns_give_single_parameters_a_decay_of_their_own():
    """BNext's stem is real, and yet decays as binary weights do."""
    decays = {"1.w*": 1e-8, "1.*": 0.5}
    config = OptimConfig(lr=0.1, weight_decay=0.3, binary_weight_decay=0.2, weight_decay_of=decays)
    optimizer = build_optimizer(small_model(), config, kinds=KINDS)
    found = {name: decay for name, (decay, _) in settings(optimizer).items()}
    assert found == {"0.weight": 0.2, "0.bias": 0.0, "1.weight": 1e-8, "1.bias": 0.5}
    with pytest.raises(RecipeError, match=r"'2\.weight' matches no parameter"):
        build_optimizer(small_model(), OptimConfig(weight_decay_of={"2.weight": 0.0}), kinds=KINDS)


def test_adamw_steps_as_its_paper_says():
    model = small_model()
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, config, kinds=dict.fromkeys(KINDS, "real"))
    set_learning_rate(optimizer, 0.1)
    weight = model[1].weight
    gradients = [torch.randn(2, 3) for _ in range(3)]
    expected, m, v = weight.detach().double().clone(), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_makes_the_same_next_step(name):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()

    whole, config = small_model(), OptimConfig(name=name, lr=0.05)
    whole_optimizer = build_optimizer(whole, config, kinds=KINDS)
    set_learning_rate(whole_optimizer, 0.05)
    steps(whole, whole_optimizer, [1, 2])
    again = small_model(seed=9)
    again.load_state_dict(whole.state_dict())
    again_optimizer = build_optimizer(again, config, kinds=KINDS)
    set_learning_rate(again_optimizer, 0.05)
    load_optimizer_state_by_name(again_optimizer, copy.deepcopy(optimizer_state_by_name(whole_optimizer)))
    steps(whole, whole_optimizer, [3, 4])
    steps(again, again_optimizer, [3, 4])
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restarted_optimizer_steps_as_a_new_one(name):
    """Else moments of real weights would drive the first steps of binary ones."""
    config = OptimConfig(name=name, lr=0.05)
    gradients = torch.Generator().manual_seed(0)

    def step(model, optimizer, gradients):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    used = small_model()
    optimizer = build_optimizer(used, config, kinds=KINDS)
    set_learning_rate(optimizer, 0.05)
    drawn = [[torch.randn(p.shape, generator=gradients) for p in used.parameters()] for _ in range(6)]
    for each in drawn[:3]:
        step(used, optimizer, each)
    new = copy.deepcopy(used)
    new_optimizer = build_optimizer(new, config, kinds=KINDS)
    set_learning_rate(new_optimizer, 0.05)
    forget_updates(optimizer)
    for each in drawn[3:]:
        step(used, optimizer, each)
        step(new, new_optimizer, each)
    for a, b in zip(used.parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_phase_has_its_weight_decay():
    """ReActNet decays weights by 1e-5 while they are real and not at all once they are binary."""
    first = FirstPhaseConfig(epochs=1.0, binary_weight_decay=0.5, weight_decay_of={"1.bias": 0.25})
    config = OptimConfig(
        name="sgd",
        momentum=0.0,
        nesterov=False,
        lr=0.1,
        weight_decay=0.125,
        binary_weight_decay=0.0,
        other_weight_decay=0.0,
    )
    expected = {
        True: {"0.weight": 0.5, "1.weight": 0.125, "0.bias": 0.0, "1.bias": 0.25},
        False: {"0.weight": 0.0, "1.weight": 0.125, "0.bias": 0.0, "1.bias": 0.0},
    }
    model = small_model()
    optimizer = build_optimizer(model, config, kinds=KINDS, first_phase=first)
    set_learning_rate(optimizer, 0.1)
    for in_first in (True, False, True):
        set_weight_decay(optimizer, first_phase=in_first)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * expected[in_first][name]))
    bad = FirstPhaseConfig(epochs=1.0, weight_decay_of={"2.*": 0.0})
    with pytest.raises(RecipeError, match=r"first_phase\.weight_decay_of.*'2\.\*' matches no parameter"):
        build_optimizer(small_model(), config, kinds=KINDS, first_phase=bad)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_has_the_momentum_it_is_asked_for(nesterov):
    config = OptimConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.0)
    model = small_model()
    optimizer = build_optimizer(model, config, kinds=dict.fromkeys(KINDS, "real"))
    set_learning_rate(optimizer, 0.1)
    expected, velocity = model[0].weight.detach().clone(), 0.0
    for _ in range(3):
        gradient = torch.randn(3, 4)
        model[0].weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_warm_up_can_start_at_a_rate_of_its_own():
    """BNext: 5 epochs from 1e-5 to 1e-3, as timm's CosineLRScheduler with warmup_prefix has them at the beginning of each epoch."""
    config = OptimConfig(lr=1e-3, warmup_epochs=5.0, warmup_lr=1e-5, min_lr=1e-7)
    rates = [learning_rate(10 * epoch, config, total_steps=550, steps_per_epoch=10) for epoch in range(55)]
    warmup = [1e-5 + epoch * (1e-3 - 1e-5) / 5 for epoch in range(5)]
    cosine = [1e-7 + 0.5 * (1e-3 - 1e-7) * (1 + math.cos(math.pi * epoch / 50)) for epoch in range(50)]
    assert rates == pytest.approx(warmup + cosine)


def test_learning_rate_shapes():
    def rate(step, **keys):
        return learning_rate(step, OptimConfig(lr=2.0, **keys), total_steps=100, steps_per_epoch=10)

    assert [rate(s, warmup_epochs=1.0) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(10, warmup_epochs=1.0) == 2.0
    assert rate(50) == pytest.approx(1.0)
    assert rate(25, min_lr=0.5) == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 4)))
    assert rate(75, schedule="linear") == pytest.approx(0.5)
    assert [rate(s, schedule="step", milestones=(3.0, 6.0)) for s in (29, 30, 60)] == pytest.approx(
        [2, 0.2, 0.02]
    )
    assert rate(99, schedule="constant") == 2.0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("first_fused", [True, False])
def test_a_fused_optimizer_goes_on_from_another_ones_state_and_back(monkeypatch, name, first_fused):
    """GPUs take it, CPUs do not, and a run may move from one to the other."""

    def run(fused_of_steps):
        model, carried = small_model(), {}
        for step, fused in enumerate(fused_of_steps):
            monkeypatch.setattr(optimizer_module, "runs_fused", lambda *_, fused=fused: fused)
            optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1), kinds=KINDS)
            assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)
            set_learning_rate(optimizer, 0.1)
            load_optimizer_state_by_name(optimizer, carried)
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            carried = copy.deepcopy(optimizer_state_by_name(optimizer))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    found = run([first_fused, not first_fused, first_fused])
    torch.testing.assert_close(found, run([False, False, False]))


def test_a_cpu_runs_no_fused_optimizer_unasked():
    optimizer = build_optimizer(small_model(), OptimConfig(), kinds=KINDS)
    assert not any(group["fused"] for group in optimizer.param_groups)
