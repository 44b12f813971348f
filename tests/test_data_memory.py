"""Memory of the loaders. A run of days that gains a little every epoch ends by being killed."""

import gc

import numpy as np
import psutil
import pytest
import torch

from cyclebnn_dist.config.recipe import DataConfig
from cyclebnn_dist.data import EvalLoader, TrainLoader, open_source
from cyclebnn_dist.data.pack import ShardSize, pack_folder

CPU = torch.device("cpu")
BATCH, STEPS = 8, 10
SETTLING, EPOCHS, WINDOW = 6, 20, 7
"""Epochs until buffers have the size of the largest images, epochs measured, and those of them that make one value.

Resident memory of a flat loader goes up and down by some batches, as buffers of prepared ones are filled and given back;
the lowest value of a few epochs does not. A leak of half a batch of images per epoch must show, with CIFAR's, whose batches
are smaller than what Python's own caches take in meanwhile, of one and a half.
"""


def data_set(name, tiny_data, tmp_path):
    """Path of 80 training and 30 validation images, and what the recipe says of them."""
    if name == "folder":
        return tiny_data, DataConfig(image_size=160, augment="randaugment")
    if name == "webdataset":
        pack_folder(tiny_data, tmp_path / "shards", shard_size=ShardSize(images=20), workers=1)
        return tmp_path / "shards", DataConfig(image_size=160, shuffle_shards=2, erasing=0.5)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    for file in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        records = random.integers(0, 256, size=(16 if "data" in file else 30, 3073)).astype(np.uint8)
        records[:, 0] = random.integers(0, 10, size=len(records))
        records.tofile(folder / file)
    return tmp_path, DataConfig(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)


def resident_bytes():
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.long
@pytest.mark.parametrize("name", ["folder", "webdataset", "cifar10"])
def test_memory_stays_flat_over_epochs(name, tiny_data, tmp_path):
    path, config = data_set(name, tiny_data, tmp_path)
    config = DataConfig(**{**vars(config), "path": str(path), "threads": 2})
    train, val = (open_source(config, split, num_classes=10) for split in ("train", "val"))
    loader = TrainLoader(train, config, batch_size=BATCH, rank=0, world_size=1, seed=0, device=CPU)
    evaluation = EvalLoader(val, config, batch_size=BATCH, rank=0, world_size=1, device=CPU)
    assert loader.steps_per_epoch == STEPS
    after = []
    for _ in range(SETTLING + EPOCHS):
        for _ in range(STEPS):
            loader.next()
        assert sum(len(batch.ids) for batch in evaluation) == 30
        after.append(resident_bytes())
    loader.close()
    evaluation.close()
    first, last = (min(window) for window in (after[SETTLING:][:WINDOW], after[-WINDOW:]))
    batch_bytes = BATCH * 3 * config.image_size**2 * 4
    allowed = (1.5 if name == "cifar10" else 0.5) * batch_bytes * (EPOCHS - WINDOW)
    assert last - first < allowed, [each - after[SETTLING] for each in after]
