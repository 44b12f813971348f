"""Packing: every image byte for byte, complete or absent, and readable by what others use."""

import errno
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from packed import write_folder

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import open_source, pack, scan_folder
from cyclebnn_dist.data.pack import ShardSize, pack_folder, parse_shard_size, plan_shards, sample_keys


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder")


def shards_of(path, split="train", num_classes=2):
    return open_source(DataConfig(path=str(path)), split, num_classes=num_classes)


def contents(root):
    return {
        str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_is_packed_byte_for_byte_with_its_class(folder, tmp_path, split):
    """Images would be lost, re-encoded or mislabelled on the way."""
    assert pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=4))
    original, packed = scan_folder(folder, split, num_classes=2), shards_of(tmp_path / "out", split)
    assert packed.classes == original.classes
    found = {key: (packed.encoded(i), packed.labels[i]) for i, key in enumerate(packed.keys)}
    wanted = {
        file.removesuffix(".JPEG"): (original.encoded(i), original.labels[i])
        for i, file in enumerate(original.files)
    }
    assert found == wanted
    assert max(packed.shard_sizes) <= 4
    mixed = [len(set(packed.labels[start : start + 8])) for start in (0, 8, 16)]
    assert mixed == [2, 2, 2]


def test_standard_readers_read_the_shards(folder, tmp_path):
    """The shards would be of use here only."""
    pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=13))
    paths = sorted(map(str, (tmp_path / "out" / "train").glob("*.tar")))
    packed = shards_of(tmp_path / "out")

    @pipeline_def(batch_size=26, num_threads=1, device_id=None)
    def theirs():
        return tuple(
            fn.readers.webdataset(
                paths=paths,
                index_paths=[path.replace(".tar", ".idx") for path in paths],
                ext=["jpeg", "cls"],
                missing_component_behavior="error",
            )
        )

    images, classes = theirs().run()
    for index in range(26):
        assert bytes(images.at(index)) == packed.encoded(index)
        assert int(bytes(classes.at(index))) == packed.labels[index]
    with tarfile.open(paths[0]) as archive:
        names = archive.getnames()
    assert len(names) == 26
    assert names[0].partition("/")[0] in ("cat", "dog")


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Two machines would hold different sets under one name, and a run could not move between them."""
    for name, seed, workers in (("a", 0, 1), ("b", 0, 3), ("c", 1, 2)):
        pack_folder(
            folder,
            tmp_path / name,
            shard_size=ShardSize(images=5),
            seed=seed,
            workers=workers,
            splits=["train"],
        )
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["train/train-000000.tar"] != c["train/train-000000.tar"]
    assert not (tmp_path / "a" / "val").exists()
    assert shards_of(tmp_path / "a").digest == shards_of(tmp_path / "b").digest


def test_awkward_names_keep_their_images_apart(folder, tmp_path):
    """Readers cut names at the first dot: images would be taken for parts of one sample."""
    place = folder / "train" / "cat"
    other = next((folder / "train" / "dog").iterdir()).read_bytes()
    names = ["a.b.jpg", "a.c.jpg", "a.jpg", "a.png", "two words.jpg", "ü%.jpeg", "x" * 150 + ".jpg"]
    for number, name in enumerate(names):
        (place / name).write_bytes(other + bytes([number]))
    pack_folder(folder, tmp_path / "out", splits=["train"])
    packed = shards_of(tmp_path / "out")
    assert len(packed) == 26 + len(names) == len(set(packed.keys))
    found = {packed.encoded(index) for index in range(len(packed))}
    assert {other + bytes([number]) for number in range(len(names))} <= found
    assert {"cat/a%2Eb", "cat/a%2Ejpg", "cat/a%2Epng", "cat/two%20words"} <= set(packed.keys)
    assert all(" " not in key and key.isascii() for key in packed.keys)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", ShardSize(images=1000)),
        ("256MB", ShardSize(num_bytes=256_000_000)),
        ("1 GiB", ShardSize(num_bytes=2**30)),
        ("4096b", ShardSize(num_bytes=4096)),
    ],
)
def test_sizes_are_images_or_bytes(text, size):
    assert parse_shard_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5GB", "3k", "0MB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(RecipeError, match="--shard-size"):
        parse_shard_size(text)


def test_shards_of_bytes_are_of_about_equal_size(folder):
    """One shard would be many times the others, and a window with it."""
    images = scan_folder(folder, "train", num_classes=2)
    weights = np.array([os.path.getsize(images.path(index)) for index in range(len(images))])
    plan = plan_shards(images, ShardSize(num_bytes=int(weights.sum()) // 5), seed=0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(26))
    sums = [weights[part].sum() for part in plan]
    assert 5 <= len(plan) <= 6
    assert max(sums) <= weights.sum() / len(plan) + weights.max()
    assert [len(part) for part in plan_shards(images, ShardSize(images=10), seed=0)] == [9, 9, 8]


def test_a_failure_leaves_nothing_and_can_be_run_again(folder, tmp_path, monkeypatch):
    """A half-packed set would be taken for the whole."""
    original = pack.write_shard

    def fail(path, *args, **kwargs):
        if path.name == "val-000001.tar":
            raise OSError("no space left on device")
        original(path, *args, **kwargs)

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(pack, "write_shard", fail)
    with pytest.raises(RecipeError, match=r"DST: .*no space"):
        pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=5))
    assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.undo()
    assert pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=5))
    assert not pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=5))
    assert sorted(os.listdir(tmp_path)) == [*before, "out"]


def test_a_killed_packing_is_done_again(folder, tmp_path):
    """What a killed job left would be trained on, or be in the way for ever."""
    code = (
        "import sys, time\nfrom cyclebnn_dist.data import pack\n"
        "pack.pack_folder(sys.argv[1], sys.argv[2], shard_size=pack.ShardSize(images=2), workers=1,"
        " progress=lambda done, total: (print(done, flush=True), time.sleep(0.05)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "9":
        assert process.poll() is None
    with pytest.raises(RecipeError, match="another process"):
        pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists()
    pack_folder(folder, tmp_path / "out", shard_size=ShardSize(images=2))
    assert len(shards_of(tmp_path / "out")) == 26
    assert sorted(name for name in os.listdir(tmp_path) if "out" in name) == ["out"]


def test_what_was_written_is_compared(folder, tmp_path, monkeypatch):
    """A disk that loses bytes would be noticed on the third day of training."""
    original = pack.write_index

    def lose_bytes(shard, groups):
        with open(shard, "r+b") as file:
            file.seek(groups[0][0].offset + 20)
            file.write(b"\xff\x00\xff\x00")
        original(shard, groups)

    monkeypatch.setattr(pack, "write_index", lose_bytes)
    with pytest.raises(RuntimeError, match="does not hold what was written"):
        pack_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["file", "other files", "other shards"])
def test_nothing_of_others_is_overwritten(folder, tmp_path, what):
    """A typing error would cost somebody a data set."""
    target = tmp_path / "out"
    if what == "file":
        target.write_text("precious")
    elif what == "other files":
        target.mkdir()
        (target / "precious").write_text("precious")
    else:
        pack_folder(folder, target, seed=1)
    before = target.read_text() if target.is_file() else contents(target)
    with pytest.raises(RecipeError, match="DST"):
        pack_folder(folder, target)
    assert before == (target.read_text() if target.is_file() else contents(target))


def test_the_command_packs_and_names_what_is_wrong(folder, tmp_path, capsys):
    """The README's line would not work."""
    arguments = ["data", "pack", str(folder), str(tmp_path / "out"), "--shard-size", "10", "--split", "val"]
    assert main(arguments) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert len(shards_of(tmp_path / "out", "val")) == 26
    assert main(["data", "pack", str(tmp_path / "nowhere"), str(tmp_path / "b")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments[:3])


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    """One lost file among a million would end the packing without saying which."""
    images = scan_folder(folder, "val", num_classes=2)
    (folder / "val" / images.files[3]).unlink()
    monkeypatch.setattr(pack, "scan_folder", lambda *args, **kwargs: images)
    with pytest.raises(RecipeError, match=images.files[3]):
        pack_folder(folder, tmp_path / "out", splits=["val"])
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch, capsys):
    """A full disk or a read-only one gave a traceback."""
    assert main(["data", "pack", str(folder), "/dev/null/shards"]) == 2
    assert "DST: cannot write /dev/null/shards" in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pack, "write_index", full)
    assert main(["data", "pack", str(folder), str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_keys_differ_whatever_extensions_pile_up():
    files = ["c/a.jpg", "c/a.png", "c/a.jpg.jpg", "c/b.png.jpg", "c/b.jpg"]
    keys = sample_keys(files)
    assert len(set(keys)) == len(files)
    assert not any("." in key for key in keys)
