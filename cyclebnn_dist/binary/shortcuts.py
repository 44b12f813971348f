"""Shortcuts around each convolution (Bi-Real Net), and the choice of the pool behind the stem."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.timm_import import timm

BasicBlock = timm.models.resnet.BasicBlock


class ShortcutPerConvolution(BasicBlock):
    """timm's block of two convolutions with a shortcut around each of them instead of one around both.

    x1 = act(bn(conv1(x)) + shortcut(x)), x2 = act(bn(conv2(x1)) + x1): real values bypass every sign. Parameters are those
    of the block it takes the place of.

    Source: Liu et al., Bi-Real Net (ECCV 2018), section 3.2.
    """

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.drop_block(self.bn1(self.conv1(x)))
        if self.drop_path is not None:
            y = self.drop_path(y)
        x = self.act1(y + shortcut)
        y = self.bn2(self.conv2(x))
        if self.se is not None:
            y = self.se(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act2(y + x)


def add_shortcuts_(model: nn.Module, layers: Collection[str]) -> tuple[str, ...]:
    """Give every block with one of ``layers`` in it a shortcut around each convolution; returns the blocks' names.

    Raises:
        RecipeError: no block of the model can have them.
    """
    names = []
    for name, block in model.named_modules():
        if type(block) is not BasicBlock or not {f"{name}.conv1", f"{name}.conv2"} & set(layers):
            continue
        if not isinstance(block.aa, nn.Identity):
            raise _not_possible(f"'{name}' blurs between its convolutions")
        block.__class__ = ShortcutPerConvolution
        names.append(name)
    if not names:
        raise _not_possible("no binary layer of this model is in a residual block of two convolutions")
    return tuple(names)


def _not_possible(problem: str) -> RecipeError:
    return RecipeError(
        "binary.shortcut",
        problem,
        "`convolution` is for resnet18, resnet34 and their kin; `block` keeps the model's own shortcuts",
    )


def replace_stem_pool_(model: nn.Module, kind: str) -> None:
    """Replace the max-pool behind the stem: by an average over the same windows, or by nothing.

    Raises:
        RecipeError: the model has none under its usual name.
    """
    pool = getattr(model, "maxpool", None)
    if not isinstance(pool, nn.MaxPool2d):
        raise RecipeError(
            "binary.stem_pool",
            "this model has no max-pool called 'maxpool' behind its stem",
            "set it to keep",
        )
    model.maxpool = (
        nn.Identity()
        if kind == "none"
        else nn.AvgPool2d(
            pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode, count_include_pad=False
        ).train(pool.training)
    )
