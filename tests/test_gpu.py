"""What only a GPU can show: the codec writes the same bytes there, and a recipe trains."""

import json

import pytest
import torch
from launching import TINY_RECIPE

from cyclebnn_dist.comm import BlockKey, Codec
from cyclebnn_dist.config import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", ["hadamard", "absmax"])
def test_the_codec_writes_the_same_bytes_on_both_devices(bits, name):
    torch.manual_seed(bits)
    x = torch.randn(64, 256) * torch.logspace(-20, 20, 64)[:, None]
    blocks = torch.arange(64)
    encoded = {}
    for device in ("cpu", "cuda"):
        codec = Codec(name, backend="torch")
        key = BlockKey(seed=1, step=2, parameter=torch.zeros_like(blocks).to(device), block=blocks.to(device))
        scales, codes = codec.encode(x.to(device), bits, key)
        encoded[device] = (scales.cpu(), codes.cpu(), codec.decode(scales, codes, bits, key).cpu())
    assert torch.equal(encoded["cpu"][0].view(torch.int16), encoded["cuda"][0].view(torch.int16))
    assert torch.equal(encoded["cpu"][1], encoded["cuda"][1])
    torch.testing.assert_close(encoded["cpu"][2], encoded["cuda"][2])


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
