"""What only a GPU can show: the codec writes the same bytes there, and a recipe trains."""

import json

import pytest
import torch
from exchanges import assert_same, exchange
from launching import TINY_RECIPE

from cyclebnn_dist.config import load_recipe

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
def test_a_recipe_trains_on_a_gpu(tmp_path, tiny_data, amp):
    from cyclebnn_dist import train

    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    recipe = load_recipe(path, [f"train.amp={amp}", "model.channels_last=true", "wandb.mode=disabled"])
    assert train.main(recipe) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["steps"] == 10
