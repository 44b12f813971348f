"""Without these the numbers a user reads would not be those of the steps that count."""

import json

import psutil
import pytest
import wandb

from cyclebnn_dist.config import WandbConfig
from cyclebnn_dist.metrics import Journal, Totals, WandbRun, read_journal
from cyclebnn_dist.metrics.wandb_run import resolve_mode
from cyclebnn_dist.precision.schedule import Widths


def test_totals_count_bits_of_the_steps_that_ran_and_survive_a_restart():
    totals = Totals()
    for bits, count in ((2, 3), (8, 1)):
        for _ in range(count):
            totals.add_step(
                Widths(4, 8, bits),
                images=64,
                seconds=0.5,
                data_seconds=0.1,
                agreement_seconds=0.01,
                skipped=bits == 8,
            )
    restored = Totals()
    restored.load_state_dict(json.loads(json.dumps(totals.state_dict())))
    assert restored == totals
    assert restored.bits("communication") == (2, 3.5, 8)
    assert restored.bits("backward") == (8, 8.0, 8)
    assert (restored.images, restored.skipped_steps, restored.train_seconds) == (256, 1, 2.0)


def test_rows_a_kill_made_obsolete_are_not_read(tmp_path):
    first = Journal(tmp_path, life=1)
    first.write({"event": "start", "step": 0})
    for step in (10, 20, 30):
        first.write({"event": "train", "step": step, "loss": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    second = Journal(tmp_path, life=2)
    second.write({"event": "start", "step": 20})
    second.write({"event": "train", "step": 30, "loss": -30})
    second.close()
    rows = [(r["life"], r["step"], r.get("loss")) for r in read_journal(tmp_path) if r["event"] == "train"]
    assert rows == [(1, 10, 10), (1, 20, 20), (2, 30, -30)]


@pytest.mark.parametrize("value", ["online", "offline", "disabled"])
def test_the_environment_decides_where_the_recipe_says_auto(monkeypatch, value):
    monkeypatch.setenv("WANDB_MODE", value)
    assert resolve_mode("auto") == value
    assert resolve_mode("offline") == "offline"


def test_without_a_key_nothing_asks_for_a_login(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert resolve_mode("auto") == "offline"


def test_every_row_is_json_for_strict_readers(tmp_path):
    journal = Journal(tmp_path, life=1)
    journal.write({"event": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    journal.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 0.1)


def test_a_run_goes_on_when_wandb_does_not(tmp_path, caplog):
    config = WandbConfig(mode="offline", project="refused/by/wandb")
    run = WandbRun(tmp_path, config, recipe={"a": 1}, enabled=True)
    run.log({"loss": 1.0}, step=1)
    run.summarize({"top1": 2.0})
    run.finish()
    assert "goes on without Weights & Biases" in caplog.text


def wandb_services():
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


def test_a_run_goes_on_when_the_service_of_wandb_is_killed(tmp_path, caplog):
    """Slurm ends a job with SIGTERM to every process of it; the ranks have yet to save."""
    wandb.teardown()
    run = WandbRun(tmp_path, WandbConfig(mode="offline"), recipe={}, enabled=True)
    (service,) = wandb_services()
    service.terminate()
    psutil.wait_procs([service], timeout=20)
    run.log({"loss": 1.0}, step=1)
    run.summarize({"top1": 2.0})
    run.leave()
    run.finish()
    assert "metrics.jsonl has everything" in caplog.text


def test_a_run_that_will_come_back_leaves_no_service_behind(tmp_path, caplog):
    """What is not sent before the job is requeued is lost with the service."""
    wandb.teardown()
    run = WandbRun(tmp_path, WandbConfig(mode="offline"), recipe={}, enabled=True)
    assert len(wandb_services()) == 1
    run.log({"loss": 1.0}, step=1)
    run.leave()
    assert wandb_services() == []
    assert [record for record in caplog.records if record.name.startswith("cyclebnn")] == []
    run.log({"loss": 1.0}, step=2)
