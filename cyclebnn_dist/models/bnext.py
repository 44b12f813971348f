"""BNext: networks whose binary convolutions are rescaled by gates that see the real input and the binary output.

``bnext_t``, ``bnext_s``, ``bnext_m`` and ``bnext_l`` are MobileNet-like, ``bnext_18`` is ResNet-like. The layers here are
real: the swap makes the convolutions of units binary (``binary.method=bnext``), and keeps stem, gates and classifier.

Counted by this project at 224 pixels with 1000 classes, operations by the convention ``bnext`` (see
``binary.conventions``), sizes with 1 bit a binary weight and 32 any other parameter. T and S agree with what is published
within 1 %; of the others no such figures are.

| model | blocks | binary weights | other parameters | BOPs | OPs | size |
|---|---|---|---|---|---|---|
| bnext_t | 13 | 28.25 M | 2.60 M | 4.817e9 | 0.0769e9 | 13.3 MiB |
| bnext_s | 13 | 63.57 M | 5.01 M | 1.084e10 | 0.1720e9 | 26.7 MiB |
| bnext_m | 21 | 126.24 M | 8.24 M | 2.009e10 | 0.3169e9 | 46.5 MiB |
| bnext_l | 29 | 308.31 M | 18.20 M | 5.215e10 | 0.8198e9 | 106.2 MiB |
| bnext_18 | 8 pairs of units | 10.99 M | 1.08 M | 1.676e9 | 0.0603e9 | 5.4 MiB |

Source: Guo et al., Towards Optimization-Friendly Binary Neural Network (TMLR 2023, arXiv 2211.12933) and its released
code. That has a stem of stride 1 for any but 1000 classes; here ``model.small_stem`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.models.skeleton import (
    Skeleton,
    along_channels,
    halving,
    imagenet_cfgs,
    mobile_channels,
    mobile_skeleton,
    residual_skeleton,
)
from cyclebnn_dist.timm_import import timm

GATE_RATIO = 8
"""Channels of a gate's input to those in its middle."""
LATENT_STD = 0.001
"""Of the weights that are to become binary, at the start."""

default_cfgs = imagenet_cfgs(
    "bnext_t", "bnext_s", "bnext_m", "bnext_l", "bnext_18", crop_pct=0.95, interpolation="bicubic"
)


class Gate(nn.Module):
    """sigmoid(W2 relu(W1 mean(x))): a factor for each channel, from [n, channels, h, w] to [n, channels, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // GATE_RATIO)
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.expand = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """A convolution with information recoupling (Info-RCP), and a shortcut around it.

    With x' = pool(x), where ``pool`` is what the shortcut needs, and r the shortcut:

        y = prelu(norm1(conv(x + shift)))
        y = y gate(s x' + (1 - s) y), with a learned share s of each channel, kept within [0, 1]
        FFN:            r = x',             norm2(y) + r
        ELM attention:  r = pool(prelu(x)), norm2(y r) + r

    Args:
        channels: of inputs and outputs.
        pool: what makes inputs as small, and as many, as outputs; nothing by default.
        attention: ELM attention, else FFN.
        recouples_shortcut: take r in the place of x', as BNext-18 does.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        kernel: int,
        *,
        stride: int = 1,
        pool: nn.Module | None = None,
        attention: bool = False,
        recouples_shortcut: bool = False,
    ) -> None:
        super().__init__()
        inputs, outputs = channels
        self.shift = nn.Parameter(torch.zeros(inputs))
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.normal_(self.conv.weight, std=LATENT_STD)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act = nn.PReLU(outputs)
        self.share = nn.Parameter(torch.full((outputs,), 0.5))
        self.se = Gate(outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        # Called so, a real convolution within is known for one on a shortcut.
        self.downsample = nn.Identity() if pool is None else pool
        self.shortcut_act = nn.PReLU(inputs) if attention else nn.Identity()
        self.attention = attention
        self.recouples_shortcut = recouples_shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(self.shortcut_act(x))
        real = residual if self.recouples_shortcut or not self.attention else self.downsample(x)
        y = self.act(self.norm1(self.conv(x + along_channels(self.shift))))
        share = along_channels(self._bounded_share())
        y = y * self.se(share * real + (1.0 - share) * y)
        return self.norm2(y * residual if self.attention else y) + residual

    def _bounded_share(self) -> Tensor:
        """The share within [0, 1]. In training the parameter itself is set back to it, so that its gradient never ends."""
        if not self.training:
            return self.share.clamp(0.0, 1.0)
        with torch.no_grad():
            self.share.clamp_(0.0, 1.0)
        return self.share


class Block(nn.Module):
    """A 3x3 unit, then a 1x1 unit; two of these side by side, on the same input, where channels double.

    Blocks of odd index have ELM attention in the 3x3 unit. (The paper counts the stem, so it has it in even ones.)
    """

    def __init__(self, channels: int, *, outputs: int, stride: int, index: int) -> None:
        super().__init__()
        same = (channels, channels)
        pool = halving() if stride == 2 else None
        self.spatial = Unit(same, 3, stride=stride, pool=pool, attention=index % 2 == 1)
        self.pointwise = nn.ModuleList(Unit(same, 1) for _ in range(outputs // channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial(x)
        outputs = [unit(x) for unit in self.pointwise]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _residual_unit(channels: tuple[int, int], *, stride: int, index: int, shortcut: nn.Module | None) -> Unit:
    """ELM attention and FFN by turns."""
    kind = {"attention": index % 2 == 0, "recouples_shortcut": True}
    return Unit(channels, 3, stride=stride, pool=shortcut, **kind)


def _mobile(
    name: str, width: int, repeats: Sequence[int], pretrained: bool, kwargs: dict[str, Any]
) -> Skeleton:
    build = partial(mobile_skeleton, Block, act=nn.PReLU)
    channels = {"channels": mobile_channels(width, repeats)}
    return timm.models.build_model_with_cfg(build, name, pretrained, **{**channels, **kwargs})


@timm.models.register_model
def bnext_t(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """BNext-T: 13 blocks, 1024 channels at the end."""
    return _mobile("bnext_t", 32, (2, 2, 6, 2), pretrained, kwargs)


@timm.models.register_model
def bnext_s(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """BNext-S: 13 blocks, 1536 channels at the end."""
    return _mobile("bnext_s", 48, (2, 2, 6, 2), pretrained, kwargs)


@timm.models.register_model
def bnext_m(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """BNext-M: 21 blocks, 1536 channels at the end."""
    return _mobile("bnext_m", 48, (4, 4, 8, 4), pretrained, kwargs)


@timm.models.register_model
def bnext_l(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """BNext-L: 29 blocks, 2048 channels at the end. The released code calls it super, and large one with 48 for 64."""
    return _mobile("bnext_l", 64, (4, 4, 16, 4), pretrained, kwargs)


@timm.models.register_model
def bnext_18(pretrained: bool = False, **kwargs: Any) -> Skeleton:
    """BNext-18: ResNet-18 with 16 units for its convolutions; they recouple with the shortcut itself."""
    build = partial(residual_skeleton, _residual_unit, act=nn.PReLU)
    return timm.models.build_model_with_cfg(build, "bnext_18", pretrained, **kwargs)
