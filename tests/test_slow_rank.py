"""Without these nobody would find the node that all others wait for."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import torch
from launching import TINY_RECIPE
from worlds import make_world

from cyclebnn_dist import loop, train
from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.data import TrainLoader
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.metrics import SlowRankReport, read_journal, slow_rank
from cyclebnn_dist.metrics.slow_rank import find_slowest

HOSTS = ("node1", "node1", "node2")


def slowed(rank, size, path, what):
    """Train with rank 2 really slowed in one part of its steps; the warnings of this rank."""
    torch.set_num_threads(1)
    module, name = {
        "computing": (DDPEngine, "forward"),
        "data": (TrainLoader, "next"),
        "none": (loop, "digest"),
    }[what]
    function, warnings = getattr(module, name), []

    def slow(*args, **kwargs):
        time.sleep(1.0 if rank == 2 and what != "none" else 0.0)
        return function(*args, **kwargs)

    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    slow_rank.log.addHandler(handler)
    setattr(module, name, slow)
    least, slow_rank.LEAST_STEPS = slow_rank.LEAST_STEPS, 3  # a second's delay is no chance
    world = replace(make_world(rank, size), hosts=HOSTS)
    try:
        overrides = ["wandb.mode=disabled", "train.global_batch_size=15", "train.epochs=1"]
        return train.run_recipe(load_recipe(path, overrides), world), warnings
    finally:
        setattr(module, name, function)
        slow_rank.LEAST_STEPS = least
        slow_rank.log.removeHandler(handler)


@pytest.mark.parametrize(
    ("what", "cause", "share"), [("computing", "computing", 0), ("data", "waiting for images", 1)]
)
def test_the_rank_that_all_wait_for_is_named_with_its_host_and_cause(
    ranks, tmp_path, tiny_data, what, cause, share
):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    outcomes = ranks(3, slowed, path, what)
    assert [status for status, _ in outcomes] == [0, 0, 0]
    rows = [row for row in read_journal(tmp_path / "run") if row["event"] == "train"]
    assert len(rows) == 5
    assert not any("slowest_rank" in row for row in rows[:2])
    for row in rows[2:]:
        assert row["slowest_rank"] == 2
        assert row["slowest_rank_ratio"] > 1.2
        assert abs(row["slowest_rank_data_share"] - share) < 0.5
    warnings = outcomes[0][1]
    assert 1 <= len(warnings) <= 2
    assert "rank 2 on node2 is slow" in warnings[-1]
    assert f"what takes longer is {cause}" in warnings[-1]
    assert [said for _, said in outcomes[1:]] == [[], []]


def reported(monkeypatch, windows, *, hosts):
    """Warnings about windows of every rank's own seconds, as rank 0 would give them."""
    seen, warnings = iter(windows), []

    def gathered(world, own):
        assert own == (1.0, 0.0)
        return [(seconds, 0.0) for seconds in next(seen)]

    monkeypatch.setattr(slow_rank, "gather_objects", gathered)
    monkeypatch.setattr(slow_rank.log, "warning", lambda text, *values: warnings.append(text % values))
    world = train.World(0, len(hosts), 0, torch.device("cpu"), "test", hosts=hosts)
    report = SlowRankReport(world)
    told = []
    for _ in range(slow_rank.FIRST_STEPS):
        report.add(own_seconds=100.0, data_seconds=0.0)
    assert report.report() == {}
    for _ in windows:
        for _ in range(10):
            report.add(own_seconds=1.0, data_seconds=0.0)
        report.report()
        told.append(len(warnings))
    return told, warnings


def test_a_warning_takes_three_windows_and_comes_ever_more_seldom(monkeypatch):
    told, warnings = reported(monkeypatch, [[1.0, 2.0, 1.0]] * 24, hosts=("a", "b", "c"))
    assert [told.index(n) + 1 for n in (1, 2, 3, 4)] == [3, 6, 12, 24]
    assert "2.00 times the median, in each of the last 24 reports (240 steps)" in warnings[-1]


@pytest.mark.parametrize(
    ("windows", "hosts", "named"),
    [
        ([[1.0, 1.1, 1.0]] * 9, ("a", "b", "c"), None),
        ([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]] * 5, ("a", "b", "c"), None),
        (
            [[1.0, 1.0, 1.0, 2.0, 1.9], [1.0, 1.0, 1.0, 1.9, 2.0]] * 2,
            ("a", "b", "c", "d", "d"),
            "rank 3 on d",
        ),
        ([[1.0, 2.0], [2.0, 1.0]] * 5, ("a", "a"), None),
        ([[1.0, 1.5]] * 3, ("a", "b"), "rank 1 on b"),
    ],
    ids=["little", "by turns", "two of a node by turns", "by turns on one machine", "one of two"],
)
def test_what_comes_and_goes_is_not_warned_of(monkeypatch, windows, hosts, named):
    _, warnings = reported(monkeypatch, windows, hosts=hosts)
    assert (named is None) == (warnings == [])
    assert all(f"{named} is slow" in warning for warning in warnings)


def test_the_cause_is_what_exceeds_the_median_most():
    slowest = find_slowest([1.0, 1.0, 3.0], [0.5, 0.5, 2.0])
    assert (slowest.rank, slowest.ratio) == (2, 3.0)
    assert slowest.data_share == pytest.approx(1.5 / 2.0)
    assert find_slowest([1.0], [0.2]).data_share == 0.0
