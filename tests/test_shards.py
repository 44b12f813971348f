"""Tar shards: the same training as from folders, whatever reads them, and no damaged shard unnoticed."""

import dataclasses
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import jpeg, plain_members, write_folder, write_tar

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, open_source, shards
from cyclebnn_dist.data.pack import ShardSize, pack_folder
from cyclebnn_dist.data.shard_index import list_members, read_index, read_shard, write_index

CPU = torch.device("cpu")
COUNT = 26


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same 26 images as class folders and as seven shards."""
    root = tmp_path_factory.mktemp("formats")
    write_folder(root / "folder")
    pack_folder(root / "folder", root / "shards", shard_size=ShardSize(images=4), workers=2)
    return root


def config_of(path, **settings):
    return DataConfig(**{"path": str(path), "image_size": 16, "threads": 1, **settings})


def source_of(path, split="train", *, num_classes=2, **settings):
    return open_source(config_of(path, **settings), split, num_classes=num_classes)


def train_loader(source, *, batch_size=4, rank=0, world_size=1, **settings):
    config = config_of("anywhere", **settings)
    return TrainLoader(
        source, config, batch_size=batch_size, rank=rank, world_size=world_size, seed=7, device=CPU
    )


def take(loader, count):
    return [loader.next() for _ in range(count)]


def flat(batches):
    return [index for batch in batches for index in batch.ids.tolist()]


def assert_same(left, right):
    assert [batch.ids.tolist() for batch in left] == [batch.ids.tolist() for batch in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def in_order_of_shards(places):
    """The folder's images, numbered as they lie in the shards."""
    folder, packed = source_of(places / "folder"), source_of(places / "shards")
    ids = {file.rpartition(".")[0]: index for index, file in enumerate(folder.files)}
    order = [ids[key] for key in packed.keys]
    reordered = dataclasses.replace(
        folder, files=[folder.files[index] for index in order], labels=folder.labels[order]
    )
    return reordered, packed


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_shards_and_folders_give_the_same_batches(places, augment):
    """A data set would train differently for being packed."""
    folder, packed = in_order_of_shards(places)
    assert packed.labels.tolist() == folder.labels.tolist()
    assert packed.classes == folder.classes == ["cat", "dog"]
    left, right = (
        take(train_loader(source, batch_size=13, augment=augment), 5) for source in (folder, packed)
    )
    assert_same(left, right)


def test_evaluation_sees_the_same_pixels_in_shards_and_folders(places):
    """Accuracy would change with the format."""
    seen = []
    for name in ("folder", "shards"):
        source = source_of(places / name, "val")
        loader = EvalLoader(source, config_of("x"), batch_size=4, rank=0, world_size=1, device=CPU)
        seen.append(
            {Path(name_of(source, index)).stem: image for batch in loader for index, image in pairs(batch)}
        )
    assert len(seen[0]) == COUNT
    assert all(torch.equal(image, seen[1][name]) for name, image in seen[0].items())


def name_of(source, index):
    return source.name(index).rpartition(": ")[2]


def pairs(batch):
    return zip(batch.ids.tolist(), batch.images, strict=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [0, 2])
def test_an_epoch_reads_every_image_once_on_any_number_of_ranks(places, world_size, window):
    """Images would be seen twice, or never."""
    source = source_of(places / "shards")
    batch_size = {1: 13, 2: 13, 3: 4, 4: 6}[world_size]
    loaders = [
        train_loader(source, batch_size=batch_size, rank=rank, world_size=world_size, shuffle_shards=window)
        for rank in range(world_size)
    ]
    for _ in range(2):
        seen = [index for loader in loaders for index in flat(take(loader, loader.steps_per_epoch))]
        assert len(seen) == len(set(seen)) == COUNT // (batch_size * world_size) * batch_size * world_size
    for loader in loaders:
        loader.close()
    val = source_of(places / "shards", "val")
    counted = Counter(
        index
        for rank in range(world_size)
        for batch in EvalLoader(
            val, config_of("x"), batch_size=4, rank=rank, world_size=world_size, device=CPU
        )
        for index in batch.ids.tolist()
    )
    assert counted == Counter(range(COUNT))


def test_a_window_keeps_reads_within_few_shards(places):
    """On a network file system every image would come from another file."""
    source = source_of(places / "shards")
    loader = train_loader(source, batch_size=2, shuffle_shards=2)
    ids = np.array(flat(take(loader, 13)))
    shard = np.searchsorted(np.cumsum(source.shard_sizes), ids, side="right")
    sizes = [
        sum(np.array(source.shard_sizes)[list(dict.fromkeys(shard.tolist()))[:count]]) for count in (2, 4)
    ]
    assert len(set(shard[: sizes[0]])) == 2
    assert len(set(shard[: sizes[1]])) == 4
    assert len(set(np.diff(ids))) > 5


@pytest.mark.parametrize(
    ("window", "augment"), [(0, "none"), (2, "none"), (3, "none"), (2, "trivialaugment")]
)
def test_a_restart_goes_on_exactly_also_on_other_ranks(places, window, augment):
    """A pre-empted run would not equal the undisturbed one."""
    source = source_of(places / "shards")
    settings = {"shuffle_shards": window, "augment": augment}
    whole = take(train_loader(source, batch_size=4, **settings), 12)
    for stop in (1, 4, 6, 8) if augment == "none" else (4,):
        before = train_loader(source, batch_size=4, **settings)
        take(before, stop)
        state = json.loads(json.dumps(before.state_dict()))
        before.close()
        after = train_loader(source, batch_size=4, threads=2, prefetch=3, **settings)
        after.load_state_dict(state)
        assert_same(take(after, 4), whole[stop : stop + 4])
        after.close()
        pair = [train_loader(source, batch_size=2, rank=rank, world_size=2, **settings) for rank in range(2)]
        for loader in pair:
            loader.load_state_dict(state)
        for step in range(stop, stop + 3):
            parts = [loader.next() for loader in pair]
            assert flat(parts) == whole[step].ids.tolist()
            assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)


def test_another_window_is_another_order_and_said(places, caplog):
    """Images would be repeated within an epoch without a word."""
    source = source_of(places / "shards")
    before = train_loader(source)
    take(before, 3)
    after = train_loader(source, shuffle_shards=2)
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(before.state_dict())
    assert "data.shuffle_shards changed" in caplog.text
    caplog.clear()
    explicit = train_loader(
        source, format="webdataset", shuffle_shards=99
    )  # all seven at once: the same order
    explicit.load_state_dict(before.state_dict())
    assert not caplog.records
    assert_same(take(explicit, 2), take(before, 2))


def test_an_index_is_that_of_wds2idx_and_not_needed(places, tmp_path, caplog):
    """Data sets that DALI's users have already would have to be made again."""
    shard = places / "shards" / "train" / "train-000000.tar"
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, str(shard), str(tmp_path / "theirs.idx")], check=True, capture_output=True)
    assert (tmp_path / "theirs.idx").read_text() == shard.with_suffix(".idx").read_text()
    assert read_index(shard) == list_members(shard)

    with_index = source_of(places / "shards")
    bare = tmp_path / "bare" / "train"
    bare.mkdir(parents=True)
    for file in (places / "shards" / "train").glob("*.tar"):
        (bare / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bare" / "classes.json").write_text('["cat", "dog"]')
    with caplog.at_level(logging.INFO):
        without = source_of(tmp_path / "bare")
    assert "7 of 7 shards have no .idx file" in caplog.text
    assert without.digest == with_index.digest
    assert [without.encoded(i) for i in range(COUNT)] == [with_index.encoded(i) for i in range(COUNT)]


def test_shards_of_others_are_read(tmp_path):
    """Only what this project packed could be trained on."""
    members = [("./notes", b"x"), *plain_members(3), ("000003.json", b"{}"), ("000003.PNG", jpeg(9))]
    write_tar(tmp_path / "train" / "a.tar", [*members, ("000003.cls", b"1\n")])
    write_tar(tmp_path / "train" / "b.tar", plain_members(2))
    source = source_of(tmp_path)
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert source.classes == ["0", "1"]
    assert source.shard_sizes == [4, 2]
    assert source.name(5) == f"{tmp_path}/train/b.tar: 000001"
    assert source.encoded(3) == jpeg(9)
    again = source_of(tmp_path)
    assert again.digest == source.digest
    write_tar(tmp_path / "train" / "b.tar", plain_members(2, first=2))
    assert source_of(tmp_path).digest != source.digest


def spoil_index(shard):
    index = shard.with_suffix(".idx")
    index.write_text(index.read_text().replace(" 512 ", " 1024 ", 1).replace(" 1 ", " 2 "))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: write_tar(shard, plain_members(3)), "does not fit a.tar"),
        (lambda shard: write_tar(shard, plain_members(5)), "does not fit a.tar: which goes on"),
        (lambda shard: write_tar(shard, [("x.txt", b"y"), *plain_members(4)]), "does not fit a.tar"),
        (lambda shard: os.truncate(shard, shard.stat().st_size // 3), "does not fit a.tar: which has"),
        (spoil_index, "does not fit a.tar"),
        (lambda shard: shard.with_suffix(".idx").write_text("v1.2 7\nx"), "cannot be read"),
        (lambda shard: shard.with_suffix(".idx").write_text("v1.1 1\njpg 512 3"), "cannot be read"),
        (lambda shard: shard.with_suffix(".idx").write_text(""), "cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, spoil, message):
    """Images would be cut from the wrong bytes, or labels be those of others."""
    shard = write_tar(tmp_path / "train" / "a.tar", plain_members(4))
    write_index(shard, list_members(shard))
    assert len(source_of(tmp_path)) == 4
    spoil(shard)
    with pytest.raises(RecipeError, match=r"a\.idx") as error:
        source_of(tmp_path)
    assert message in str(error.value)
    assert "wds2idx" in str(error.value)


@pytest.mark.parametrize("cut", ["header", "first image", "last class", "end"])
def test_a_truncated_shard_without_index_is_refused(tmp_path, cut):
    """The images behind the cut would silently be missing."""
    shard = write_tar(tmp_path / "train" / "a.tar", plain_members(4))
    last = list_members(shard)[-1][-1].offset
    os.truncate(shard, {"header": 100, "first image": 700, "last class": last, "end": last + 512}[cut])
    with pytest.raises(RecipeError, match=r"a\.tar is cut short"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.jpg", jpeg(1))], "sample k of .*a.tar has no class"),
        ([("k.cls", b"0")], "sample k of .*a.tar has no image"),
        ([("k.jpg", jpeg(1)), ("k.png", jpeg(1)), ("k.cls", b"0")], "sample k of .*a.tar has 2 image"),
        ([*plain_members(2), *plain_members(1)], "a.tar holds two samples 000000"),
        ([("k.jpg", jpeg(1)), ("k.cls", b"cat")], "class of sample k of .*a.tar is 'cat'"),
        ([("k.jpg", jpeg(1)), ("k.cls", b"")], "class of sample k"),
        ([("k.jpg", jpeg(1)), ("k.cls", b"-1")], "class of sample k"),
        ([("k.jpg", jpeg(1)), ("k.cls", b"2")], "sample k of .*a.tar is of class 2"),
        ([("readme.txt", b"hello")], "has no image"),
        ([], "holds no samples"),
    ],
)
def test_an_incomplete_sample_is_named(tmp_path, members, message):
    """A job would stop, or train on wrong labels, without saying where."""
    write_tar(tmp_path / "train" / "a.tar", members)
    with pytest.raises(RecipeError, match=message):
        source_of(tmp_path)


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    """One bad image among a million would end the job without saying which."""
    members = plain_members(8)
    members[6] = ("000003.jpg", members[6][1][:200])
    write_tar(tmp_path / "train" / "a.tar", members)
    source = source_of(tmp_path)
    with pytest.raises(RecipeError, match=r"a\.tar: 000003"):
        take(train_loader(source, batch_size=2), 4)
    os.truncate(tmp_path / "train" / "a.tar", 3000)
    with pytest.raises(RecipeError, match=r"cannot read image .*a\.tar: 00000.*cut short"):
        take(train_loader(source, batch_size=2), 4)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ('["cat"]', "model.num_classes", "lists 1 classes"),
        ('{"cat": 0}', "data.path", "no list of class names"),
        ("[", "data.path", "cannot read"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path, content, key, message):
    """Reports would name the wrong classes."""
    write_tar(tmp_path / "train" / "a.tar", plain_members(4))
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(RecipeError, match=message) as error:
        source_of(tmp_path)
    assert error.value.key == key


def test_a_class_without_images_is_warned_of(tmp_path, caplog):
    """A data set of which a part is missing would go unnoticed."""
    write_tar(tmp_path / "train" / "a.tar", plain_members(4))
    with caplog.at_level(logging.WARNING):
        assert len(source_of(tmp_path, num_classes=3)) == 4
    assert "no images of 1 classes" in caplog.text


def test_few_files_stay_open_and_none_closes_under_a_reader(places, monkeypatch):
    """A thousand shards would exhaust the descriptors, or an image be read from another file."""
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    source = source_of(places / "shards")
    expected = [source.encoded(index) for index in range(COUNT)]
    failures = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, COUNT, size=300):
            if source.encoded(int(index)) != expected[index]:
                failures.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert sum(str(places) in path for path in held) <= 2
    copy = pickle.loads(pickle.dumps(source))
    assert copy.encoded(3) == expected[3]


def _is_open(descriptor):
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def test_the_format_is_found_and_said(places, tmp_path, caplog):
    """A data set of another form would need a key that nobody knows of."""
    with caplog.at_level(logging.INFO):
        assert source_of(places / "folder").kind == "paths"
        assert source_of(places / "shards").kind == "encoded"
    assert f"data.format: {places / 'folder'} holds folder" in caplog.text
    assert f"data.format: {places / 'shards'} holds webdataset" in caplog.text
    write_folder(tmp_path, splits=("val",))
    write_tar(tmp_path / "train" / "a.tar", plain_members(4))
    with pytest.raises(RecipeError, match="more than one data set") as error:
        source_of(tmp_path)
    assert "data.format" in error.value.cure
    assert len(source_of(tmp_path, format="webdataset")) == 4
    with pytest.raises(RecipeError, match="no shards in"):
        source_of(tmp_path, "val", format="webdataset")
    with pytest.raises(RecipeError, match="does not exist"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"data\.shuffle_shards"):
        source_of(places / "folder", shuffle_shards=4)


@pytest.mark.parametrize("archive_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("indexed", [False, True])
def test_names_beyond_ascii_are_read(tmp_path, archive_format, indexed):
    """Python's tarfile replaces such letters in the plain header: shards of its own make were refused."""
    shard, key = tmp_path / "0.tar", "h\u00fctte\u2028/" + "\u96ea" * 120
    with tarfile.open(shard, "w", format=archive_format) as archive:
        for name, content in ((f"{key}.jpg", jpeg(9)), (f"{key}.cls", b"1")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    if indexed:
        write_index(shard, list_members(shard))
    assert [(sample.key, sample.label) for sample in read_shard(shard)] == [(key, 1)]


@pytest.mark.parametrize("label", [b"4294967296", b"9" * 5000])
def test_a_class_too_large_for_a_number_is_refused_by_name(tmp_path, label):
    shard = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(9)), ("a.cls", label)])
    with pytest.raises(RecipeError, match=r"class of sample a of .*0\.tar is"):
        read_shard(shard)


@pytest.mark.parametrize(("offset", "size"), [(0, 9), (-512, 9), (512, -1), (512, 10**25)])
def test_an_index_that_points_out_of_its_shard_is_refused(tmp_path, offset, size):
    shard = write_tar(tmp_path / "0.tar", plain_members(2))
    (first, label), *others = list_members(shard)
    write_index(shard, [[replace(first, offset=offset, size=size), label], *others])
    with pytest.raises(RecipeError, match=r"0\.idx does not fit"):
        read_shard(shard)
