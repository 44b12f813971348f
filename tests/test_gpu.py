"""What only a GPU can show: the codec writes the same bytes there, and a recipe trains."""

import json

import numpy as np
import pytest
import torch
from exchanges import assert_same, exchange
from launching import TINY_RECIPE

from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.config.recipe import DataConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("bits", [*range(1, 9), 16, 32])
@pytest.mark.parametrize("name", ["hadamard", "absmax", "minmax"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_codec_computes_the_same_on_both_devices(bits, name, backend):
    for unbiased in (True, False):
        settings = {"name": name, "unbiased": unbiased, "bits": bits, "size": 256, "full": 500}
        assert_same(exchange(backend, device="cuda", **settings), exchange("torch", **settings))


@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "engine", ["ddp", "deepspeed of stage 0", "deepspeed of stage 1", "deepspeed of stage 2"]
)
def test_a_recipe_trains_on_a_gpu(tmp_path, tiny_data, amp, engine):
    from cyclebnn_dist import train

    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    name, _, stage = engine.partition(" of stage ")
    overrides = [f"engine.name={name}", f"engine.zero_stage={stage or 0}", f"model.channels_last={not stage}"]
    recipe = load_recipe(path, [*overrides, f"train.amp={amp}", "wandb.mode=disabled"])
    assert train.main(recipe) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["steps"] == 10


@pytest.mark.parametrize("training", [True, False])
def test_stored_images_are_the_same_on_both_devices(tmp_path, training):
    """Recipes for CIFAR would train on other crops on a GPU."""
    from cyclebnn_dist.data import EvalLoader, TrainLoader, open_source

    random = np.random.default_rng(0)
    for file in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        records = random.integers(0, 256, size=(8, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / file)
    config = DataConfig(path=str(tmp_path), format="cifar10", image_size=32)
    source = open_source(config, "train" if training else "val", num_classes=10)
    found = []
    for device in ("cpu", "cuda"):
        place = {"batch_size": 8, "rank": 0, "world_size": 1, "device": torch.device(device)}
        if training:
            found.append(TrainLoader(source, config, seed=3, **place).next())
        else:
            found.append(next(iter(EvalLoader(source, config, **place))))
    assert found[1].images.is_cuda
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.allclose(found[0].images, found[1].images.cpu(), atol=1e-5)
