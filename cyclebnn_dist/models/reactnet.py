"""ReActNet-A and ReActNet-18: networks with a learned shift and slope of every channel behind each binary convolution.

The layers here are real: the swap makes the convolutions of units binary (``binary.method=reactnet``, whose threshold is
RSign), and keeps stem, classifier and 1x1 convolutions on shortcuts.

Counted by this project at 224 pixels with 1000 classes, in the usual convention (see ``binary.conventions``):

| model | binary weights | other parameters | BOPs | FLOPs | OPs | size |
|---|---|---|---|---|---|---|
| reactnet_a | 28.25 M | 1.09 M | 4.817e9 | 0.119e8 | 0.871e8 | 7.5 MiB |
| reactnet_18 | 10.99 M | 0.72 M | 1.676e9 | 1.378e8 | 1.640e8 | 4.1 MiB |

Source: Liu et al., ReActNet (ECCV 2020) and its released code. Weights start as torch's convolutions do, as in the
authors' first phase. Their second phase of ReActNet-A has its latent weights under another name, so those begin anew, at
uniform numbers from 0 to 0.001; here they go on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.activations import Channels, RPReLU
from cyclebnn_dist.models.skeleton import (
    Skeleton,
    halving,
    imagenet_cfgs,
    mobile_channels,
    mobile_skeleton,
    residual_skeleton,
)
from cyclebnn_dist.timm_import import timm

default_cfgs = imagenet_cfgs("reactnet_a", "reactnet_18", crop_pct=0.875)


class Unit(nn.Module):
    """rprelu(norm(conv(x)) + shortcut(x)).

    A 1x1 unit may double the channels: its shortcut is then x beside x. That is two convolutions of the same signs, whose
    results are concatenated.
    """

    def __init__(
        self, channels: tuple[int, int], kernel: int, *, stride: int = 1, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        inputs, outputs = channels
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = RPReLU(Channels(outputs, 1))
        # Called so, a real convolution within is known for one on a shortcut.
        self.downsample = nn.Identity() if shortcut is None else shortcut
        self.copies = 1 if shortcut is not None else outputs // inputs

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x)
        residual = torch.cat([residual] * self.copies, 1) if self.copies > 1 else residual
        return self.act(self.norm(self.conv(x)) + residual)


def _block(channels: int, *, outputs: int, stride: int, index: int) -> nn.Module:
    pool = halving() if stride == 2 else None
    spatial = Unit((channels, channels), 3, stride=stride, shortcut=pool)
    return nn.Sequential(spatial, Unit((channels, outputs), 1))


def _residual_unit(
    channels: tuple[int, int], *, stride: int, index: int, shortcut: nn.Module | None
) -> nn.Module:
    return Unit(channels, 3, stride=stride, shortcut=shortcut)


def _no_activation(channels: int) -> nn.Module:
    return nn.Identity()


@timm.models.register_model
def reactnet_a(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """ReActNet-A: MobileNet's 13 blocks with 3x3 binary convolutions for its depthwise ones."""
    build = partial(mobile_skeleton, _block, act=_no_activation)
    channels = {"channels": mobile_channels(32, (2, 2, 6, 2))}
    return timm.models.build_model_with_cfg(build, "reactnet_a", pretrained, **{**channels, **kwargs})


@timm.models.register_model
def reactnet_18(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """ReActNet-18: ResNet-18 with a shortcut around each convolution, and no activation behind the stem."""
    build = partial(residual_skeleton, _residual_unit, act=_no_activation)
    return timm.models.build_model_with_cfg(build, "reactnet_18", pretrained, **kwargs)
