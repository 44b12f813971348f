"""ReActNet against its equations. Without these a recipe that names it would train another network than the paper's."""

import torch
from equations import random_tensor
from networks import binary_conv, classified, halved, norm, prelu, real_downsample, tiny
from torch.nn import functional


def plain_unit(x, p, at, *, stride=1, shortcut=lambda x: x):
    """rprelu(bn(conv(sign(x + threshold))) + shortcut): in, slope and out are learned for each channel."""
    threshold = p[f"{at}.conv.binarizer.bias"].view(-1, 1, 1)
    y = binary_conv(x + threshold, p[f"{at}.conv.weight"], stride=stride, scaled=True)
    y = norm(y, p, f"{at}.norm") + shortcut(x)
    inner, slope, outer = (p[f"{at}.act.{name}"] for name in ("shift_in", "slope", "shift_out"))
    return prelu(y + inner.view(-1, 1, 1), slope) + outer.view(-1, 1, 1)


def two_beside(x, p, at):
    """Two 1x1 convolutions of the same signs, each normalized and with the input added, concatenated; then one RPReLU."""
    threshold = p[f"{at}.conv.binarizer.bias"].view(-1, 1, 1)
    halves = []
    for half in (0, 1):
        own = {
            name: p[f"{at}.norm.{name}"].chunk(2)[half]
            for name in ("running_mean", "running_var", "weight", "bias")
        }
        weight = p[f"{at}.conv.weight"].chunk(2)[half]
        y = binary_conv(x + threshold, weight, stride=1, scaled=True)
        halves.append(norm(y, {f"half.{name}": value for name, value in own.items()}, "half") + x)
    y = torch.cat(halves, 1)
    inner, slope, outer = (p[f"{at}.act.{name}"] for name in ("shift_in", "slope", "shift_out"))
    return prelu(y + inner.view(-1, 1, 1), slope) + outer.view(-1, 1, 1)


def test_reactnet_a_is_what_the_authors_release():
    model, report = tiny("reactnet_a", method="reactnet", channels=[8, 16, 32, 32])
    p, x = model.state_dict(), random_tensor(2, 3, 32, 32)
    y = norm(functional.conv2d(x, p["conv1.weight"], stride=2, padding=1), p, "bn1")
    y = two_beside(plain_unit(y, p, "blocks.0.0"), p, "blocks.0.1")
    y = two_beside(plain_unit(y, p, "blocks.1.0", stride=2, shortcut=halved), p, "blocks.1.1")
    y = plain_unit(plain_unit(y, p, "blocks.2.0"), p, "blocks.2.1")
    assert y.shape == (2, 32, 8, 8)
    torch.testing.assert_close(model.eval()(x), classified(y, p))
    assert {row.name for row in report.rows if not row.swapped} == {"conv1", "fc"}
    assert report.activations == ()


def test_reactnet_18_is_what_the_authors_release():
    """No activation behind the stem, where timm's ResNet has one."""
    model, report = tiny("reactnet_18", method="reactnet", channels=[8, 16])
    p, x = model.state_dict(), random_tensor(2, 3, 32, 32)
    y = norm(functional.conv2d(x, p["conv1.weight"], stride=2, padding=3), p, "bn1")
    y = functional.max_pool2d(y, 3, 2, 1)
    for unit in range(8):
        at = f"blocks.{unit}"
        down = {"shortcut": lambda x, at=at: real_downsample(x, p, f"{at}.downsample"), "stride": 2}
        y = plain_unit(y, p, at, **(down if unit == 4 else {}))
    torch.testing.assert_close(model.eval()(x), classified(y, p))
    reasons = {row.name: row.reason for row in report.rows if not row.swapped}
    assert reasons == {"conv1": "stem", "blocks.4.downsample.1": "downsample", "fc": "classifier"}
