"""Activation memory: the bytes a forward pass leaves behind for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def activation_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that ``model(images)`` has made and that its graph holds, once the result itself is gone.

    Whatever holds them is counted: autograd's saved tensors, what functions keep beside these, and what is kept to
    rebuild others. Parameters, buffers and the images are not. The model runs as it is: in training mode its running
    statistics move.
    """
    with Ledger() as ledger:
        graph = model(images).grad_fn
        assert graph is not None, "without gradients nothing is kept"
        own = [*model.parameters(), *model.buffers(), images]
        return ledger.held_bytes(besides={tensor.untyped_storage().data_ptr() for tensor in own})


def bytes_by_batch(
    model: nn.Module, *, image_size: int, amp: str, channels_last: bool
) -> tuple[float, float]:
    """``activation_bytes`` as (bytes an image, bytes whatever the batch), from batches of two and four images of noise.

    What does not grow with the batch are copies of weights: their bits, or autocast's.

    Args:
        amp: fp32, bf16 or fp16: the dtype of autocast.
    """
    images = torch.randn(4, 3, image_size, image_size)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    kept = []
    for batch in (images[:2], images):
        # Its copies of weights last as long as the context, and are made again in the next step.
        with torch.autocast("cpu", dtype=dtype, enabled=amp != "fp32"):
            kept.append(activation_bytes(model, batch))
    two, four = kept
    per_image = (four - two) / 2
    return per_image, two - 2 * per_image


class Ledger(TorchDispatchMode):
    """Every storage that operators return while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.data_ptr(), storage.nbytes())
        return result

    def held_bytes(self, *, besides: set[int]) -> int:
        """Bytes of the storages that are still alive, without those at the addresses ``besides``."""
        return sum(
            nbytes
            for reference, address, nbytes in self._storages.values()
            if not reference.expired() and address not in besides
        )
