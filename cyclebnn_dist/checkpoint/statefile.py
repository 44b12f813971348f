"""The state file: a nested Python state as one safetensors file, with nothing in it that is unpickled.

Tensors are stored under their path; everything else is one JSON text in the file's own header. A state is first encoded,
which copies it, and then written: training may go on in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

TREE = "tree"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in safetensors' header."""
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Encoded:
    """The content of a safetensors file: contiguous tensors on the CPU that are nobody else's, and texts."""

    tensors: dict[str, torch.Tensor]
    texts: dict[str, str]


@dataclass(frozen=True)
class Written:
    """What a file held when it was written."""

    num_bytes: int
    sha256: str


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> Encoded:
    """Copies of ``tensors``. Those of a GPU are under way until its current stream has come this far."""
    return Encoded({name: host_copy(tensor) for name, tensor in tensors.items()}, {})


def encode_state(state: Any) -> Encoded:
    """A copy of ``state``: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans, bytes, None.

    Tensors of a GPU are under way until its current stream has come this far.

    Raises:
        TypeError: for any other type, naming where it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    return Encoded(tensors, {TREE: json.dumps(tree)})


def write_encoded(path: Path, content: Encoded) -> Written:
    """Write a safetensors file and have the disk confirm it. Python's other threads run meanwhile.

    safetensors' own writer gives neither the digest nor, at a full disk, the error's number.

    Raises:
        OSError: if the file cannot be written.
    """
    # Widest first, so that every tensor begins at a multiple of its own size.
    names = sorted(content.tensors, key=lambda name: (-content.tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": content.texts} if content.texts else {}
    end = 0
    for name in names:
        tensor = content.tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    parts = [memoryview(struct.pack("<Q", len(text)) + text)]
    parts += [content.tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in names]
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return Written(num_bytes, digest.hexdigest())


def digest_of(path: Path) -> Written:
    """What a file holds now.

    Raises:
        OSError: if it cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return Written(num_bytes, digest.hexdigest())


def write_state(path: Path, state: Any) -> Written:
    """``encode_state`` and ``write_encoded`` in one."""
    return write_encoded(path, encode_state(state))


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


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU; of a GPU's tensor in page-locked memory, under way on the current stream."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
    return tensor.to("cpu").clone(memory_format=torch.contiguous_format)


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": _store(torch.from_numpy(np.ascontiguousarray(value).copy()), where, tensors)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _store(host_copy(value), where, tensors)}
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
    if tensor.dtype not in DTYPES:
        raise TypeError(f"a tensor of {tensor.dtype} at {where or 'the top'} cannot be stored")
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
