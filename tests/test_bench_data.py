"""`cyclebnn bench data`: both loaders are asked for the same, their turns do not overlap, and what is printed is measured."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench import data_rounds
from cyclebnn_dist.bench.data_files import HEIGHT, WIDTH, open_images, write_photographs
from cyclebnn_dist.bench.data_loaders import Settings
from cyclebnn_dist.bench.data_rounds import open_streams
from cyclebnn_dist.bench.data_text import render_data
from cyclebnn_dist.config.recipe import DataConfig

TINY = ["--threads", "1", "--image-size", "32", "--batch", "8", "--seconds", "0.1"]


def test_generated_files_are_as_hard_to_decode_as_imagenets(tmp_path):
    """Flat images would flatter whoever decodes slowest."""
    write_photographs(tmp_path, count=4)
    images = open_images(tmp_path)
    assert len(images) == 4
    for index in range(4):
        assert 80_000 < os.path.getsize(images.path(index)) < 150_000
        with Image.open(images.path(index)) as image:
            assert (image.width, image.height) == (WIDTH, HEIGHT)
            assert np.asarray(image).std() > 30


def test_streams_give_batches_of_the_same_shape_and_scale(tiny_data):
    """Otherwise a ratio compares different work."""
    settings = Settings(images=open_images(tiny_data), config=DataConfig(image_size=32, threads=1), batch=8)
    before = children(os.getpid())
    with open_streams(settings, ["dali randaugment", "timm randaugment"]) as streams:
        for stream in streams.values():
            images, labels = stream.next()
            assert images.shape == (8, 3, 32, 32)
            assert images.dtype.is_floating_point
            assert len(labels) == 8
            assert images.abs().max() < 3
            assert images.std() > 0.2
        assert len(children(os.getpid())) == len(before) + 1
    assert children(os.getpid()) == before


def children(process):
    """Ids of its living child processes."""
    found = set()
    for name in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            state, parent = Path(f"/proc/{int(name)}/stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == process and state != "Z":
                found.add(int(name))
    return found


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Steady:
    """A stream whose batches take ``seconds`` each, of which two are made while nobody asks."""

    def __init__(self, seconds, clock):
        self.ahead, self.seconds, self.clock, self.taken = 2, seconds, clock, 0
        self.made = 0.0

    def next(self):
        self.made = max(self.made, self.clock.now - self.ahead * self.seconds) + self.seconds
        self.clock.sleep(max(0.0, self.made - self.clock.now))
        self.taken += 1
        return None, None


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(data_rounds, "time", made)
    return made


def test_prepared_batches_are_not_counted_as_speed(clock):
    """What a loader made in another's turn would make it look faster than it is."""
    streams = {"fast": Steady(0.005, clock), "slow": Steady(0.02, clock)}
    times = data_rounds.time_streams(streams, threads=1, seconds=0.0)
    assert times["fast"] == pytest.approx([0.005] * 3)
    assert times["slow"] == pytest.approx([0.02] * 3)
    assert streams["fast"].taken == streams["slow"].taken


def test_a_turn_lasts_until_the_stream_is_idle_again(clock):
    """Or it would go on working in another's turn, and slow it."""
    busy, idle = Steady(0.02, clock), []
    other = Steady(0.005, clock)
    fill = other.next
    other.next = lambda: idle.append(clock.now - busy.made >= busy.ahead * busy.seconds) or fill()
    data_rounds.time_streams({"busy": busy, "other": other}, threads=1, seconds=0.0)
    assert all(idle)


def test_measuring_ends_when_it_should(clock):
    streams = {"fast": Steady(0.005, clock), "slow": Steady(0.02, clock)}
    times = data_rounds.time_streams(streams, threads=1, seconds=2.0)
    assert len(times["slow"]) > 3
    assert 1.5 < clock.now <= 2.0


def test_training_waits_for_slow_data_only(clock):
    streams = {"fast": Steady(0.001, clock), "slow": Steady(0.04, clock)}
    turns = data_rounds.time_training(streams, lambda images, labels: clock.sleep(0.01), seconds=0.0)
    assert [turn.waiting for turn in turns["fast"]] == pytest.approx([0.0] * 2)
    for turn in turns["slow"]:
        assert turn.seconds == pytest.approx(0.04 * turn.steps)
        assert turn.waiting == pytest.approx(0.03 * turn.steps)


def test_table_and_json_tell_the_same_measurements(tiny_data, capsys):
    arguments = ["bench", "data", "--data", str(tiny_data), *TINY]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in result["loading"]] == [
        "decode",
        "plain",
        "randaugment",
        "randaugment, every operation",
    ]
    for row in result["loading"]:
        assert row["rounds"] >= 3
        assert row["times_faster"]["low"] <= row["times_faster"]["median"] <= row["times_faster"]["high"]
        assert row["dali_images_per_second"] > 0 < row["timm_images_per_second"]
    assert {(row["loader"], row["augment"]) for row in result["training"]} == {
        (loader, augment) for loader in ("dali", "timm") for augment in ("plain", "randaugment")
    }
    assert all(0 <= row["data_wait_fraction"] <= 1 < row["step_seconds"] * 1e4 for row in result["training"])
    table = render_data(result)
    plain = result["loading"][1]
    found = re.search(r"^plain +1 +(\d+) +(\d+) +([\d.]+) \(", table, flags=re.M)
    assert found[1] == f"{plain['dali_images_per_second']:.0f}"
    assert found[2] == f"{plain['timm_images_per_second']:.0f}"
    assert found[3] == f"{plain['times_faster']['median']:.2f}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--threads", "0"], "--threads: 0 is too small"),
        (["--seconds", "0"], "--seconds: 0 is no time"),
        (["--batch", "1"], "--batch: 1 is too small"),
        (["--batch", "81"], "--batch: 81, but"),
        (["--data", "nowhere"], "--data: there is no folder nowhere/train"),
        (["--model", "resnet19"], "model.name: timm has no model 'resnet19'"),
    ],
)
def test_bad_arguments_are_refused(arguments, problem, tiny_data, capsys):
    assert main(["bench", "data", "--data", str(tiny_data), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_an_interrupt_ends_it_and_its_workers(tiny_data):
    """Worker processes that outlive the command would slow whatever is measured next."""
    command = [sys.executable, "-m", "cyclebnn_dist", "bench", "data", "--data", str(tiny_data), *TINY]
    command += ["--seconds", "600", "--model", "none"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        end = time.monotonic() + 60
        while not children(process.pid) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(
            1.0
        )  # torch's loader complains by itself where it is interrupted while it starts its workers
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
