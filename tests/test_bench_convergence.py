"""`cyclebnn bench convergence`: pairs are pairs, its intervals are Student's, and no finished run is lost or made up."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import wait_until

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench import convergence
from cyclebnn_dist.bench.convergence import bench_convergence
from cyclebnn_dist.bench.convergence_data import CLASSES, SIDE, ImageSet, make_sets
from cyclebnn_dist.bench.convergence_journal import append_run, open_journal, read_runs
from cyclebnn_dist.bench.convergence_net import build_net
from cyclebnn_dist.bench.convergence_plot import plot_convergence
from cyclebnn_dist.bench.convergence_rounds import draw_order
from cyclebnn_dist.bench.convergence_run import batches, rank_batches, rate_at
from cyclebnn_dist.bench.convergence_summary import summarize
from cyclebnn_dist.bench.convergence_text import render_convergence
from cyclebnn_dist.bench.convergence_variants import CLAIMED, all_variants, choose_variants
from cyclebnn_dist.bench.student import mean_interval, t_quantile
from cyclebnn_dist.config import RecipeError

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 12, "num_train": 512, "num_test": 600}


def keys_of(journal):
    """(set, variant, seed) of the runs in a file, in order, by json alone."""
    first, *rows = map(json.loads, journal.read_text().splitlines())
    assert set(first) == {"experiment"}
    return [(row["set"], row["variant"], row["seed"]) for row in rows]


def test_real_runs_are_paired_by_seed_and_never_done_twice(tmp_path, monkeypatch):
    journal = tmp_path / "runs.jsonl"
    asked = {"seeds": 2, "variants": ["q2_ef", "cycle"], "out": journal, **SMALL}
    result = bench_convergence(**asked)
    keys = keys_of(journal)
    assert sorted(keys) == sorted(
        ("shapes", variant, seed) for variant in ("fp32", "q2_ef", "cycle") for seed in range(2)
    )
    assert {seed for _, _, seed in keys[:3]} == {0}  # pairs are complete as early as can be
    rows = {row["variant"]: row for row in result["variants"]}
    assert [*rows] == ["fp32", "cycle", "q2_ef"]
    assert [(rows[name]["low_bits"], rows[name]["high_bits"]) for name in rows] == [(32, 32), (2, 8), (2, 2)]
    assert [rows[name]["error_feedback"] for name in rows] == [False, False, True]
    assert 2 < rows["cycle"]["mean_bits"] < 8
    assert result["wide_share"] > 0.95
    assert (result["runs"], result["asked_runs"], result["stopped"]) == (6, 6, "")
    numel = result["parameters"]
    assert rows["fp32"]["sent_bytes"] == pytest.approx(12 * 4 * numel, rel=0.01)  # 2 (N - 1) / N = 1
    assert rows["q2_ef"]["sent_bytes"] == pytest.approx(12 * numel * (2 / 8 + 2 / 256 + 4 * 0.006), rel=0.03)

    lines = dict(zip(keys, map(json.loads, journal.read_text().splitlines()[1:]), strict=True))
    for name in ("cycle", "q2_ef"):
        pairs = [
            lines["shapes", name, s]["accuracy"] - lines["shapes", "fp32", s]["accuracy"] for s in (0, 1)
        ]
        assert rows[name]["difference"] == pytest.approx(sum(pairs) / 2)
        reach = 12.7062 * abs(pairs[0] - pairs[1]) / 2  # t of one degree of freedom
        assert rows[name]["interval"]["low"] == pytest.approx(sum(pairs) / 2 - reach, abs=1e-3)
        assert rows[name]["interval"]["high"] == pytest.approx(sum(pairs) / 2 + reach, abs=1e-3)
        assert rows[name]["non_inferior"] is None  # two pairs show nothing
    assert len({row["accuracy"] for row in lines.values()}) > 2
    for row in lines.values():
        assert row["accuracy"] * 600 / 100 == pytest.approx(round(row["accuracy"] * 600 / 100))

    table = render_convergence(result)
    assert f"{rows['cycle']['difference']:+.2f} (" in table
    assert "fewer than 10 pairs" in table
    plot_convergence(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    kept = journal.read_text().splitlines(keepends=True)
    journal.write_text(
        "".join(kept[:-2]) + kept[-1][:20]
    )  # killed while it wrote the last run, another one lost
    again = bench_convergence(**asked, seconds=0.01)
    assert keys_of(journal) == keys[:-1]
    assert (again["runs"], again["asked_runs"], again["stopped"]) == (5, 6, "seconds")
    assert f"--seconds ran out; the same line goes on from {journal}" in render_convergence(again)
    timeless = [
        {**json.loads(line), "seconds": 0} for line in (kept[-2], journal.read_text().splitlines()[-1])
    ]
    assert timeless[0] == timeless[1]  # the run done again is the run that was lost
    journal.write_text("".join(kept))

    monkeypatch.setattr(convergence, "launch_ranks", lambda *_, **__: pytest.fail("nothing was missing"))
    assert bench_convergence(**asked)["variants"] == result["variants"]
    fewer = bench_convergence(**{**asked, "seeds": 1, "variants": ["cycle"]})
    assert [(row["variant"], row["seeds"], row["interval"]) for row in fewer["variants"]] == [
        ("fp32", 1, None),
        ("cycle", 1, None),
    ]
    with pytest.raises(RecipeError, match="another experiment: steps 12, not 13"):
        bench_convergence(**{**asked, "steps": 13})


def rank_processes(process):
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "cyclebnn_dist.bench.rank" in child.cmdline()
    ]


SMALL_COMMAND = """
import sys
from functools import partial
from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench import convergence
convergence.bench_convergence = partial(convergence.bench_convergence, num_train=512, num_test=600)
sys.exit(main(["bench", "convergence", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_finished_runs_outlive_the_command(tmp_path, ending):
    journal = tmp_path / "runs.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_COMMAND, "--steps", "2", "--seeds", "500", "--out", str(journal)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) > 3, seconds=90)
        ranks = rank_processes(process)
        assert len(ranks) == 2
        process.send_signal(ending)
        output, _ = process.communicate(timeout=60)
        _, running = psutil.wait_procs(ranks, timeout=30)
        assert not running
    finally:
        process.kill()
        process.wait()
    assert len(read_runs(journal)) >= 3
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; the same line goes on from" in output
        assert not list(tmp_path.glob("cyclebnn-*"))


def test_every_variant_the_claim_needs_is_there():
    variants = {variant.name: variant for variant in all_variants()}
    assert set(CLAIMED) <= set(variants)
    narrow = ("q8", "q4", "q2", "cycle")
    assert [*variants] == ["fp32", "bf16", *narrow, *(f"{name}_ef" for name in narrow)]
    assert variants["cycle"].bits == variants["cycle_ef"].bits == (2, 8)
    assert not any(variants[name].comm.error_feedback for name in narrow)
    assert all(variants[f"{name}_ef"].comm.error_feedback for name in narrow)
    assert [variant.name for variant in choose_variants(["q2"])] == ["fp32", "q2"]


def test_runs_of_a_seed_begin_alike_and_see_the_same_images():
    weights = [
        torch.cat([p.detach().flatten() for p in build_net(seed=seed).parameters()]) for seed in (3, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first, second, other = (torch.stack([*batches(96, seed=s, steps=6, batch=32)]) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    for whole_pass in first.view(2, 96):
        assert sorted(whole_pass.tolist()) == list(range(96))
    assert not torch.equal(*first.view(2, 96))
    assert len(next(batches(10, seed=0, steps=1, batch=32))) == 32
    rates = [rate_at(step, steps=400) for step in range(400)]
    assert rates[0] < 0.1 * max(rates)
    assert rates[-1] < 1e-3 * max(rates)


def test_all_ranks_together_test_every_image_once():
    test = ImageSet(torch.arange(2503.0), torch.arange(2503))
    parts = [list(rank_batches(test, rank=rank, world_size=3)) for rank in range(3)]
    seen = torch.cat([batch.labels for part in parts for batch in part])
    assert sorted(seen.tolist()) == list(range(2503))
    assert all(torch.equal(batch.images.long(), batch.labels) for part in parts for batch in part)


def test_the_drawn_images_are_the_same_everywhere_and_none_is_in_both_sets():
    train, test = make_sets("shapes", num_train=4500, num_test=1000)
    assert train.images.shape == (4500, 1, SIDE, SIDE)
    assert torch.equal(train.labels.bincount(), torch.full((CLASSES,), 450))
    assert abs(float(train.images.mean())) < 0.5
    assert 0.5 < float(train.images.std()) < 2
    again, _ = make_sets("shapes", num_train=4500, num_test=10)
    assert torch.equal(again.images, train.images)
    assert len({image.numpy().tobytes() for image in (*train.images, *test.images)}) == 5500


def test_digits_are_those_of_scikit_learn(monkeypatch, capsys):
    values, labels = np.arange(1797.0 * 64).reshape(1797, 64) % 17, np.arange(1797) % 10
    module = types.ModuleType("sklearn.datasets")
    module.load_digits = lambda *, return_X_y: (values, labels)
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    train, test = make_sets("digits")
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.shape == (1297, 1, SIDE, SIDE)
    assert sorted([*train.labels.tolist(), *test.labels.tolist()]) == sorted(labels.tolist())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # as where it is not installed
    assert main(["bench", "convergence", "--sets", "digits"]) == 2
    said = capsys.readouterr().err
    assert "digits needs scikit-learn" in said
    assert "cyclebnn-dist[bench]" in said


def test_the_order_of_variants_changes_from_seed_to_seed():
    names = [variant.name for variant in all_variants()]
    order = draw_order(("shapes",), names, seeds=20, done=())
    assert len(set(order)) == len(order) == 20 * len(names)
    assert [seed for _, _, seed in order] == sorted(seed for _, _, seed in order)
    firsts = {name for index, (_, name, _) in enumerate(order) if index % len(names) == 0}
    assert len(firsts) > 4
    done = set(order[3:30:2])
    assert draw_order(("shapes",), names, seeds=20, done=done) == tuple(
        run for run in order if run not in done
    )


def test_quantiles_are_those_of_the_printed_tables():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 19: 2.093, 29: 2.045, 120: 1.980}
    for degrees, expected in table.items():
        assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=6e-4)
    assert t_quantile(0.99, 5) == pytest.approx(4.032, abs=6e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0.05, 0.99))
def test_quantiles_cut_off_what_they_should(degrees, within):
    """The density integrated numerically up to the quantile; with x = sqrt(v) tan(a) it is a power of a cosine."""
    angles = np.linspace(0.0, math.atan(t_quantile(within, degrees) / math.sqrt(degrees)), 20_001)
    factor = math.gamma((degrees + 1) / 2) / (math.sqrt(math.pi) * math.gamma(degrees / 2))
    area = np.trapezoid(np.cos(angles) ** (degrees - 1), angles) if hasattr(np, "trapezoid") else None
    area = np.trapz(np.cos(angles) ** (degrees - 1), angles) if area is None else area
    assert 2 * factor * area == pytest.approx(within, abs=1e-6)


def test_intervals_hold_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(0.2, 0.6, size=(4000, 10))
    found = [mean_interval(row.tolist()) for row in draws]
    covered = statistics.fmean(each.low <= 0.2 <= each.high for each in found)
    assert covered == pytest.approx(0.95, abs=0.012)
    assert found[0].mean == pytest.approx(draws[0].mean())
    assert found[0].deviation == pytest.approx(draws[0].std(ddof=1))
    assert math.isnan(mean_interval([1.0]).low)


def made_up(differences, *, baseline=85.0, seeds=12, name="shapes"):
    """Runs whose pairs differ by these points on average, and by a point more or less from seed to seed."""
    runs = {}
    for seed in range(seeds):
        for variant, difference in {"fp32": 0.0, **differences}.items():
            accuracy = baseline + seed / 10 + difference + (0 if variant == "fp32" else 0.3 * (-1) ** seed)
            runs[name, variant, seed] = {
                "accuracy": accuracy,
                "mean_bits": 4.0,
                "sent_bytes": 1000,
                "seconds": 1.0,
                "skipped_steps": 0,
            }
    return runs


def judged(runs, *, sets=("shapes",)):
    result = summarize(runs, sets=sets, variants=all_variants())
    return {row["variant"]: row["non_inferior"] for row in result["variants"]}, result["claim"]


def test_a_verdict_follows_the_lower_end_of_the_interval():
    reach = 2.2010 * 0.3 * math.sqrt(12 / 11) / math.sqrt(12)  # t of 11 degrees of freedom
    barely, not_quite = -0.5 + reach + 1e-3, -0.5 + reach - 1e-3
    fine = dict.fromkeys(CLAIMED, barely)
    verdicts, claim = judged(made_up({**fine, "q2": not_quite}))
    assert verdicts == {"fp32": None, **dict.fromkeys(CLAIMED, True), "q2": False}
    assert claim is True
    verdicts, claim = judged(made_up({**fine, "cycle": not_quite}))
    assert (verdicts["cycle"], claim) == (False, False)


def test_no_verdict_without_grounds():
    fine = dict.fromkeys(CLAIMED, 0.0)
    for runs, sets in (
        (made_up(fine, seeds=9), ("shapes",)),
        (made_up(fine, baseline=96.0), ("shapes",)),
        (made_up(fine, baseline=60.0), ("shapes",)),
        (made_up(fine, name="digits"), ("digits",)),
    ):
        verdicts, claim = judged(runs, sets=sets)
        assert set(verdicts.values()) == {None}
        assert claim is None
    verdicts, claim = judged(made_up({"q4": 0.0}))
    assert (verdicts["q4"], claim) == (True, None)  # the others have not run
    alone = {key: run for key, run in made_up(fine).items() if key[1] != "fp32"}
    verdicts, _ = judged(alone)
    assert set(verdicts.values()) == {None}  # nothing to compare with yet


def test_a_journal_is_not_taken_for_another(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert open_journal(path, {"steps": 5}) == {}
    append_run(path, ("shapes", "q4", 0), {"accuracy": 50.0})
    assert [*open_journal(path, {"steps": 5})] == [("shapes", "q4", 0)]
    before = path.read_bytes()
    with pytest.raises(RecipeError, match="another experiment: steps 5, not 6"):
        open_journal(path, {"steps": 6})
    assert path.read_bytes() == before
    for foreign in ("some notes", "some notes\n", '{"event": "train"}\n', "[]\n"):
        path.write_text(foreign)
        with pytest.raises(RecipeError, match="no journal"):
            open_journal(path, {"steps": 5})
        assert path.read_text() == foreign


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--ranks", "1"], "--ranks: 1 cannot exchange"),
        (["--ranks", "3"], "--ranks: 3 cannot share 128 images"),
        (["--ranks", "128"], "--ranks: 128 leave one image each"),
        (["--seeds", "0"], "--seeds: 0 is not possible"),
        (["--steps", "-1"], "--steps: -1 is not possible"),
        (["--seconds", "nan"], "--seconds: nan is not possible"),
        (["--variants", "q9"], "--variants: there is no variant 'q9'"),
        (["--sets", "letters"], "--sets: there is no set 'letters'"),
        (["--out", "nowhere/runs.jsonl"], "--out: cannot use nowhere/runs.jsonl"),
        (["--plot", "plot.pdf"], "--plot: plot.pdf is no PNG"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, problem, capsys):
    assert main(["bench", "convergence", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_it_starts_its_ranks_itself(capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "convergence"]) == 2
    assert "starts its ranks itself" in capsys.readouterr().err
