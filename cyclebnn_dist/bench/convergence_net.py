"""The network of ``bench convergence``: a residual one, small in time but with most of its weights in binary layers."""

from __future__ import annotations

import torch
from torch import nn

from cyclebnn_dist.bench.convergence_data import CLASSES, SIDE
from cyclebnn_dist.binary import binarize_
from cyclebnn_dist.config.recipe import BinaryConfig

CHANNELS = (32, 64, 128, 128)
BINARY = BinaryConfig(method="bireal", activation="prelu")
"""Bi-Real Net's signs depend on no width, so that variants differ in what their gradients go through and nothing else."""


class Block(nn.Module):
    """One convolution with a shortcut around it (Bi-Real Net's block); the shortcut halves the side where channels grow."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.downsample = nn.Sequential(nn.AvgPool2d(2), convolution, nn.BatchNorm2d(outputs))
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)) + self.downsample(x))


class SmallNet(nn.Module):
    """Images ``[n, 1, SIDE, SIDE]`` to logits ``[n, CLASSES]``; the stem and the classifier stay real in a swap."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(1, CHANNELS[0], 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(CHANNELS[0]), nn.ReLU())
        widths = zip((CHANNELS[0], *CHANNELS), CHANNELS, strict=False)
        self.blocks = nn.Sequential(*(Block(inputs, outputs) for inputs, outputs in widths))
        self.classifier = nn.Linear(CHANNELS[-1], CLASSES)

    def get_classifier(self) -> nn.Module:
        """What the swap is to leave real."""
        return self.classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build_net(*, seed: int) -> nn.Module:
    """The network with binary layers; equal seeds give equal weights."""
    torch.manual_seed(seed)
    net = SmallNet()
    binarize_(net, BINARY, input_size=(1, SIDE, SIDE))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
