"""The skeletons of networks that were drawn for binary convolutions: what ReActNet and BNext hang their units on.

One is MobileNet's, a 3x3 and a 1x1 convolution a block, with channels that only ever double, by concatenation; the other
is ResNet-18's. Attributes have the names of timm's ResNets (``conv1``, ``maxpool``, ``fc``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.timm_import import timm

MobileBlock = Callable[..., nn.Module]
"""Called with the channels of its input, and by name with ``outputs`` (as many, or twice as many), ``stride``, ``index``."""
ResidualUnit = Callable[..., nn.Module]
"""Called with (inputs, outputs), and by name with ``stride``, ``index`` and ``shortcut``, a module or None."""


class Skeleton(nn.Module):
    """Stem, blocks, activation, mean over places, classifier.

    Args:
        stem: the first convolution.
        maxpool: what comes behind it and its norm.
        act: in front of the mean, of ``features`` channels.
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        blocks: Sequence[nn.Module],
        *,
        maxpool: nn.Module,
        act: nn.Module,
        features: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1, self.bn1, self.maxpool = stem, nn.BatchNorm2d(stem.out_channels), maxpool
        self.blocks = nn.Sequential(*blocks)
        self.act = act
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.maxpool(self.bn1(self.conv1(x))))
        return self.fc(self.act(x).mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


def mobile_skeleton(
    block: MobileBlock,
    *,
    act: Callable[[int], nn.Module],
    channels: Sequence[int],
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Skeleton:
    """A skeleton of MobileNet's kind. Stem and first block of every other width but the second halve the image.

    Args:
        channels: outputs of the stem and of each block; each either as many as before or twice as many.
        act: made for a number of channels.

    Raises:
        RecipeError: ``channels`` do something else than stay and double.
    """
    _check_channels(channels)
    blocks = [
        block(before, outputs=after, stride=2 if after not in (before, channels[1]) else 1, index=index)
        for index, (before, after) in enumerate(pairwise(channels))
    ]
    stem = nn.Conv2d(in_chans, channels[0], 3, 2, 1, bias=False)
    ends: dict[str, Any] = {"act": act(channels[-1]), "features": channels[-1], "num_classes": num_classes}
    return Skeleton(stem, blocks, maxpool=nn.Identity(), **ends)


def mobile_channels(width: int, repeats: Sequence[int]) -> list[int]:
    """Stem of ``width``, a block of twice that, then ``repeats`` blocks of 4, 8, 16 and 32 times as many channels."""
    stages = zip((4, 8, 16, 32), repeats, strict=True)
    return [width, 2 * width, *(factor * width for factor, number in stages for _ in range(number))]


def residual_skeleton(
    unit: ResidualUnit,
    *,
    act: Callable[[int], nn.Module],
    channels: Sequence[int] = (64, 128, 256, 512),
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Skeleton:
    """A skeleton of ResNet-18's kind: four units of one convolution a stage, each with a shortcut of its own.

    A stage but the first halves the image; its shortcut is then a 2x2 average, a real 1x1 convolution and a norm.

    Args:
        channels: outputs of each stage; the stem has as many as the first.
        act: made for a number of channels.
    """
    units: list[nn.Module] = []
    before = channels[0]
    for stage, after in enumerate(channels):
        for place in range(4):
            stride = 2 if stage and not place else 1
            shortcut = None
            if stride == 2 or after != before:
                shortcut = nn.Sequential(
                    halving(), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
                )
            units.append(unit((before, after), stride=stride, shortcut=shortcut, index=place))
            before = after
    stem = nn.Conv2d(in_chans, channels[0], 7, 2, 3, bias=False)
    ends: dict[str, Any] = {"act": act(before), "features": before, "num_classes": num_classes}
    return Skeleton(stem, units, maxpool=nn.MaxPool2d(3, 2, 1), **ends)


def halving() -> nn.AvgPool2d:
    """The average over windows of 2x2; at the border of an odd size, over what there is."""
    return nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)


def along_channels(values: Tensor) -> Tensor:
    """[channels] as [channels, 1, 1]."""
    return values.view(-1, 1, 1)


def imagenet_cfgs(*names: str, **settings: Any) -> Any:
    """timm's configurations, without weights, of models called ``names``."""
    common = {"input_size": (3, 224, 224), "num_classes": 1000, "first_conv": "conv1", "classifier": "fc"}
    statistics = {"mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD}
    return timm.models.generate_default_cfgs({name: {**common, **statistics, **settings} for name in names})


def _check_channels(channels: Sequence[int]) -> None:
    cure = "each must be that before or twice as much, e.g. [32, 64, 128, 128]: stem, then one a block"
    if len(channels) < 2 or min(channels) < 1:
        raise RecipeError("model.kwargs.channels", f"{list(channels)} has no block", cure)
    for before, after in pairwise(channels):
        if after not in (before, 2 * before):
            raise RecipeError("model.kwargs.channels", f"{after} comes after {before}", cure)
