"""The commands as a user types them. Without these a documented line would end in a traceback."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from launching import ROOT, TINY_RECIPE, wait_until

from cyclebnn_dist.__main__ import CONVENTION_NAMES, main
from cyclebnn_dist.binary import CONVENTIONS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("main")
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=folder / "run", data=tiny_data))
    return path


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["evaluate"],
        ["summary"],
        ["schedule"],
        ["plan"],
        ["config"],
        ["data"],
        ["data", "sample"],
    ],
)
def test_help_is_everywhere_with_examples(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: cyclebnn" in text
    assert not words or "examples:\n  " in text


def test_summary_prints_one_object_that_follows_overrides(recipe, capsys):
    assert main(["summary", str(recipe), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["summary", str(recipe), "model.name=resnet34", "binary.method=bireal", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    keys = {"bops", "flops", "ops", "params", "binary_params", "size_bits", "training_saving", "layers"}
    assert keys <= first.keys()
    assert len(second["layers"]) > len(first["layers"])
    assert (first["method"], second["method"]) == ("cyclebnn", "bireal")


def test_summary_adds_up_by_the_convention_asked_for(recipe, capsys):
    found = {}
    for convention in CONVENTION_NAMES:
        assert main(["summary", str(recipe), "--convention", convention, "--json"]) == 0
        found[convention] = json.loads(capsys.readouterr().out)
    assert set(CONVENTIONS) == set(CONVENTION_NAMES)
    assert all(summary["convention"] == name for name, summary in found.items())
    assert len({summary["ops"] for summary in found.values()}) == len(found)
    assert main(["summary", str(recipe), "--convention", "fvbitcore"]) == 0
    assert "BOPs / 32" in capsys.readouterr().out


RECORD_PROGRESS = """
import sys
import threading
from cyclebnn_dist import loop
from cyclebnn_dist.__main__ import main
seen, original = [], loop.set_progress
def record(model, progress, **phase):
    seen.append(progress)
    original(model, progress, **phase)
loop.set_progress = record
status = main(sys.argv[1:])
print(*seen)
sys.exit(status)
"""


def test_training_tells_the_layers_how_far_it_is(recipe):
    """Otherwise a method's gradients would stay those of the end of the run."""
    overrides = [f"run.dir={recipe.parent / 'progress'}", "binary.method=bnext", "loss.kurtosis_weight=0.1"]
    done = subprocess.run(
        [sys.executable, "-c", RECORD_PROGRESS, "train", str(recipe), *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = [float(word) for word in done.stdout.splitlines()[-1].split()]
    assert len(seen) > 1
    assert seen == pytest.approx([step / len(seen) for step in range(len(seen))])


def test_schedule_prints_and_draws_what_a_recipe_will_do(recipe, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    arguments = ["precision.forward.shape=triangular", "--steps", "5000", "--ranks", "4", "--plot", str(plot)]
    assert main(["schedule", str(recipe), *arguments]) == 0
    text = capsys.readouterr().out
    assert "5000 steps, 2500 an epoch" in text
    assert "with 4 ranks" in text
    forward = text.splitlines()[2]
    assert re.search(r"  █+▇+▆+▅+▄+▃+▄+▅+▆+▇+█+  2 to 6, mean 4\.00 bits", forward), forward
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_config_lists_every_section(capsys):
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    assert "precision.communication.cycles" in text
    assert "engine.name" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "/nowhere"], "no complete checkpoint"),
        (["summary", "{recipe}", "optim.lrr=1"], "did you mean optim.lr?"),
        (["schedule", "{recipe}", "data.path=/nowhere"], "give --images N (training images) or --steps N"),
        (["schedule", "{recipe}", "--steps", "0"], "--steps: 0 is out of range"),
        (["schedule", "{recipe}", "--steps", "9", "--images", "9"], "--images: stands beside --steps"),
        (["schedule", "{recipe}", "--ranks", "0"], "--ranks: 0 is out of range"),
        (["schedule", "{recipe}", "--plot", "plot.jpg"], "use plot.png"),
        (["schedule", "{recipe}", "--plot", "/nowhere/plot.png"], "cannot write /nowhere/plot.png"),
        (["plan", "{recipe}", "data.path=/nowhere"], "give --images N (training images) or --steps N"),
        (["plan", "{recipe}", "--nodes", "1,two"], "--nodes: '1,two' is no list of numbers of nodes"),
        (["plan", "{recipe}", "--nodes", "0,1"], "--nodes: '0,1' is no list of numbers of nodes"),
        (["plan", "{recipe}", "--nodes", "99999"], "--nodes: 99999 nodes of 8 are 799992 ranks"),
        (["plan", "{recipe}", "--gpus-per-node", "0"], "--gpus-per-node: 0 is out of range"),
        (
            ["plan", "{recipe}", "--network", "fast"],
            "write 100gbit, 25gbit, 1gbit, 100mbit, or bytes a second",
        ),
        (["plan", "{recipe}", "--network", "0gbit"], "--network: '0gbit' is no rate of a network"),
        (["plan", "{recipe}", "--network", "-1"], "--network: '-1' is no rate of a network"),
        (["plan", "{recipe}", "--intra", "wires"], "write nvlink, pcie, 100gbit"),
        (["plan", "{recipe}", "--compute-seconds", "inf"], "--compute-seconds: 'inf' is no number above 0"),
        (["plan", "{recipe}", "--codec", "soon"], "--codec: 'soon' is no number above 0"),
        (
            ["plan", "{recipe}", "--nodes", "3", "--gpus-per-node", "1"],
            "give --batch N (images of a rank and pass)",
        ),
        (["plan", "{recipe}", "--batch", "0"], "--batch: 0 is out of range"),
    ],
)
def test_what_is_refused_is_told_in_a_few_lines(recipe, capsys, arguments, words):
    assert main([argument.format(recipe=recipe) for argument in arguments]) == 2
    text = capsys.readouterr().err
    assert words in text
    assert len(text.splitlines()) <= 4


def test_torchrun_trains_as_foretold_and_the_result_can_be_evaluated_and_started_from(recipe, capsys):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    trained = subprocess.run(
        [
            *torchrun,
            "-m",
            "cyclebnn_dist",
            "train",
            str(recipe),
            "train.amp=bf16",
            "model.channels_last=true",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("validation top-1") == 1
    assert "Traceback" not in trained.stderr
    run_dir = recipe.parent / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))

    assert main(["schedule", str(recipe), "train.amp=bf16", "--ranks", "2", "--json"]) == 0
    foretold = json.loads(capsys.readouterr().out)
    assert foretold["sent_bytes"] == summary["sent_bytes"]
    assert foretold["fp32_bytes"] == pytest.approx(summary["fp32_bytes"], rel=1e-12)
    for key in ("steps", "ranks", "training_saving_model", "training_saving_binary_layers"):
        assert foretold[key] == summary[key]
    for channel, used in summary["bits"].items():
        assert used.items() <= foretold["bits"][channel].items()

    command = [sys.executable, "-m", "cyclebnn_dist", "evaluate", str(run_dir), "--json"]
    evaluated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(evaluated.stdout)["top1"] == summary["eval_top1"]

    started = subprocess.run(
        [
            sys.executable,
            "-m",
            "cyclebnn_dist",
            "train",
            str(recipe),
            f"model.weights={run_dir}/checkpoints/step_000000010",
            f"run.dir={recipe.parent}/second",
            "train.epochs=0.2",
            "optim.lr=1e-9",
            "optim.min_lr=1e-9",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 0, started.stderr
    second = json.loads((recipe.parent / "second" / "summary.json").read_text())
    assert second["eval_loss"] == pytest.approx(summary["eval_loss"], abs=0.2), (
        "it did not start from those weights"
    )


def test_a_reader_that_has_seen_enough_is_no_error(recipe):
    line = f"{sys.executable} -m cyclebnn_dist config | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Error" not in done.stderr


def test_ctrl_c_on_the_plain_command_saves_and_goes_on_later(recipe):
    run_dir = recipe.parent / "interrupted"
    command = [
        sys.executable,
        "-m",
        "cyclebnn_dist",
        "train",
        str(recipe),
        f"run.dir={run_dir}",
        "run.save_every=1000",
    ]
    command += ["train.epochs=100", "wandb.mode=disabled"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    rows = run_dir / "metrics.jsonl"
    assert wait_until(lambda: rows.exists() and rows.read_text().count("train") > 3, seconds=60)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1


def test_ctrl_c_ends_a_command_that_has_nothing_to_save_in_a_word(recipe, capsys):
    """A traceback over pages would hide from a user that it was they who ended it."""
    importlib.import_module("cyclebnn_dist.models.summary")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        status = main(["summary", str(recipe), "model.name=resnet152"])
    finally:
        timer.join()
    assert status == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
