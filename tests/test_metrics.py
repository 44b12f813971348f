"""Without these the numbers a user reads would not be those of the steps that count."""

import json

import psutil
import pytest
import wandb
from disks import fill, small_disk
from hypothesis import given
from hypothesis import strategies as st

from cyclebnn_dist.config import WandbConfig
from cyclebnn_dist.metrics import Journal, Totals, WandbRun, begin_world, read_journal, split_by_world
from cyclebnn_dist.metrics import journal as journal_module
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


def test_rows_wait_for_a_full_disk_and_none_is_torn_or_lost(tmp_path, caplog):
    with small_disk(tmp_path / "disk", megabytes=1) as folder:
        journal = Journal(folder, life=1)
        journal.write({"event": "train", "step": 0})
        filling = fill(folder)
        for step in range(1, 1000):
            journal.write({"event": "train", "step": step})
        assert len(read_journal(folder)) < 1000
        filling.unlink()
        journal.write({"event": "train", "step": 1000})
        assert [row["step"] for row in read_journal(folder)] == list(range(1001))
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 2
        assert told[0].startswith(f"{folder / 'metrics.jsonl'}: No space left on device; ")
        assert told[1].endswith("can be written again")
        journal.close()


def test_of_too_many_waiting_rows_the_newest_are_kept_and_the_loss_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_WAITING_ROWS", 300)
    with small_disk(tmp_path / "disk", megabytes=1) as folder:
        journal = Journal(folder, life=1)
        filling = fill(folder)
        for step in range(1000):
            journal.write({"event": "train", "step": step})
        kept = (folder / "metrics.jsonl").read_text().count("\n")
        filling.unlink()
        journal.close()
        steps = [row["step"] for row in read_journal(folder)]
        assert steps == [*range(kept + 1), *range(1000 - 299, 1000)]
        assert f"; {1000 - len(steps)} rows are lost" in caplog.text


def test_a_run_goes_on_when_wandb_does_not(tmp_path, caplog):
    config = WandbConfig(mode="offline", project="refused/by/wandb")
    run = WandbRun(tmp_path, config, recipe={"a": 1}, enabled=True)
    run.log({"loss": 1.0}, step=1)
    run.summarize({"top1": 2.0})
    run.finish()
    assert "goes on without Weights & Biases" in caplog.text


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 50)), min_size=1, max_size=8))
def test_worlds_take_the_totals_apart_where_the_number_of_ranks_changed(lives):
    """Lives are (ranks, steps); an image costs a rank a second."""
    worlds, totals = [], {"steps": 0, "train_seconds": 0.0}
    for ranks, steps in lives:
        begin_world(worlds, ranks=ranks, device="cpu", totals=totals)
        totals = {"steps": totals["steps"] + steps, "train_seconds": totals["train_seconds"] + steps / ranks}
    found = split_by_world(json.loads(json.dumps(worlds)), totals)
    assert sum(world["steps"] for world in found) == totals["steps"]
    for world in found:
        assert world["steps"] > 0
        assert world["train_seconds"] == pytest.approx(world["steps"] / world["ranks"])
    assert [world["first_step"] for world in found] == [
        sum(world["steps"] for world in found[:n]) for n in range(len(found))
    ]


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
