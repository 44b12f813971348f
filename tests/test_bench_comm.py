"""`cyclebnn bench comm`: its bytes, errors and ratios are those of the all-reduce that trains, and its advice follows from them."""

import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from launching import wait_until
from worlds import make_world

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench import limits, namespaces
from cyclebnn_dist.bench.break_even import break_even, fit_cost
from cyclebnn_dist.bench.comm_plot import plot_comm
from cyclebnn_dist.bench.comm_rounds import Contenders, Gradients, Settings, interface_bytes, measure_launch
from cyclebnn_dist.bench.comm_summary import advise
from cyclebnn_dist.bench.comm_text import readable_rate, render_comm
from cyclebnn_dist.bench.gradients import (
    RESNET50_NUMEL,
    exact_mean,
    gradient_of,
    group_in_buckets,
    named_parameters,
    relative_error,
    resnet50_shapes,
)
from cyclebnn_dist.bench.local_ranks import launch_ranks
from cyclebnn_dist.bench.paired import ratio_over_launches
from cyclebnn_dist.bench.variants import all_variants, choose_variants
from cyclebnn_dist.comm import build_reducer, reducer
from cyclebnn_dist.comm.breakeven import FASTEST
from cyclebnn_dist.comm.levels import GAUSSIAN_DISTORTION
from cyclebnn_dist.config.recipe import CommConfig
from cyclebnn_dist.config.schema import hints
from cyclebnn_dist.meeting import free_port
from cyclebnn_dist.timm_import import timm

ROOT = Path(__file__).parents[1]
NUMEL = 200_000
CPU = torch.device("cpu")


def settings_of(*variants, numel=NUMEL, bucket_mb=0.2):
    return Settings(numel=numel, variants=variants, bucket_mb=bucket_mb)


def test_the_gradients_are_laid_out_as_those_of_a_resnet50():
    model = timm.create_model("resnet50")
    expected = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(resnet50_shapes()) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == RESNET50_NUMEL


@pytest.mark.parametrize("numel", [10_000, 123_457, RESNET50_NUMEL, 100_000_000])
def test_any_number_of_gradients_keeps_the_proportions(numel):
    named = named_parameters(numel)
    assert sum(tensor.numel() for _, tensor in named) == numel
    assert len(named) == 161
    if numel == RESNET50_NUMEL:
        assert [tensor.numel() for _, tensor in named] == [torch.Size(s).numel() for s in resnet50_shapes()]


@pytest.mark.parametrize("bucket_mb", [0.5, 25.0])
def test_buckets_are_those_of_ddp(bucket_mb):
    tensors = [torch.empty(shape, device="meta") for shape in resnet50_shapes()][::-1]
    limits_ = [min(2**20, int(bucket_mb * 2**20)), int(bucket_mb * 2**20)]
    expected, _ = dist._compute_bucket_assignment_by_size(tensors, limits_, [False] * len(tensors))
    sizes = [tensor.numel() for tensor in tensors][::-1]
    found = group_in_buckets(sizes, bucket_mb=bucket_mb)
    last = len(tensors) - 1
    assert found == [tuple(last - place for place in bucket) for bucket in expected]


def test_gradients_have_heavy_tails_and_an_exact_mean():
    numel, ranks = 50_000, 11
    gradients = [gradient_of(rank, numel) for rank in range(ranks)]
    assert torch.equal(gradients[0], gradients[8])
    assert not torch.equal(gradients[0], gradients[1])
    magnitudes = torch.stack(gradients[:8]).abs().flatten() / 1e-3
    assert float(magnitudes.median()) == pytest.approx(0.7407, rel=0.01)  # quartile of Student's t, 4 degrees
    assert float((magnitudes > 4.604).float().mean()) == pytest.approx(0.01, rel=0.1)  # its 99.5 % quantile
    mean = torch.stack([g.double() for g in gradients]).mean(dim=0)
    torch.testing.assert_close(exact_mean(ranks, numel), mean)
    assert relative_error(torch.zeros(numel), mean) == pytest.approx(1.0)
    assert relative_error((1.1 * mean).float(), mean) == pytest.approx(0.01, rel=1e-3)


def test_every_codec_a_recipe_may_name_is_measured():
    codecs = set(hints(CommConfig)["codec"].__args__)
    assert {variant.comm.codec for variant in all_variants() if variant.comm} == codecs
    names = [variant.name for variant in all_variants()]
    assert len(set(names)) == len(names)
    assert {"fp32", "bf16", *(f"q{bits}" for bits in range(1, 9)), "q1_ef", "absmax4", "torch_fp32"} <= set(
        names
    )
    assert [variant.name for variant in choose_variants(["q4"])] == ["fp32", "bf16", "q4"]


def launched(rank, n, settings):
    return measure_launch(make_world(rank, n), settings)


def counted_by_the_plans(rank, n, names):
    """Bytes by the sizes of the messages: all but a rank's own in the first phase, the largest one to all in the second."""
    gradients = Gradients(settings_of(*names), make_world(rank, n))
    sent = {}
    for variant in choose_variants(names):
        if variant.comm is not None:
            each = build_reducer(variant.comm, gradients.named, rank=rank, world_size=n, seed=0, device=CPU)
            plans = [each._plan(bucket, variant.bits) for bucket in gradients.buckets]
            sent[variant.name] = sum(
                sum(plan.sizes) - plan.sizes[rank] + (n - 1) * max(plan.sizes) for plan in plans
            )
            each.close()
    return sent


@pytest.mark.parametrize("n", [2, 3])
def test_bytes_and_errors_are_those_of_the_all_reduce(ranks, n):
    names = ("fp32", "bf16", "q8", "q4", "q2", "q1_ef", "absmax4", "torch_fp32", "torch_bf16")
    results = ranks(n, launched, settings_of(*names))
    assert all(result == results[0] for result in results)
    measured = results[0]["variants"]
    assert set(measured) == set(names)
    planned = ranks(n, counted_by_the_plans, names)
    for name, row in measured.items():
        assert len(row["seconds"]) == results[0]["rounds"] >= 3
        assert min(row["seconds"]) > 0
        if name.startswith("torch"):
            assert row["sent_bytes"] == round(2 * (n - 1) / n * NUMEL * (4 if name == "torch_fp32" else 2))
            assert row["codec_seconds"] == []
        else:
            assert row["sent_bytes"] == max(each[name] for each in planned)
            assert min(row["codec_seconds"]) > 0
            assert min(row["codec_core_seconds"]) > 0
    assert measured["q4"]["sent_bytes"] < 0.2 * measured["fp32"]["sent_bytes"]
    for name in ("fp32", "torch_fp32"):
        assert measured[name]["nmse"] < 1e-12
    for name in ("bf16", "torch_bf16"):
        assert 1e-7 < measured[name]["nmse"] < 1e-4
    for name, bits in (("q4", 4), ("q2", 2)):  # gradients of ranks have nothing in common
        one = GAUSSIAN_DISTORTION[bits] / (1 - GAUSSIAN_DISTORTION[bits])
        assert measured[name]["nmse"] == pytest.approx(one + one * (1 + one), rel=0.25)
    assert measured["absmax4"]["nmse"] > measured["q4"]["nmse"]
    assert results[0]["link_bytes_per_second"] > 0


def work_in_silence(rank, n):
    """Only rank 0 reduces: on a network this would wait for the others."""
    world = make_world(rank, n)
    gradients = Gradients(settings_of("q4", "q1_ef"), world)
    contenders = Contenders(choose_variants(["q4", "q1_ef"]), gradients, world)
    transfer = reducer.Transfer
    if rank == 0:
        with limits.silent_network() as silence:
            for variant in choose_variants(["q4", "q1_ef"]):
                gradients.reset()
                contenders.reduce(variant)
        assert silence.copy_seconds > 0
    assert reducer.Transfer is transfer
    with pytest.raises(ZeroDivisionError), limits.silent_network():
        _ = 1 / 0
    assert reducer.Transfer is transfer
    contenders.close()


def test_the_codec_works_alone_without_a_network(ranks):
    ranks(2, work_in_silence)


def command(*arguments):
    return [sys.executable, "-m", "cyclebnn_dist", "bench", "comm", *arguments]


SMALL = ["--numel", str(NUMEL), "--seconds", "1", "--variants", "q4", "q2", "torch_fp32"]


def check_result(result, *, ranks):
    assert [row["variant"] for row in result["variants"]] == ["torch_fp32", "fp32", "bf16", "q4", "q2"]
    assert [row["bits"] for row in result["variants"]] == [32, 32, 16, 4, 2]
    by_name = {row["variant"]: row for row in result["variants"]}
    assert result["ranks"] == ranks
    assert result["baselines"]["fp32"] == min(
        ("fp32", "torch_fp32"), key=lambda name: by_name[name]["median_seconds"]
    )
    for row in result["variants"]:
        for key in ("speedup_vs_fp32", "speedup_vs_16bit"):
            ratio = row[key]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        wire = row["sent_bytes"] * 8 / result["link_bits_per_second"]
        assert row["wire_seconds"] == pytest.approx(wire)
        assert row["times_wire"] == pytest.approx(row["median_seconds"] / wire)
        assert row["times_limit"] == pytest.approx(
            row["median_seconds"] / max(wire, row["codec_seconds"] or 0.0)
        )
    assert by_name[result["baselines"]["fp32"]]["speedup_vs_fp32"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert result["advice"]["mode"] in ("quantized", "bf16", "fp32")
    auto = result["auto"]
    assert auto["quantized"] == "q2"
    assert len(auto["modes"]) == result["launches"]
    measured = {"fp32": "fp32", "bf16": "bf16", "quantized": "q2"}
    assert auto["measured_seconds"] == {
        mode: by_name[name]["median_seconds"] for mode, name in measured.items()
    }
    assert min(auto["reckoned_seconds"].values()) > 0
    if result["launches"] == 1:
        assert auto["reckoned_seconds"][auto["modes"][0]] <= 1.05 * min(auto["reckoned_seconds"].values())


def test_local_ranks_over_loopback(capsys, tmp_path):
    assert main(["bench", "comm", "--ranks", "2", "--unshaped", *SMALL, "--launches", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, ranks=2)
    assert result["network"] == "loopback"
    assert result["variants"][0]["nic_bytes"] is None
    table = render_comm(result)
    q4 = next(row for row in result["variants"] if row["variant"] == "q4")
    (line,) = [line for line in table.splitlines() if line.startswith("q4 ")]
    assert f"{q4['sent_bytes'] / 1e6:.2f}" in line
    assert f"{q4['speedup_vs_16bit']['median']:.2f} (" in line
    assert "recommended" in table
    assert f"comm.mode=auto would take {result['auto']['modes'][0]}: it reckons with fp32 " in table
    assert "break-even   q4 is faster than 16 bits" in table
    plot_comm(result, tmp_path / "comm.png")
    assert (tmp_path / "comm.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_of_torchrun_are_measured_as_they_are():
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, "WORLD_SIZE": "2", **meeting}
    ranks = [
        subprocess.Popen(
            command(*SMALL, "--launches", "2", "--json"),
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    result = json.loads(said[0][0])
    check_result(result, ranks=2)
    assert result["network"] == "Gloo on 1 host"
    assert said[1][0] == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "nothing says which network"),
        (["--rate", "1gbit", "--unshaped"], "there can be only one"),
        (["--unshaped", "--ranks", "1"], "--ranks: 1 cannot exchange"),
        (["--unshaped", "--ranks", "0"], "--ranks: 0 cannot exchange"),
        (["--unshaped", "--numel", "100"], "--numel: 100 is too small"),
        (["--unshaped", "--launches", "0"], "--launches: 0 is not possible"),
        (["--unshaped", "--seconds", "-1"], "--seconds: -1 is not possible"),
        (["--unshaped", "--variants", "q9"], "--variants: there is no variant 'q9'"),
        (["--unshaped", "--plot", "comm.pdf"], "--plot: comm.pdf is no PNG"),
        (["--unshaped", "--plot", "nowhere/comm.png"], "--plot: there is no folder nowhere"),
        (["--rate", "fast"], "--rate: 'fast' is no rate"),
        (["--rate", "0mbit"], "--rate: '0mbit' is no rate"),
        (["--rate", "1gbit", "--ranks", "300"], "--ranks: 300 shaped networks cannot be made"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, problem, capsys):
    assert main(["bench", "comm", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_shaping_is_refused_where_it_is_impossible(capsys, monkeypatch):
    monkeypatch.setattr(namespaces, "SEARCHED", "/nowhere")
    assert main(["bench", "comm", "--rate", "1gbit"]) == 2
    assert "there is no 'ip' here" in capsys.readouterr().err
    monkeypatch.setattr(namespaces, "SEARCHED", os.environ["PATH"])
    monkeypatch.setattr(namespaces, "_tool", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["bench", "comm", "--rate", "1gbit"]) == 2
    said = capsys.readouterr().err
    assert "only root may make shaped networks" in said
    assert "--unshaped" in said


def test_the_ranks_of_torchrun_bring_their_own_network(capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "comm", "--rate", "1gbit"]) == 2
    assert "are there already" in capsys.readouterr().err


def test_a_failing_rank_is_named_with_what_it_said():
    with pytest.raises(RuntimeError, match=r"rank \d of 2 ended with status 1(.|\n)*no variant 'q99'"):
        launch_ranks(settings_of("q99"), ranks=2, network=None)
    assert rank_processes(os.getpid()) == []


@contextmanager
def started(folder, *arguments):
    """The command as a process of its own, and its ranks once they all are there; nothing of it outlives the test."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder)}
    )
    try:
        assert wait_until(lambda: len(rank_processes(process.pid)) == 2, seconds=60)
        yield process, rank_processes(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def rank_processes(pid):
    """Rank processes below ``pid``."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ip and tc come and go
            if "cyclebnn_dist.bench.rank" in child.cmdline():
                found.append(child)
    return found


def test_ranks_end_when_the_command_is_killed(tmp_path):
    with started(tmp_path, "--ranks", "2", "--unshaped", "--numel", "5000000") as (process, ranks):
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(running(each) for each in ranks), seconds=30)


def running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


costs = st.builds(
    fit_cost,
    seconds=st.floats(1e-3, 10.0),
    sent_bytes=st.floats(1e4, 1e9),
    codec_seconds=st.floats(0.0, 1.0),
    rate=st.floats(1e6, 1e11),
)


@given(st.floats(1e4, 1e9), st.floats(0.0, 1.0), st.floats(1e6, 1e11), st.floats(0.0, 1.0))
def test_a_fitted_cost_gives_back_what_was_measured(sent_bytes, codec_seconds, rate, hidden):
    wire = sent_bytes / rate
    measured = wire + codec_seconds - hidden * min(wire, codec_seconds)
    cost = fit_cost(seconds=measured, sent_bytes=sent_bytes, codec_seconds=codec_seconds, rate=rate)
    assert cost.seconds(rate) == pytest.approx(measured)
    assert cost.seconds(FASTEST) <= cost.seconds(rate) * (1 + 1e-9)


@given(costs, costs)
def test_both_take_as_long_at_the_break_even_rate(ours, baseline):
    rate = break_even(ours, baseline)
    if rate is None:
        assert ours.seconds(1e13) <= baseline.seconds(1e13)
    elif rate > 0:
        assert ours.seconds(rate) == pytest.approx(baseline.seconds(rate), rel=0.01)


def test_the_break_even_rate_is_that_of_the_formula():
    """Codec and wire in turn: c = (B - b) / W; hidden by each other: c = B / W (the codec is the longer one)."""
    baseline = fit_cost(seconds=1.0, sent_bytes=1e8, codec_seconds=0.0, rate=1e8)
    in_turn = fit_cost(seconds=0.2 + 0.1, sent_bytes=2e7, codec_seconds=0.1, rate=1e8)
    assert break_even(in_turn, baseline) == pytest.approx((1e8 - 2e7) / 0.1, rel=0.01)
    hidden = fit_cost(seconds=0.2, sent_bytes=2e7, codec_seconds=0.1, rate=1e8)
    assert break_even(hidden, baseline) == pytest.approx(1e8 / 0.1, rel=0.01)
    assert break_even(baseline, hidden) is None


def test_launches_that_differ_widen_the_interval():
    alike = ratio_over_launches([[2.0, 2.2, 1.8]] * 4, [[1.0] * 3] * 4)
    assert alike.median == 2.0
    assert 1.8 <= alike.low <= 2.0 <= alike.high <= 2.2
    apart = ratio_over_launches([[1.0] * 9, [2.0] * 9, [3.0] * 9], [[1.0] * 9] * 3)
    assert (apart.median, apart.low, apart.high) == (2.0, 1.0, 3.0)
    drifting = [[1.0, 4.0], [16.0, 64.0]]
    paired = ratio_over_launches([[3.0, 12.0], [48.0, 192.0]], drifting)
    assert (paired.median, paired.low, paired.high) == (3.0, 3.0, 3.0)


def row(name, seconds, *, speedup_low, nmse=0.01):
    bits = {"fp32": 32, "bf16": 16}.get(name) or int(name[1:])
    ratio = {"median": speedup_low, "low": speedup_low, "high": speedup_low}
    keys = ("speedup_vs_16bit", "speedup_vs_fp32")
    return {"variant": name, "bits": bits, "median_seconds": seconds, "nmse": nmse} | dict.fromkeys(
        keys, ratio
    )


def advised(*widths, half_pays=True):
    wide = [row("fp32", 2.0, speedup_low=1.0), row("bf16", 1.0, speedup_low=1.9 if half_pays else 0.9)]
    advice = advise([*wide, *widths], {"fp32": "fp32", "16bit": "bf16"})
    assert advice["why"]
    return advice["mode"], advice["low"], advice["high"]


def test_the_advice_follows_the_measurements():
    q8, q4 = row("q8", 0.9, speedup_low=1.05), row("q4", 0.5, speedup_low=1.9)
    useless = row("q2", 0.49, speedup_low=1.9)
    wrong = row("q1", 0.1, speedup_low=5.0, nmse=1.4)
    assert advised(q8, q4, useless, wrong) == ("quantized", 4, 8)
    doubtful = row("q8", 0.9, speedup_low=0.99)
    assert advised(doubtful, q4) == ("quantized", 4, 4)
    assert advised(doubtful) == ("bf16", None, None)
    assert advised(doubtful, half_pays=False) == ("fp32", None, None)
    assert advised(wrong) == ("bf16", None, None)


def test_rates_are_read_and_written():
    assert namespaces.parse_rate("2.5gbit") == 2.5e9
    assert namespaces.parse_rate("100Mbit") == 1e8
    assert (readable_rate(9.56e8), readable_rate(2.5e9), readable_rate(5e4)) == (
        "956 Mbit/s",
        "2.5 Gbit/s",
        "50 kbit/s",
    )
    assert interface_bytes("lo") >= 0
    with pytest.raises(RuntimeError, match="no network interface nothing0"):
        interface_bytes("nothing0")
    assert statistics.median([interface_bytes(None)]) != interface_bytes(None)
