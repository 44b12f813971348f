"""timm, importable beside a CPU build of torch: the only way this project imports it.

timm imports torchvision unconditionally, and torchvision's compiled half needs CUDA libraries. Where that
half does not load, ``import torchvision`` fails because two operators are undeclared; declaring their
schemas is enough for everything timm uses. Where torchvision loads by itself nothing is changed.
"""

from __future__ import annotations

import sys

import torch

_declared: torch.library.Library | None = None


def _ensure_torchvision() -> None:
    global _declared
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _declared.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_ensure_torchvision()

import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.layers  # noqa: E402
import timm.loss  # noqa: E402
import timm.optim  # noqa: E402
import timm.utils  # noqa: E402

__all__ = ["timm"]
