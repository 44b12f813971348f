"""Networks for binary convolutions written plainly, from the equations and a state dict: what the models are compared with."""

import torch
from equations import random_tensor, signs
from torch.nn import functional

from cyclebnn_dist.binary import binarize_
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.timm_import import timm


def tiny(name, *, method, channels, side=32, **rules):
    """A small model of this name in double precision, binary, with random numbers for every parameter and statistic."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, channels=channels).double()
    rules = BinaryConfig(method=method, **rules)
    report = binarize_(model, rules, input_size=(3, side, side))
    with torch.no_grad():
        for index, (key, tensor) in enumerate(sorted(model.state_dict().items())):
            if tensor.is_floating_point():
                noise = random_tensor(*tensor.shape, seed=index)
                # Slopes, shares and variances are positive.
                positive = tensor.dim() == 1 and ("var" in key or tensor.min() > 0)
                tensor.copy_(0.1 + 0.8 * noise.sigmoid() if positive else 0.3 * noise)
    return model, report


def norm(x, p, at):
    mean, var, weight, bias = (
        p[f"{at}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def prelu(x, slope):
    return torch.where(x > 0, x, slope.view(-1, 1, 1) * x)


def halved(x):
    return sum(x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def real_downsample(x, p, at):
    return norm(functional.conv2d(halved(x), p[f"{at}.1.weight"]), p, f"{at}.2")


def binary_conv(x, weight, *, stride, scaled=False):
    scale = weight.abs().mean((1, 2, 3), keepdim=True) if scaled else 1.0
    return functional.conv2d(signs(x), scale * signs(weight), stride=stride, padding=weight.shape[-1] // 2)


def classified(x, p):
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
