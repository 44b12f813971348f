"""The record of images in flight. Without it an image that takes DALI down with it would end every start, unnamed."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from launching import TINY_RECIPE, Launched
from pictures import encoded, jpeg_of_impossible_depth, write_files
from worlds import make_world

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, in_flight, scan_folder
from cyclebnn_dist.data.in_flight import FOLDER, Record, check_left_behind, left_behind
from launch.processes import manner_of_end

CONFIG = DataConfig(image_size=16, threads=1)
COUNT = 24


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        write_files(tmp_path / split / "x", {f"{index:02d}.jpg": encoded() for index in range(COUNT)})
    return tmp_path


def scan(folder, split):
    return scan_folder(folder, split, num_classes=1)


def loaders(folder, **kwargs):
    place = {"batch_size": 4, "rank": 0, "world_size": 1, "device": torch.device("cpu"), **kwargs}
    return (
        TrainLoader(scan(folder, "train"), CONFIG, seed=1, **place),
        EvalLoader(scan(folder, "val"), CONFIG, **place),
    )


def test_what_a_loader_hands_to_dali_is_on_disk_before_and_is_removed_at_its_end(folder, caplog):
    records = folder / FOLDER
    train, val = loaders(folder, in_flight=records)
    images = {"train": scan(folder, "train"), "val": scan(folder, "val")}
    assert not records.exists()
    for _ in range(8):
        train.next()
        waiting = {index for split, index in left_behind(records, images) if split == "train"}
        assert waiting >= set(json.loads((records / "train_rank0.json").read_text())["ids"])
        following, _ = loaders(folder)
        following.seek(train.position)
        assert waiting >= set(following.next().ids.tolist())
        assert len(waiting) <= 4 * (CONFIG.prefetch + 1)
    seen = []
    for batch in val:
        seen += batch.ids.tolist()
        expected = set(range(len(seen), min(len(seen) + 4, COUNT)))
        assert {index for split, index in left_behind(records, images) if split == "val"} >= expected
    val.close()
    assert [path.name for path in records.iterdir()] == ["train_rank0.json"]
    train.close()
    assert not records.exists()
    assert not [record for record in caplog.records if record.name == in_flight.__name__]


def test_without_a_folder_nothing_is_kept(folder, monkeypatch):
    """Benchmarks and evaluation would leave files wherever they were started."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    for loader in loaders(folder):
        loader.next() if isinstance(loader, TrainLoader) else list(loader)
        loader.close()
    assert sorted(folder.rglob("*")) == before


def test_a_record_is_read_back_however_its_writer_died(folder):
    """The one image to blame would be missed for want of a newline."""
    records, images = folder / "records", {"train": scan(folder, "train")}
    record = Record(records, split="train", rank=0, digest=images["train"].digest)
    record.write(range(20))
    longer = (records / "train_rank0.json").read_bytes()
    record.write([7, 5])
    shorter = (records / "train_rank0.json").read_bytes()
    assert left_behind(records, images) == [("train", 5), ("train", 7)]
    (records / "train_rank0.json").write_bytes(shorter + longer[len(shorter) :])
    assert left_behind(records, images) == [("train", 5), ("train", 7)]
    for number, content in enumerate((b"", longer[:30], b"null", b'{"split": "train"}', b"\xff\xfe")):
        (records / f"train_rank{number + 1}.json").write_bytes(content)
    assert left_behind(records, images) == [("train", 5), ("train", 7)]


@pytest.mark.parametrize("failing", ["makedirs", "pwrite"])
def test_a_disk_that_takes_no_record_is_warned_of_once_and_reading_goes_on(
    folder, failing, monkeypatch, caplog
):
    """A full disk would end a run for the sake of a note about it."""
    (folder / "file").write_text("")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "pwrite":
        monkeypatch.setattr(os, "pwrite", full)
    records = folder / ("file" if failing == "makedirs" else "records") / FOLDER
    train, _ = loaders(folder, in_flight=records)
    with caplog.at_level(logging.WARNING):
        assert [len(train.next().ids) for _ in range(3)] == [4, 4, 4]
        train.close()
        train.next()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "not recorded" in caplog.text
    assert not records.exists()


def test_among_good_images_the_first_that_cannot_be_read_is_named_with_its_cause(folder):
    images = scan(folder, "train")
    bad, gone = (folder / "train" / "x" / f"{index:02d}.jpg" for index in (10, 13))
    gone.unlink()
    assert refuse(images, range(13)) is None
    assert "13.jpg: No such file" in refuse(images, range(COUNT)).problem
    assert "13.jpg: No such file" in refuse(images, [13]).problem
    bad.write_bytes(b"bad")
    assert "10.jpg: not an image" in refuse(images, range(COUNT)).problem
    assert "13.jpg: No such file" in refuse(images, [13, 10]).problem


def refuse(images, ids):
    return in_flight.refuse_unreadable(images, ids, device=torch.device("cpu"))


def check(rank, size, folder):
    world = make_world(rank, size)
    images = (scan_folder(folder, "train", num_classes=1), scan_folder(folder, "val", num_classes=1))
    decoded = []
    problem_of_group = in_flight.Decoding.all_decode
    in_flight.Decoding.all_decode = lambda self, group: decoded.extend(group) or problem_of_group(self, group)
    try:
        check_left_behind(folder / FOLDER, images, world)
    except RecipeError as error:
        return str(error)
    finally:
        in_flight.Decoding.all_decode = problem_of_group
    return len(decoded)


def leave(folder, split, rank, ids, *, digest=None):
    """A record as a life that died leaves it."""
    digest = scan(folder, split).digest if digest is None else digest
    Record(folder / FOLDER, split=split, rank=rank, digest=digest).write(ids)


@pytest.mark.parametrize("content", [jpeg_of_impossible_depth(), b"", b"text"])
@pytest.mark.parametrize(("split", "index"), [("train", 0), ("train", 9), ("val", 3)])
def test_every_rank_names_what_any_life_died_of_until_it_is_mended(ranks, folder, split, index, content):
    for rank in range(5):
        leave(folder, "train", rank, range(2 * rank, 2 * rank + 4))
        leave(folder, "val", rank, [rank])
    bad = folder / split / "x" / f"{index:02d}.jpg"
    bad.write_bytes(content)
    for _ in range(2):
        answers = ranks(2, check, folder)
        assert answers[0] == answers[1]
        assert f"cannot read image {bad}: " in answers[0]
        assert "data.skip_list" in answers[0]
    bad.write_bytes(encoded())
    assert sum(ranks(2, check, folder)) == 12 + 5
    assert not (folder / FOLDER).exists()
    assert ranks(2, check, folder) == [0, 0]


def test_the_record_of_another_data_set_is_removed_unread(ranks, folder):
    """After a skip list its ids mean other images, and a run that could go on would be refused."""
    (folder / "train" / "x" / "03.jpg").write_bytes(b"bad")
    leave(folder, "train", 0, range(8), digest=1)
    leave(folder, "train", 1, [3], digest=scan(folder, "val").digest + 1)
    assert ranks(2, check, folder) == [0, 0]
    assert not (folder / FOLDER).exists()


def test_a_rank_that_died_of_a_fault_is_said_to_be_worth_another_start():
    for number in (7, 11):
        assert "starting again names it" in manner_of_end(number)
    assert "image" not in manner_of_end(9)


@pytest.fixture
def start(tmp_path, tiny_data):
    """Start a run of a copy of the tiny data set, whose images are ``tmp_path / "data"``."""
    shutil.copytree(tiny_data, tmp_path / "data")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tmp_path / "data"))
    launched = []

    def start(*overrides, ranks):
        overrides = (*overrides, "train.epochs=1", "wandb.mode=disabled")
        launched.append(Launched(recipe, tmp_path / "run", ranks=ranks, overrides=overrides))
        return launched[-1]

    yield start
    for one in launched:
        if not one.ended:
            one.end()


def test_a_killed_run_names_what_it_was_reading_goes_on_once_that_is_mended_and_leaves_nothing(
    start, tmp_path
):
    killed = start(ranks=2)
    killed.wait_for_step(3, seconds=120)
    killed.kill_rank(1)
    status, output = killed.wait(seconds=60)
    assert status == 1, output
    records = tmp_path / "run" / FOLDER
    images = scan_folder(tmp_path / "data", "train", num_classes=10)
    bad = Path(images.path(json.loads((records / "train_rank1.json").read_text())["ids"][-1]))
    whole = bad.read_bytes()
    bad.write_bytes(jpeg_of_impossible_depth())
    status, output = start(ranks=2).wait(seconds=120)
    assert status == 2, output
    assert f"cannot read image {bad}" in output
    assert "images in flight" in output
    assert "resuming" not in output
    bad.write_bytes(whole)
    status, output = start(ranks=2).wait(seconds=240)
    assert status == 0, output
    assert "images in flight" in output
    assert "resuming from the checkpoint" in output
    assert not records.exists()


def test_an_image_that_takes_dali_down_is_named_at_the_second_start_at_the_latest(start, tmp_path):
    bad = sorted((tmp_path / "data" / "train").glob("*/*.JPEG"))[17]
    bad.write_bytes(jpeg_of_impossible_depth())
    big = ("train.global_batch_size=64", "data.threads=3")
    status, output = start(*big, ranks=1).wait(seconds=120)
    if status != 2:
        assert "SIGSEGV (if an image was to blame, starting again names it)" in output
        status, output = start(*big, ranks=1).wait(seconds=120)
    assert status == 2, output
    assert f"cannot read image {bad}" in output
