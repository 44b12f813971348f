"""CIFAR's published files: the papers' pixels and crops, and a plain word where files are missing or wrong."""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
import torch

from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, open_source
from cyclebnn_dist.data.cifar import CIFAR_SETS
from cyclebnn_dist.data.order import epoch_permutation, uniforms
from cyclebnn_dist.data.pipeline import num_columns, training_feeds

CPU = torch.device("cpu")
CONFIG = DataConfig(
    format="cifar10", image_size=32, threads=1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), path="x"
)
EACH = 6
TRAIN10 = [f"data_batch_{number}.bin" for number in range(1, 6)]


def records(count, *, label_bytes, num_classes, seed):
    """Label bytes and planar images, [count, label_bytes + 3072]."""
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, size=(count, label_bytes + 3072)).astype(np.uint8)
    content[:, 0] = random.integers(0, 20, size=count)
    content[:, label_bytes - 1] = random.integers(0, num_classes, size=count)
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both sets in the published form, with 30 and 12 images of each."""
    root = tmp_path_factory.mktemp("cifar")
    ten, hundred = root / "cifar-10-batches-bin", root / "cifar-100-binary"
    ten.mkdir()
    hundred.mkdir()
    for seed, name in enumerate([*TRAIN10, "test_batch.bin"]):
        count = 12 if name == "test_batch.bin" else EACH
        records(count, label_bytes=1, num_classes=10, seed=seed).tofile(ten / name)
    (ten / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    for seed, (name, count) in enumerate((("train.bin", 30), ("test.bin", 12))):
        records(count, label_bytes=2, num_classes=100, seed=20 + seed).tofile(hundred / name)
    return root


def source_of(folder, split="train", *, name="cifar10", **settings):
    config = dataclasses.replace(CONFIG, path=str(folder), format=name, **settings)
    return open_source(config, split, num_classes=CIFAR_SETS.get(name, CIFAR_SETS["cifar10"]).num_classes)


def train_loader(source, *, batch_size=6, rank=0, world_size=1, seed=7, config=CONFIG):
    return TrainLoader(
        source, config, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, device=CPU
    )


def take(loader, count):
    return [loader.next() for _ in range(count)]


def stored(folder, files, label_bytes):
    """Labels and images [N, 32, 32, 3], straight from the bytes."""
    labels, images = [], []
    for file in files:
        content = (folder / file).read_bytes()
        size = label_bytes + 3072
        for start in range(0, len(content), size):
            labels.append(content[start + label_bytes - 1])
            planes = [content[start + label_bytes + 1024 * c :][:1024] for c in range(3)]
            images.append(np.stack([np.frombuffer(p, np.uint8).reshape(32, 32) for p in planes], axis=-1))
    return labels, np.stack(images)


@pytest.mark.parametrize(
    ("name", "split", "subfolder", "files", "label_bytes"),
    [
        ("cifar10", "train", "cifar-10-batches-bin", TRAIN10, 1),
        ("cifar10", "val", "cifar-10-batches-bin", ["test_batch.bin"], 1),
        ("cifar100", "train", "cifar-100-binary", ["train.bin"], 2),
        ("cifar100", "val", "cifar-100-binary", ["test.bin"], 2),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_evaluation_takes_the_published_images_as_they_are(
    folder, name, split, subfolder, files, label_bytes, inside
):
    """Colours, rows or the coarse and fine classes would be mixed up."""
    source = source_of(folder / subfolder if inside else folder, split, name=name)
    labels, images = stored(folder / subfolder, files, label_bytes)
    assert source.labels.tolist() == labels
    loader = EvalLoader(source, CONFIG, batch_size=7, rank=0, world_size=1, device=CPU, channels_last=inside)
    seen = 0
    for batch in loader:
        expected = (images[batch.ids.numpy()] / 255 - CONFIG.mean) / CONFIG.std
        assert np.allclose(batch.images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
        assert batch.labels.tolist() == [labels[index] for index in batch.ids]
        seen += len(batch.ids)
    assert seen == len(labels)


def test_training_pads_crops_and_flips_as_the_papers_do(folder):
    """Accuracy would fall short of the papers for another augmentation."""
    source = source_of(folder)
    _, images = stored(folder / "cifar-10-batches-bin", TRAIN10, 1)
    loader = train_loader(source, batch_size=10)
    steps, starts, flips = 3, set(), []
    for epoch in range(8):
        random = uniforms(range(30), num_columns(CONFIG), seed=7, epoch=epoch)
        feeds = training_feeds(CONFIG, random)
        order = epoch_permutation(30, seed=7, epoch=epoch)
        for step, batch in enumerate(take(loader, steps)):
            assert batch.ids.tolist() == order[10 * step : 10 * step + 10].tolist()
            for row, index in enumerate(batch.ids.tolist()):
                place = 10 * step + row
                padded = np.zeros((40, 40, 3))
                padded[4:36, 4:36] = images[index]
                y, x = np.floor(feeds["crop_place"][place] * 9).astype(int)
                crop = padded[y : y + 32, x : x + 32]
                if feeds["mirror"][place]:
                    crop = crop[:, ::-1]
                expected = (crop / 255 - CONFIG.mean) / CONFIG.std
                assert np.allclose(batch.images[row].permute(1, 2, 0).numpy(), expected, atol=1e-5)
                starts.add((int(y), int(x)))
                flips.append(feeds["mirror"][place])
    assert {y for y, _ in starts} == {x for _, x in starts} == set(range(9))
    assert 0.35 < np.mean(flips) < 0.65


def test_a_restart_is_exact_also_on_other_ranks(folder):
    """A pre-empted run would not equal the undisturbed one."""
    source = source_of(folder)
    config = dataclasses.replace(CONFIG, augment="randaugment")
    whole = take(train_loader(source, config=config), 9)
    before = train_loader(source, config=config)
    take(before, 3)
    state = json.loads(json.dumps(before.state_dict()))
    group = [train_loader(source, batch_size=2, rank=r, world_size=3, config=config) for r in range(3)]
    for loader in group:
        loader.load_state_dict(state)
    for step in range(3, 9):
        parts = [loader.next() for loader in group]
        assert [index for part in parts for index in part.ids.tolist()] == whole[step].ids.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)


def test_the_set_has_a_stable_digest_and_travels_small(folder, tmp_path):
    """Ranks would be sent every image, or a run go on with others."""
    source = source_of(folder)
    source.pixels(np.arange(3))
    sent = pickle.dumps(source)
    assert len(sent) < 5000
    copy = pickle.loads(sent)
    assert np.array_equal(copy.pixels(np.array([29, 0, 7])), source.pixels(np.array([29, 0, 7])))
    assert copy.digest == source.digest == source_of(folder / "cifar-10-batches-bin").digest
    assert (
        len({source.digest, source_of(folder, "val").digest, source_of(folder, name="cifar100").digest}) == 3
    )
    assert source.classes == list("abcdefghij")
    assert source_of(folder, name="cifar100").classes[:3] == ["0", "1", "2"]
    assert source.name(8).endswith("data_batch_2.bin, image 2")


def spoiled(tmp_path, folder, file, change):
    for each in (folder / "cifar-10-batches-bin").iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    change(tmp_path / file)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "does not exist"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "no multiple of 3073"),
        (lambda file: file.write_bytes(b""), "has 0 bytes"),
        (lambda file: file.write_bytes(b"\x0a" + file.read_bytes()[1:]), "image 0 has class 10"),
    ],
)
def test_a_wrong_file_is_named(folder, tmp_path, change, message):
    """A download that broke off would be trained on."""
    path = spoiled(tmp_path, folder, "data_batch_3.bin", change)
    with pytest.raises(RecipeError, match=r"data_batch_3\.bin") as error:
        source_of(path)
    assert error.value.key == "data.path"
    assert message in str(error.value)


def test_a_missing_set_says_what_to_put_where(tmp_path):
    """The user would have to read the code."""
    with pytest.raises(RecipeError) as error:
        source_of(tmp_path)
    assert str(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin") in error.value.problem
    assert all(name in error.value.cure for name in (*TRAIN10, "test_batch.bin"))
    with pytest.raises(RecipeError, match=r"train\.bin, test\.bin"):
        source_of(tmp_path, name="cifar100")


def test_settings_that_cannot_be_are_refused(folder):
    """A recipe for other images would train on something else than it says."""
    with pytest.raises(RecipeError, match=r"data\.image_size"):
        source_of(folder, image_size=224)
    with pytest.raises(RecipeError, match=r"data\.shuffle_shards"):
        source_of(folder, shuffle_shards=2)
    with pytest.raises(RecipeError, match=r"model\.num_classes"):
        open_source(dataclasses.replace(CONFIG, path=str(folder)), "train", num_classes=100)
    with pytest.raises(RecipeError, match="more than one data set"):
        source_of(folder, name="auto")
    assert source_of(folder / "cifar-10-batches-bin", name="auto").kind == "pixels"


def test_another_number_of_images_and_imagenets_colours_are_warned_of(folder, caplog):
    """Half a set, or inputs of another scale than the papers', would go unnoticed."""
    with caplog.at_level(logging.WARNING):
        source_of(folder)
    assert "holds 6 images, 10000 as published" in caplog.text
    assert "data.mean" not in caplog.text
    defaults = DataConfig()
    with caplog.at_level(logging.WARNING):
        source_of(folder, mean=defaults.mean, std=defaults.std)
    assert "those of ImageNet; those of cifar10 are data.mean=[0.4914, 0.4822, 0.4465]" in caplog.text
    caplog.clear()
    other = CIFAR_SETS["cifar100"]
    with caplog.at_level(logging.WARNING):
        source_of(folder, mean=list(other.mean), std=other.std)
    assert "those of cifar100;" in caplog.text


def test_the_recipe_takes_as_many_steps_as_published():
    """The run would be compared to a paper that trained for longer or shorter."""
    recipe = load_recipe("recipes/cifar10_resnet18_cyclebnn.yaml")
    assert 50000 // recipe.train.global_batch_size * recipe.train.epochs == 187_500
    assert recipe.data.mean == CIFAR_SETS["cifar10"].mean
    assert recipe.data.std == CIFAR_SETS["cifar10"].std
