"""The loaders: every image where it belongs, on any number of ranks, before and after a restart."""

import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from nvidia.dali import pipeline_def
from PIL import Image

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, pipeline, scan_folder
from cyclebnn_dist.data.order import epoch_permutation, uniforms
from cyclebnn_dist.data.pipeline import num_columns, training_feeds

CPU = torch.device("cpu")
CONFIG = DataConfig(image_size=16, threads=1)
COUNT = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """26 images in two classes, of differing shapes; image i is about uniform in brightness 9 i."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(COUNT):
            folder = root / split / ("cat" if index < 11 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            shape = (20 + index % 7, 18 + index % 5, 3)
            pixels = np.clip(9 * index + random.integers(-20, 20, size=shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03d}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def images(folder):
    return scan_folder(folder, "train", num_classes=2)


def train_loader(images, *, batch_size=4, rank=0, world_size=1, seed=7, config=CONFIG, **kwargs):
    return TrainLoader(
        images,
        config,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=CPU,
        **kwargs,
    )


def take(loader, count):
    return [loader.next() for _ in range(count)]


def ids_of(batches):
    return [batch.ids.tolist() for batch in batches]


def flat(batches):
    return [index for batch in batches for index in batch.ids.tolist()]


def assert_same(left, right):
    assert ids_of(left) == ids_of(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def test_a_batch_has_the_promised_shapes_and_the_labels_of_its_ids(images):
    """The network would learn the labels of other images."""
    with_layout = train_loader(images, channels_last=True)
    for loader in (train_loader(images), with_layout):
        batch = loader.next()
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.labels.tolist() == images.labels[batch.ids.numpy()].tolist()
        brightness = batch.images.mean(dim=(2, 3)) * torch.tensor(CONFIG.std) + torch.tensor(CONFIG.mean)
        expected = (9 * batch.ids).clamp(10, 245)[:, None] / 255
        assert torch.allclose(brightness, expected.expand(-1, 3), atol=0.05)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_overlap_and_shuffle_it_anew(images, world_size):
    """Images would be seen twice and others never; every epoch would come in the same order."""
    loaders = [train_loader(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = loaders[0].steps_per_epoch
    assert steps == COUNT // (4 * world_size)
    epochs = []
    for epoch in range(3):
        assert all(loader.epoch == epoch for loader in loaders)
        parts = [take(loader, steps) for loader in loaders]
        seen = [index for part in parts for batch in part for index in batch.ids.tolist()]
        assert len(seen) == len(set(seen)) == steps * 4 * world_size
        epochs.append(tuple(seen))
    assert len(set(epochs)) == 3
    assert any(set(epochs[0]) != set(epoch) for epoch in epochs[1:])


def test_another_number_of_ranks_sees_the_same_images_equally_augmented(images):
    """A job requeued on other nodes would train on another data order."""
    alone = take(train_loader(images, batch_size=6), 5)
    pair = [take(train_loader(images, batch_size=3, rank=rank, world_size=2), 5) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert torch.equal(whole.ids, torch.cat([part[step].ids for part in pair]))
        assert torch.equal(whole.images, torch.cat([part[step].images for part in pair]))


def test_the_epoch_ends_where_the_trainer_says(images):
    """With accumulation, loader and schedules would disagree on where an epoch ends."""
    loader = train_loader(images, batch_size=4, steps_per_epoch=4)
    first, second = take(loader, 4), take(loader, 4)
    order = [epoch_permutation(COUNT, seed=7, epoch=epoch)[:16].tolist() for epoch in (0, 1)]
    assert flat(first) == order[0]
    assert flat(second) == order[1]


@pytest.mark.parametrize("augment", ["none", "randaugment", "trivialaugment"])
def test_a_restart_goes_on_with_the_same_pixels_at_any_step(images, augment):
    """A pre-empted run would not equal the undisturbed one."""
    config = dataclasses.replace(CONFIG, augment=augment)
    whole_run = train_loader(images, config=config)
    whole = take(whole_run, 16)
    for stop in (0, 1, 5, 6, 7, 12) if augment == "none" else (1, 6):
        before = train_loader(images, config=config)
        take(before, stop)
        state = json.loads(json.dumps(before.state_dict()))
        assert_same(take(before, 3), whole[stop : stop + 3])
        before.close()
        after = train_loader(images, config=dataclasses.replace(config, threads=2, prefetch=3))
        after.load_state_dict(state)
        assert after.position == stop
        assert_same(take(after, 4), whole[stop : stop + 4])
        after.close()


def test_a_loader_that_has_already_read_can_be_set_back(images):
    """Batches prefetched for the old position would come first."""
    loader = train_loader(images)
    state = loader.state_dict()
    first = take(loader, 5)
    loader.load_state_dict(state)
    assert_same(take(loader, 5), first)


def test_saving_does_not_change_what_follows(images):
    """An extra checkpoint would change the run."""
    quiet, saving = train_loader(images), train_loader(images)
    for _ in range(8):
        saving.state_dict()
        assert_same([saving.next()], [quiet.next()])


def test_a_closed_loader_continues_where_it_was(images):
    """Closing would skip the batches that were prefetched."""
    whole, loader = take(train_loader(images), 5), train_loader(images)
    take(loader, 3)
    loader.close()
    assert_same(take(loader, 2), whole[3:])


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 3)])
def test_the_position_carries_over_exactly_to_another_number_of_ranks(images, ranks, caplog):
    """Images would be repeated or left out after a restart on fewer nodes."""
    old, new = ranks
    before = [train_loader(images, batch_size=12 // old, rank=rank, world_size=old) for rank in range(old)]
    for loader in before:
        take(loader, 3)
    after = [train_loader(images, batch_size=12 // new, rank=rank, world_size=new) for rank in range(new)]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    for _ in range(3):
        continued, expected = ([loader.next() for loader in group] for group in (after, before))
        assert flat(continued) == flat(expected)
        assert torch.equal(torch.cat([b.images for b in continued]), torch.cat([b.images for b in expected]))
    assert not caplog.records


def test_accumulation_may_change_across_a_restart(images):
    """The rest of an epoch would be counted in micro-batches of the old size."""
    before = train_loader(images, batch_size=4, steps_per_epoch=6)
    take(before, 8)
    after = train_loader(images, batch_size=8, steps_per_epoch=3)
    after.load_state_dict(before.state_dict())
    assert (after.epoch, after.position) == (1, 4)
    assert after.next().ids.tolist() == flat(take(before, 2))


@pytest.mark.parametrize(
    ("change", "named"), [({"batch_size": 5}, "global batch"), ({"seed": 8}, "seed"), ({}, "data set")]
)
def test_a_position_that_cannot_be_carried_over_is_said_once(images, folder, change, named, caplog, tmp_path):
    """Samples would silently be others than the log claims."""
    before = train_loader(images, batch_size=4)
    take(before, 9)
    others = images
    if not change:
        others = dataclasses.replace(images, files=[*images.files[:-1], images.files[0]])
    after = train_loader(others, **{"batch_size": 4, **change})
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(before.state_dict())
    assert len(caplog.records) == 1
    assert named in caplog.text
    assert "cannot be carried over" in caplog.text
    assert after.epoch == 1
    seed = change.get("seed", 7)
    remaining = take(after, after.steps_per_epoch - after.position % after.steps_per_epoch)
    order = epoch_permutation(COUNT, seed=seed, epoch=1)
    assert flat(remaining) == order[: len(flat(remaining))].tolist()
    begun = epoch_permutation(COUNT, seed=seed, epoch=2)
    assert after.epoch == 2
    assert after.next().ids.tolist() == begun[: len(after.next().ids)].tolist()


def test_a_second_restart_after_such_a_warning_is_exact(images, caplog):
    """Every later restart would jump again."""
    before = train_loader(images, batch_size=4)
    take(before, 2)
    changed = train_loader(images, batch_size=3)
    changed.load_state_dict(before.state_dict())
    take(changed, 1)
    state = changed.state_dict()
    caplog.clear()
    again = train_loader(images, batch_size=3)
    again.load_state_dict(state)
    assert_same(take(again, 9), take(changed, 9))
    assert not caplog.records


def test_other_augmentation_settings_keep_the_order_and_warn(images, caplog):
    """A resumed run with another crop scale would claim to be exact."""
    before = train_loader(images)
    take(before, 2)
    after = train_loader(images, config=dataclasses.replace(CONFIG, scale=(0.5, 1.0)))
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(before.state_dict())
    assert "pixels may differ" in caplog.text
    assert after.next().ids.tolist() == before.next().ids.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_evaluation_counts_every_image_once_and_again_the_same(folder, world_size):
    """Validation accuracy would depend on the number of GPUs."""
    images = scan_folder(folder, "val", num_classes=2)
    loaders = [
        EvalLoader(images, CONFIG, batch_size=4, rank=rank, world_size=world_size, device=CPU)
        for rank in range(world_size)
    ]
    first = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in first]
    seen = Counter(index for batches in first for batch in batches for index in batch.ids.tolist())
    assert seen == Counter(range(COUNT))
    for batches in first:
        for batch in batches:
            assert batch.labels.tolist() == images.labels[batch.ids.numpy()].tolist()
    for loader, batches in zip(loaders[:3], first, strict=False):
        assert_same(list(loader), batches)


def test_an_evaluation_that_is_broken_off_does_not_leak_into_the_next(folder):
    """Accuracy after an interrupted evaluation would count images twice."""
    images = scan_folder(folder, "val", num_classes=2)
    loader = EvalLoader(images, CONFIG, batch_size=4, rank=0, world_size=1, device=CPU)
    next(iter(loader))
    assert sorted(flat(loader)) == list(range(COUNT))


def test_evaluation_does_not_disturb_training(images, folder):
    """Evaluating more often would change the run."""
    val = scan_folder(folder, "val", num_classes=2)
    evaluation = EvalLoader(val, CONFIG, batch_size=4, rank=0, world_size=1, device=CPU)
    quiet, disturbed = take(train_loader(images), 4), train_loader(images)
    got = []
    for _ in range(4):
        got.append(disturbed.next())
        list(evaluation)
    assert_same(got, quiet)


def test_evaluation_crops_the_centre_of_the_resized_image(tmp_path):
    """Accuracy would be measured on other pixels than timm's crop_pct means."""
    (tmp_path / "val" / "x").mkdir(parents=True)
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[8:56, 40:88] = 255
    Image.fromarray(pixels).save(tmp_path / "val" / "x" / "a.png")
    images = scan_folder(tmp_path, "val", num_classes=1)
    config = dataclasses.replace(CONFIG, image_size=48, crop_pct=0.75, mean=(0.0,) * 3, std=(1.0,) * 3)
    batch = next(iter(EvalLoader(images, config, batch_size=1, rank=0, world_size=1, device=CPU)))
    assert batch.images.shape == (1, 3, 48, 48)
    assert batch.images.min() > 0.99


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_a_broken_image_stops_with_its_name(tmp_path, content):
    """One bad file among a million would end the job without saying which."""
    (tmp_path / "train" / "x").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, size=(40, 40, 3)).astype(np.uint8)
    for index in range(6):
        Image.fromarray(noise).save(tmp_path / "train" / "x" / f"{index}.jpg")
    bad = tmp_path / "train" / "x" / "3.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    images = scan_folder(tmp_path, "train", num_classes=1)
    with pytest.raises(RecipeError, match=r"3\.jpg"):
        take(train_loader(images, batch_size=2), 3)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(RecipeError, match=r"3\.jpg"):
        list(EvalLoader(images, CONFIG, batch_size=2, rank=0, world_size=1, device=CPU))


def test_too_few_images_for_all_ranks_are_refused(images):
    """An epoch would have no steps and the loader never return."""
    with pytest.raises(RecipeError, match=r"train\.global_batch_size"):
        train_loader(images, batch_size=9, world_size=3)


def test_the_flip_and_the_crop_are_those_of_the_recipe(tmp_path):
    """Augmentation would be weaker or stronger than asked, and accuracy with it."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    (tmp_path / "train" / "x").mkdir(parents=True)
    for index in range(64):
        Image.fromarray(ramp.copy()).save(tmp_path / "train" / "x" / f"{index}.png")
    images = scan_folder(tmp_path, "train", num_classes=1)
    config = dataclasses.replace(
        CONFIG, scale=(0.25, 0.25), ratio=(1.0, 1.0), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    batches = take(train_loader(images, batch_size=64, config=config), 4)
    rows = torch.cat([batch.images for batch in batches])[:, 0, 8]
    spread = (rows[:, -1] - rows[:, 0]).abs()
    assert torch.allclose(spread, torch.tensor(0.47), atol=0.03)
    flipped = (rows[:, -1] < rows[:, 0]).float().mean().item()
    assert 0.35 < flipped < 0.65
    centre = rows.mean(dim=1)
    assert centre.min() < 0.3
    assert centre.max() > 0.7


def test_crop_sizes_follow_torchvisions_random_resized_crop():
    """Repositories whose DALI crops differ from torchvision's lose accuracy."""
    random = uniforms(range(4000), num_columns(CONFIG), seed=0, epoch=0)
    feeds = training_feeds(CONFIG, random)
    area = (feeds["crop_width"] * feeds["crop_height"]).ravel()
    log_ratio = np.log(feeds["crop_width"] / feeds["crop_height"]).ravel()
    assert area.min() >= 0.08 - 1e-6
    assert area.max() <= 1 + 1e-6
    assert abs(area.mean() - 0.54) < 0.01
    assert abs(log_ratio.mean()) < 0.01
    assert abs(log_ratio.max() - np.log(4 / 3)) < 1e-3
    assert np.corrcoef(area, log_ratio)[0, 1] == pytest.approx(0, abs=0.02)


def test_random_numbers_depend_on_seed_epoch_and_place_alone():
    """Augmentation would depend on how the batch was cut."""
    whole = uniforms(range(40), 24, seed=5, epoch=2)
    assert np.array_equal(uniforms(range(13, 29), 24, seed=5, epoch=2), whole[13:29])
    assert 0 <= whole.min() < whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.05
    for seed, epoch in ((5, 3), (6, 2)):
        assert not np.array_equal(uniforms(range(40), 24, seed=seed, epoch=epoch), whole)
    orders = {tuple(epoch_permutation(50, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_crop_window_is_torchvisions_for_every_shape_of_image(tmp_path):
    """Wide and tall images would be cropped by another rule than published recipes were tuned with."""
    shapes = [(40, 40), (30, 60), (90, 30), (20, 200), (160, 16), (7, 5)] * 8
    for index, shape in enumerate(shapes):
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / f"{index}.png")
    config = dataclasses.replace(CONFIG, scale=(0.3, 1.0))
    random = uniforms(range(len(shapes)), num_columns(config), seed=1, epoch=0)
    feeds = training_feeds(config, random)

    @pipeline_def(batch_size=len(shapes), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def windows():
        encoded, _ = pipeline._encoded()
        return pipeline._crop_window(encoded, config)

    built = windows()
    paths = [np.frombuffer(str(tmp_path / f"{i}.png").encode(), np.uint8) for i in range(len(shapes))]
    inputs = {name: feeds[name] for name in ("crop_width", "crop_height", "crop_place")}
    starts, sizes = (output.as_array() for output in built.run(paths=paths, **inputs))

    fallbacks = 0
    for index, (height, width) in enumerate(shapes):
        stretch = (height / width) ** 0.5
        tries = zip(
            feeds["crop_width"][index] * width * stretch,
            feeds["crop_height"][index] * height / stretch,
            strict=True,
        )
        fitting = [(w, h) for w, h in tries if w <= width and h <= height]
        low, high = config.ratio
        fallbacks += not fitting
        w, h = fitting[0] if fitting else (min(width, height * high), min(height, width / low))
        assert sizes[index].tolist() == [pytest.approx(h, abs=0.51), pytest.approx(w, abs=0.51)]
        free = np.array([height, width]) - sizes[index]
        assert (starts[index] >= 0).all()
        assert (starts[index] <= free).all()
        if not fitting:
            assert (np.abs(starts[index] - free / 2) <= 0.5).all()
    assert 8 <= fallbacks < len(shapes)
