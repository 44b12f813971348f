"""The state file: a nested Python state as one safetensors file, with nothing in it that is unpickled.

Tensors are stored under their path; everything else is one JSON text in the file's own header.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

TREE = "tree"


def write_state(path: Path, state: Any) -> None:
    """Write ``state``: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans, bytes, None.

    Raises:
        TypeError: for any other type, naming where it is.
        OSError: if the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    save_file(tensors, str(path), metadata={TREE: json.dumps(tree)})


def read_state(path: Path, *, at: Sequence[str] = ()) -> Any:
    """What ``write_state`` was given, with tensors on the CPU; of nested dicts only what lies under the keys ``at``.

    Raises:
        KeyError: if there is nothing under these keys.
    """
    with safe_open(str(path), framework="pt", device="cpu") as file:
        tree = json.loads(file.metadata()[TREE])
        for key in at:
            tree = dict(tree["dict"])[key]
        return _decode(tree, file)


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": _store(torch.from_numpy(np.ascontiguousarray(value).copy()), where, tensors)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _store(value.detach().to("cpu").contiguous().clone(), where, tensors)}
    if isinstance(value, bytes):
        octets = np.frombuffer(value, dtype=np.uint8).copy()
        return {"bytes": _store(torch.from_numpy(octets), where, tensors)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, dict):
        items = []
        for key, item in value.items():
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"key {key!r} of {where or 'the state'} is neither a string nor an integer")
            items.append([key, _encode(item, f"{where}/{key}" if where else str(key), tensors)])
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        encoded = [
            _encode(item, f"{where}/{i}" if where else str(i), tensors) for i, item in enumerate(value)
        ]
        return {"tuple" if isinstance(value, tuple) else "list": encoded}
    raise TypeError(f"{type(value).__name__} at {where or 'the top'} cannot be stored")


def _store(tensor: torch.Tensor, where: str, tensors: dict[str, torch.Tensor]) -> str:
    name = where or "state"
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def _decode(tree: dict[str, Any], file: Any) -> Any:
    ((kind, content),) = tree.items()
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _decode(item, file) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, file) for item in content]
        return tuple(items) if kind == "tuple" else items
    tensor = file.get_tensor(content)
    if kind == "array":
        return tensor.numpy()
    return tensor.numpy().tobytes() if kind == "bytes" else tensor
