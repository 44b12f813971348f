"""Activation memory: the bytes a forward pass leaves behind for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def activation_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that ``model(images)`` has made and that are still held when it returns, its result included.

    Whoever holds them is counted: autograd's saved tensors, what functions keep beside these, and what is kept to
    rebuild others. Parameters and buffers are not. The model runs as it is: in training mode its running statistics move.
    """
    with Ledger() as ledger:
        logits = model(images)
        own = {
            tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), images]
        }
        held = ledger.held_bytes(besides=own)
    del logits
    return held


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
