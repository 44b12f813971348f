"""Without these, error feedback would lose gradient, be poisoned by one bad step, or be forgotten by a checkpoint."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.comm.layout import ParameterLayout
from cyclebnn_dist.comm.reshard import old_shares
from cyclebnn_dist.config.recipe import CommConfig

CPU = torch.device("cpu")
SHAPES = {"conv": (40, 27), "bias": (40,), "odd": (37, 53)}
WIDE = ("conv", "odd")
BITS = [2, 5, 1, 8, 16, 3, 32, 2]


def gradients_of(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_reducer(rank, n):
    named = [(name, torch.empty(shape)) for name, shape in SHAPES.items()]
    comm = CommConfig(block_size=64, error_feedback=True)
    return build_reducer(comm, named, rank=rank, world_size=n, seed=9, device=CPU)


def reduced(reducer, tensors, groups=(tuple(SHAPES),), *, step, bits, loss_scale=1.0):
    reducer.begin_step(step, bits, loss_scale=loss_scale)
    for names in groups:
        reducer.reduce({name: tensors[name] for name in names}, step=step, bits=bits).wait()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def repeat_one_gradient(rank, n, steps, bits):
    reducer = make_reducer(rank, n)
    results = [reduced(reducer, gradients_of(rank, 0), step=step, bits=bits) for step in range(steps)]
    reducer.close()
    return results


def hand_over_ahead(rank, n, *, waits):
    shapes = {f"g{i}": (30, 50) for i in range(60)}
    named = [(name, torch.empty(shape)) for name, shape in shapes.items()]
    comm = CommConfig(block_size=64, error_feedback=True)
    reducer = build_reducer(comm, named, rank=rank, world_size=n, seed=9, device=CPU)
    results = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        futures = [reducer.reduce({name: tensor}, step=step, bits=2) for name, tensor in tensors.items()]
        results.append((futures, tensors))
        for future in futures if waits else ():
            future.wait()
    for futures, _ in results:
        for future in futures:
            future.wait()
    reducer.finish_step()
    residuals = reducer.state_dict()["residuals"]["gradient"]
    reducer.close()
    return torch.cat([tensor.view(-1) for tensor in (*results[-1][1].values(), *residuals.values())])


def both_ways(rank, n):
    return torch.equal(hand_over_ahead(rank, n, waits=True), hand_over_ahead(rank, n, waits=False))


def test_a_step_begun_before_the_last_one_has_ended_gets_all_of_its_residuals(ranks):
    assert ranks(2, both_ways) == [True, True]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_one_step_loses_arrives_in_later_ones(ranks, bits):
    n, steps = 2, 24
    results = ranks(n, repeat_one_gradient, steps, bits)[0]
    for name in WIDE:
        mean = sum(gradients_of(rank, 0)[name] for rank in range(n)) / n

        def error(found, mean=mean):
            return float((found - mean).square().sum() / mean.square().sum())

        single = error(results[0][name])
        average = error(sum(result[name] for result in results) / steps)
        assert average < single / steps, (
            "without feedback it would be about single / steps for independent errors"
        )


def keep_feedback_over(rank, n, kind):
    """Results and final residuals of an undisturbed run and of one that is cut, saved, scaled or restored."""
    runs = []
    for disturbed in (False, True):
        reducer = make_reducer(rank, n)
        results = []
        for step, bits in enumerate(BITS):
            scale = 1024.0 if disturbed and kind == "loss scale" and step % 2 else 1.0
            groups = (("odd",), ("bias", "conv")) if disturbed and kind == "buckets" else (tuple(SHAPES),)
            tensors = {name: g * scale for name, g in gradients_of(rank, step).items()}
            result = reduced(reducer, tensors, groups, step=step, bits=bits, loss_scale=scale)
            results.append({name: g / scale for name, g in result.items()})
            if disturbed and kind == "restart" and step == 3:
                state = reducer.state_dict()
                reducer.close()
                reducer = make_reducer(rank, n)
                reducer.load_state_dict(state)
            if disturbed and kind == "saving":
                reducer.state_dict()
            if disturbed and kind == "bad step" and step == 3:
                bad = gradients_of(rank, 50)
                if rank == 0:
                    bad["odd"][3, 3] = float("nan")
                reduced(reducer, bad, (("conv",), ("odd", "bias")), step=50, bits=2)
        runs.append((results, reducer.state_dict()["residuals"]))
        reducer.close()
    return runs


@pytest.mark.parametrize("kind", ["loss scale", "buckets", "restart", "saving", "bad step"])
def test_residuals_survive(ranks, kind):
    for (reference, residuals), (results, disturbed) in ranks(3, keep_feedback_over, kind):
        for expected, found in zip(reference, results, strict=True):
            for name in SHAPES:
                assert torch.equal(expected[name], found[name])
        for phase in ("gradient", "mean"):
            assert list(residuals[phase]) == list(WIDE)
            for name in WIDE:
                assert torch.equal(residuals[phase][name], disturbed[phase][name])
                assert bool(torch.isfinite(disturbed[phase][name]).all())
        assert float(residuals["gradient"]["odd"].abs().max()) > 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_what_is_owed_to_the_mean_is_the_same_before_and_after_resharding(old_size, new_size):
    weights = [old_shares(old_size, new_size, rank) for rank in range(new_size)]
    assert all(sum(shares.values()) == 1 for shares in weights)
    for old in range(old_size):
        assert sum(shares.get(old, 0) for shares in weights) / new_size == Fraction(1, old_size)
    assert max(len(shares) for shares in weights) <= old_size // new_size + 2


def live_on(rank, n, lives, first_step):
    """Four steps in a world of ``n`` that goes on from the residuals of ``lives``; what was averaged, what it was of."""
    reducer = make_reducer(rank, n)
    if lives:
        reducer.reshard_residuals(len(lives), lambda old, phase: lives[old][phase])
    results, before = [], {kind: dict(errors) for kind, errors in reducer.state_dict()["residuals"].items()}
    before = {kind: {name: e.clone() for name, e in errors.items()} for kind, errors in before.items()}
    for step in range(first_step, first_step + 4):
        results.append(reduced(reducer, gradients_of(rank, step), step=step, bits=BITS[step % 3]))
    after = reducer.state_dict()["residuals"]
    reducer.close()
    return results, before, after


def owed(residuals, name):
    """What residuals of all ranks will add to an averaged gradient: fp64, flat."""
    n = len(residuals)
    gradient = sum(errors["gradient"][name].double() for errors in residuals) / n
    numel = gradient.numel()
    index = list(SHAPES).index(name)
    slices = [ParameterLayout(index, name, numel, False, 64, n).owned_elements(rank) for rank in range(n)]
    for part, errors in zip(slices, residuals, strict=True):
        gradient[part.start : part.stop] += errors["mean"][name].double()
    return gradient


def test_nothing_is_lost_from_four_ranks_to_two_to_four_to_three(ranks):
    """Over all lives: averaged gradients = true means + what was owed at the start (nothing) - what is owed at the end."""
    lives, arrived, true = [], dict.fromkeys(WIDE, 0.0), dict.fromkeys(WIDE, 0.0)
    for life, n in enumerate([4, 2, 4, 3]):
        outcomes = ranks(n, live_on, lives, 4 * life)
        if lives:
            for name in WIDE:
                before = owed([before for _, before, _ in outcomes], name)
                torch.testing.assert_close(before, owed(lives, name), rtol=1e-6, atol=1e-6)
                assert float(before.abs().max()) > 0.05
        lives = [after for *_, after in outcomes]
        for index, step in enumerate(range(4 * life, 4 * life + 4)):
            for name in WIDE:
                arrived[name] += outcomes[0][0][index][name].double().view(-1)
                true[name] += sum(gradients_of(rank, step)[name].double().view(-1) for rank in range(n)) / n
    for name in WIDE:
        torch.testing.assert_close(arrived[name] + owed(lives, name), true[name], rtol=1e-5, atol=2e-5)


def restore_of_other_ranks(rank, n):
    reducer = make_reducer(rank, n)
    state = reducer.state_dict()
    state["residuals"]["mean"]["odd"] = torch.zeros(5)
    try:
        reducer.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    finally:
        reducer.close()


def test_residuals_of_another_number_of_ranks_are_refused(ranks):
    assert "residual of odd (mean) has 5 elements" in ranks(2, restore_of_other_ranks)[0]
