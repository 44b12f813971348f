"""The scratch memory: buffers that exchanges use one after the other, kept because fresh pages cost more than copying."""

from __future__ import annotations

import torch


class Scratch:
    """Named buffers on one device that grow as needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor with arbitrary content, valid until the next call with this ``name``."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel or buffer.dtype != dtype:
            self._buffers[name] = buffer = torch.empty(numel, dtype=dtype, device=self._device)
        return buffer[:numel]
