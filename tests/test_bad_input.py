"""Bad files. Without these a job would end in its third day without saying which of a million files it stumbled over."""

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import plain_members, write_tar
from pictures import bad_files, encoded, expected_pixels, good_files, write_files

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, open_source, scan_folder
from cyclebnn_dist.data.check import UNREADABLE, check_folder
from cyclebnn_dist.data.check_packed import check_data
from cyclebnn_dist.data.decoding import Decoding, problem_of_file, problem_of_image
from cyclebnn_dist.data.order import windowed_permutation
from cyclebnn_dist.data.pack import pack_folder
from cyclebnn_dist.data.shards import scan_shards
from cyclebnn_dist.data.skip import read_skip_list, without, write_skip_list

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
EXACT = DataConfig(image_size=48, crop_pct=1.0, threads=1, mean=(0.0,) * 3, std=(1.0,) * 3)


def evaluation(images, **kwargs):
    return EvalLoader(images, EXACT, rank=0, world_size=1, device=CPU, **{"batch_size": 4, **kwargs})


def training(images, *, batch_size=2):
    return TrainLoader(images, EXACT, batch_size=batch_size, rank=0, world_size=1, seed=0, device=CPU)


def test_unusual_files_are_read_with_the_right_pixels(tmp_path):
    """Colours of CMYK or 16-bit files would be inverted or cut, and nobody would know."""
    files = good_files()
    write_files(tmp_path / "val" / "x", files)
    images = scan_folder(tmp_path, "val", num_classes=1)
    assert [Path(file).name for file in images.files] == sorted(files)
    shown = torch.cat([batch.images for batch in evaluation(images)])
    for index, file in enumerate(images.files):
        name = Path(file).name
        expected = expected_pixels(name, files[name])[:, 8:56]
        found = shown[index].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - expected).max() < 2.5, name


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_training_and_evaluation_end_with_the_name_of_a_bad_file(tmp_path, name):
    content, word = bad_files()[name]
    files = {f"{index}.jpg": encoded() for index in range(5)}
    for split in ("train", "val"):
        write_files(tmp_path / split / "x", {**files, name: content})
    for split, read in (
        ("train", lambda images: [loader.next() for loader in [training(images)] for _ in range(3)]),
        ("val", lambda images: list(evaluation(images, batch_size=2))),
    ):
        images = scan_folder(tmp_path, split, num_classes=1)
        with pytest.raises(RecipeError) as refused:
            read(images)
        assert f"{tmp_path}/{split}/x/{name}" in refused.value.problem
        assert word in refused.value.problem
        assert "data.skip_list" in refused.value.cure


def test_a_file_that_vanished_is_named(tmp_path):
    write_files(tmp_path / "train" / "x", {f"{index}.jpg": encoded() for index in range(4)})
    images = scan_folder(tmp_path, "train", num_classes=1)
    (tmp_path / "train" / "x" / "2.jpg").unlink()
    loader = training(images)
    with pytest.raises(RecipeError, match=r"x/2\.jpg: No such file"):
        [loader.next() for _ in range(2)]


def test_a_loader_that_met_a_bad_file_can_still_be_set_elsewhere(tmp_path):
    files = {f"{index}.jpg": encoded() for index in range(6)}
    write_files(tmp_path / "train" / "x", files | {"5.jpg": b"bad"})
    loader = training(scan_folder(tmp_path, "train", num_classes=1), batch_size=6)
    with pytest.raises(RecipeError):
        loader.next()
    (tmp_path / "train" / "x" / "5.jpg").write_bytes(encoded())
    loader.seek(0)
    assert len(loader.next().ids) == 6


def test_decoding_names_the_bad_among_good_ones_again_and_again():
    """A decoder that is broken after the first bad file would condemn all after it."""
    one, many = Decoding(), Decoding(batch_size=4)
    good = [np.frombuffer(content, np.uint8) for content in good_files().values()]
    bad = [np.frombuffer(content, np.uint8) for content, _ in bad_files().values()]
    for content in bad:
        assert problem_of_image(content, one)
        assert not many.all_decode([good[0], content, good[1]])
        assert problem_of_image(good[0], one) is None
        assert many.all_decode(good[:4])
    assert [problem_of_image(content, one) for content in good] == [None] * len(good)


DECODES = """
import sys
import numpy as np, torch
sys.path[:0] = [{root!r}, {tests!r}]
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, scan_folder
from cyclebnn_dist.data.check import check_folder

images = scan_folder({folder!r}, "train", num_classes=1)
for _ in range(5):
    loader = EvalLoader(images, DataConfig(), batch_size=40, rank=0, world_size=1, device=torch.device("cpu"))
    try:
        list(loader)
    except RecipeError as error:
        print(error.problem)
for _ in range(5):
    print([problem.path for problem in check_folder({folder!r}, threads=1).problems])
"""


def test_a_file_that_is_no_image_does_not_take_the_process_with_it(tmp_path):
    """DALI's decoder died of it (SIGSEGV), with full batches of larger images about, and named nothing."""
    files = {f"{index:02d}.jpg": encoded(size=(500, 375)) for index in range(40)}
    write_files(tmp_path / "train" / "x", files | {"01.jpg": b"bad"})
    write_files(tmp_path / "val" / "x", {"a.jpg": encoded()})
    script = DECODES.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    told = f"cannot read image {tmp_path}/train/x/01.jpg: not an image"
    assert done.stdout.splitlines() == [told] * 5 + ["['train/x/01.jpg']"] * 5


AS_NOBODY = """
import os, sys
sys.path.insert(0, {root!r})
from cyclebnn_dist.data.check import check_folder
from cyclebnn_dist.data.check_packed import check_data
from cyclebnn_dist.data.order import windowed_permutation
from cyclebnn_dist.data.pack import pack_folder
from cyclebnn_dist.data.shards import scan_shards
from cyclebnn_dist.data.decoding import Decoding, problem_of_file
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(problem_of_file({file!r}, Decoding()))
for problem in check_folder({folder!r}, threads=1).problems:
    print(problem.kind, problem.path, problem.cause)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone who may not read a file")
def test_files_and_folders_without_permission_are_named():
    """Root may read everything, so another user looks."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        write_files(root / "train" / "x", {"open.jpg": encoded(), "locked.jpg": encoded()})
        write_files(root / "train" / "closed", {"inside.jpg": encoded()})
        write_files(root / "val" / "x", {"a.jpg": encoded()})
        locked = root / "train" / "x" / "locked.jpg"
        locked.chmod(0)
        (root / "train" / "closed").chmod(0o700)
        script = AS_NOBODY.format(root=str(ROOT), file=str(locked), folder=folder)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=True
        )
    assert done.stdout.splitlines()[0] == "Permission denied"
    assert f"{UNREADABLE} train/x/locked.jpg Permission denied" in done.stdout
    assert "folder that cannot be listed train/closed Permission denied" in done.stdout
    assert "open.jpg" not in done.stdout


@pytest.fixture
def tree(tmp_path):
    """A data set with one of every problem."""
    root = tmp_path / "set"
    good = encoded()
    for split in ("train", "val"):
        write_files(root / split / "cat", {f"{index}.jpg": good for index in range(40)})
        write_files(root / split / "dog", {"a.png": encoded(kind="PNG"), ".hidden": b"x"})
    write_files(root / "train" / "cat", {name: content for name, (content, _) in bad_files().items()})
    write_files(root / "val" / "dog", {"bad.jpg": b"x"})
    write_files(root / "train" / "empty", {"notes.txt": b"x"})
    write_files(root / "train" / "cat" / "more", {"b.jpg": good})
    write_files(root / "train", {"stray.jpg": good})
    write_files(root / "val" / "Dog", {"c.jpg": good})
    (root / "val" / "cat" / "link.jpg").symlink_to(root / "nowhere")
    (root / "val" / "cat" / "good_link.jpg").symlink_to(root / "val" / "cat" / "0.jpg")
    (root / "val" / "cat" / "itself.jpg").symlink_to("itself.jpg")
    (root / "train" / "itself").symlink_to("itself")
    os.mkfifo(root / "val" / "cat" / "pipe.jpg")
    return root


PROBLEMS = {
    *((UNREADABLE, f"train/cat/{name}") for name in bad_files()),
    (UNREADABLE, "val/dog/bad.jpg"),
    ("class without images", "train/empty"),
    ("unknown extension", "train/empty/notes.txt"),
    ("folder within a class", "train/cat/more"),
    ("file outside class folders", "train/stray.jpg"),
    ("class in one split only", "train/empty"),
    ("class in one split only", "val/Dog"),
    ("class names that differ by case only", "val/Dog"),
    ("broken link", "val/cat/link.jpg"),
    ("broken link", "val/cat/itself.jpg"),
    ("broken link", "train/itself"),
    ("neither file nor folder", "val/cat/pipe.jpg"),
}
LEAD_NOWHERE = {"val/cat/link.jpg", "val/cat/itself.jpg", "val/cat/pipe.jpg"}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_check_finds_every_problem_and_nothing_else(tree, threads):
    told = []
    report = check_folder(tree, threads=threads, progress=lambda *counts: told.append(counts))
    found = [(problem.kind, problem.path) for problem in report.problems]
    assert sorted(found) == sorted(PROBLEMS)
    assert report.images == {"train": 41 + len(bad_files()), "val": 44}
    assert report.classes == {"train": 3, "val": 3}
    total = sum(report.images.values())
    assert told[-1] == (total, total)
    for problem in report.problems:
        _, word = bad_files().get(Path(problem.path).name, (b"", ""))
        assert word in problem.cause


def test_the_command_tells_writes_a_skip_list_and_exits_with_1(tree, tmp_path, capsys):
    """What the check cannot read, training then leaves out; an unlisted file would stop it after all."""
    skip_list = tmp_path / "bad.txt"
    assert main(["data", "check", str(tree), "--threads", "1", "--json", "--out", str(skip_list)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {(problem["kind"], problem["path"]) for problem in report["problems"]} == PROBLEMS
    listed = read_skip_list(skip_list)
    assert set(listed) == {path for kind, path in PROBLEMS if kind == UNREADABLE} | LEAD_NOWHERE
    assert main(["data", "check", str(tree)]) == 1
    told = capsys.readouterr().out
    assert all(path in told for _, path in PROBLEMS)

    (tree / "train" / "empty" / "notes.txt").unlink()
    (tree / "train" / "empty").rmdir()
    (tree / "val" / "Dog" / "c.jpg").rename(tree / "val" / "dog" / "c.jpg")
    (tree / "val" / "Dog").rmdir()
    config = DataConfig(path=str(tree), skip_list=str(skip_list), image_size=48, threads=1)
    for split in ("train", "val"):
        images = open_source(config, split, num_classes=2)
        shown = sum(len(batch.ids) for batch in evaluation(images, batch_size=16))
        assert shown == len(images) == {"train": 41, "val": 43}[split]


def test_a_link_to_nothing_is_refused_by_name_unless_it_is_skipped(tmp_path):
    """It was left out and nobody told: with a mount missing, training would go on with half of its images."""
    for split in ("train", "val"):
        write_files(tmp_path / split / "x", {"a.jpg": encoded(), "b.jpg": encoded()})
    for name, target in (("gone.jpg", "nowhere"), ("itself.jpg", "itself.jpg")):
        (tmp_path / "train" / "x" / name).symlink_to(target)
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(RecipeError, match=r"train/x/gone\.jpg is a link that leads to no file, and 1 more"):
        open_source(config, "train", num_classes=1)
    with pytest.raises(RecipeError, match=r"SRC: .*gone\.jpg"):
        pack_folder(tmp_path, tmp_path / "shards")
    assert len(open_source(config, "val", num_classes=1)) == 2
    skip_list = tmp_path / "skip.txt"
    skip_list.write_text("train/x/gone.jpg\ntrain/x/itself.jpg\n")
    assert len(open_source(replace(config, skip_list=str(skip_list)), "train", num_classes=1)) == 2


def test_the_command_exits_with_0_and_2(tmp_path, capsys):
    for split in ("train", "val"):
        write_files(tmp_path / split / "x", {"a.jpg": encoded()})
    assert main(["data", "check", str(tmp_path), "--out", str(tmp_path / "bad.txt")]) == 0
    assert "no problems" in capsys.readouterr().out
    assert read_skip_list(tmp_path / "bad.txt") == []
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert main(["data", "check", str(tmp_path / "train")]) == 2
    assert main(["data", "check", str(tmp_path), "--threads", "-1"]) == 2
    assert main(["data", "check", str(tmp_path), "--out", "/nowhere/at/all"]) == 2


def images_of(tmp_path, names=("a/1.jpg", "a/2.jpg", "b/1.jpg")):
    for name in names:
        write_files(tmp_path / "train" / Path(name).parent, {Path(name).name: b"x"})
    return scan_folder(tmp_path, "train", num_classes=2)


def test_a_skip_list_leaves_out_what_it_names_and_changes_the_digest(tmp_path, caplog):
    images = images_of(tmp_path)
    with caplog.at_level(logging.INFO):
        rest = without(images, ["train/a/1.jpg", "val/a/2.jpg"], split="train")
    assert rest.files == ["a/2.jpg", "b/1.jpg"]
    assert rest.labels.tolist() == [0, 1]
    assert rest.labels.dtype == images.labels.dtype
    assert rest.classes == images.classes
    assert rest.digest != images.digest
    assert "1 images left out" in caplog.text
    assert without(images, [], split="train").digest == images.digest


def test_names_that_no_file_has_are_warned_of_and_all_of_them_refused(tmp_path, caplog):
    images = images_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        without(images, ["train/a/1.jpg", "train/a/gone.jpg"], split="train")
    assert "a/gone.jpg" in caplog.text
    with pytest.raises(RecipeError, match="none of its 2 lines"):
        without(images, ["train/a/gone.jpg", "val/b/gone.jpg"], split="train")


def test_a_class_that_a_skip_list_empties_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no image of class b"):
        without(images_of(tmp_path), ["train/b/1.jpg"], split="train")


@pytest.mark.parametrize(
    "line",
    [
        "/data/train/a/1.jpg",
        "a/1.jpg",
        "train/1.jpg",
        "train/a/b/1.jpg",
        "./train/a/1.jpg",
        '"train/a/1.jpg',
        "train/a.tar/",
    ],
)
def test_lines_of_another_form_are_refused_with_their_number(tmp_path, line):
    path = tmp_path / "skip.txt"
    path.write_text(f"# comment\n\ntrain/a/1.jpg\n{line}\n")
    with pytest.raises(RecipeError, match="line 4"):
        read_skip_list(path)
    with pytest.raises(RecipeError, match="cannot read"):
        read_skip_list(tmp_path / "none.txt")


def test_a_written_skip_list_reads_back(tmp_path):
    problems = {
        "train/a/one two#3.jpg": "two\nlines",
        "val/b/\udcff.jpg": "odd name",
        "train/a/two\nlines\udcff.jpg": "odd name",
        "train/a/\r.jpg\r": "odd name",
        'val/"b"/"a".jpg': "quotation marks",
        "train/000.tar/folder/b/c": "a key with slashes",
    }
    write_skip_list(tmp_path / "skip.txt", problems, heading=["of a set"])
    assert read_skip_list(tmp_path / "skip.txt") == list(problems)


def test_a_decoding_problem_of_a_folder_is_told(tmp_path):
    assert problem_of_file(tmp_path, Decoding()) == "Is a directory"


def test_a_report_of_odd_names_can_be_printed(tmp_path, monkeypatch):
    """A name that is no UTF-8 ended the command with a traceback, and one of two lines looked like two files."""
    for split in ("train", "val"):
        write_files(tmp_path / split / "x", {"a.jpg": encoded()})
    for name in (b"\xff.jpg", "\u00fc two\nlines.jpg".encode()):
        (tmp_path / "train" / "x" / os.fsdecode(name)).write_bytes(b"bad")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", printed)
    assert main(["data", "check", str(tmp_path)]) == 1
    printed.seek(0)
    told = printed.read()
    assert "  train/x/\\xff.jpg  (not an image)\n" in told
    assert "  train/x/\u00fc two\\nlines.jpg  (not an image)\n" in told


@pytest.fixture
def shards(tmp_path):
    """Two shards a split, one bad image in each split, one shard cut short, a class in train only."""
    root = tmp_path / "shards"
    bad = [("bad.jpg", b"bad"), ("bad.cls", b"1")]
    for split in ("train", "val"):
        write_tar(root / split / "0.tar", plain_members(6))
        write_tar(root / split / "1.tar", [*plain_members(5, first=6), *bad])
    write_tar(root / "train" / "2.tar", [("a/b.png", encoded(kind="PNG")), ("a/b.cls", b"2")])
    whole = write_tar(root / "train" / "3.tar", plain_members(3)).read_bytes()
    (root / "train" / "3.tar").write_bytes(whole[:3000])
    return root


def test_shards_are_checked_and_their_bad_images_skipped(shards, tmp_path, caplog):
    """A bad image in shards of a terabyte meant to pack them again."""
    report = check_data(shards)
    assert [(problem.kind, problem.path) for problem in report.problems] == [
        ("damaged shard", "train/3.tar"),
        ("class in one split only", "train"),
        (UNREADABLE, "train/1.tar/bad"),
        (UNREADABLE, "val/1.tar/bad"),
    ]
    assert report.images == {"train": 13, "val": 12}
    (shards / "train" / "3.tar").unlink()
    config = replace(EXACT, path=str(shards), skip_list=str(tmp_path / "skip.txt"))
    with pytest.raises(RecipeError, match=r"train/1\.tar: bad: not an image") as refused:
        list(evaluation(open_source(replace(config, skip_list=""), "train", num_classes=3)))
    assert "data.skip_list" in refused.value.cure

    assert main(["data", "check", str(shards), "--out", config.skip_list]) == 1
    for split, count in (("train", 12), ("val", 11)):
        every = open_source(replace(config, skip_list=""), split, num_classes=3)
        images = open_source(config, split, num_classes=3)
        assert len(images) == count
        assert images.digest != every.digest
        assert sum(images.shard_sizes) == count
        shown = torch.cat([batch.images for batch in evaluation(images)])
        levels = shown[:11].mean(dim=(1, 2, 3)) * 255
        assert torch.allclose(levels, 8.0 * torch.arange(11), atol=2)
    assert images.name(10).endswith("val/1.tar: 000010")

    Path(config.skip_list).write_text("train/0.tar/000001\ntrain/0.tar/gone\n")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(config, "train", num_classes=3)) == 12
    assert "0.tar/gone" in caplog.text
    for lines, word in (
        ("train/a/1.jpg\nval/9.tar/1", "none of its 2 lines"),
        ("train/2.tar/a/b", "no image of class 2"),
    ):
        Path(config.skip_list).write_text(lines)
        with pytest.raises(RecipeError, match=word):
            open_source(config, "train", num_classes=3)


def test_a_shard_that_a_skip_list_empties_leaves_the_others_in_place(shards):
    images = scan_shards(shards, "val", num_classes=2)
    rest = without(images, [f"val/0.tar/{index:06d}" for index in range(6)], split="val")
    assert rest.shard_sizes == [0, 6]
    assert [rest.name(index) for index in range(6)] == [images.name(index) for index in range(6, 12)]
    assert sorted(windowed_permutation(rest.shard_sizes, window=1, seed=0, epoch=0)) == list(range(6))


def test_the_files_of_cifar_are_checked(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write_files(folder, {"test_batch.bin": bytes(3073 * 2), "data_batch_1.bin": bytes(3000)})
    report = check_data(tmp_path)
    assert report.images == {"train": 0, "val": 2}
    assert [problem.path for problem in report.problems] == ["train"]
    assert "data_batch_1.bin has 3000 bytes" in report.problems[0].cause
