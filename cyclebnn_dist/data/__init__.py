"""Data: sources of images, DALI pipelines, loaders whose order is a function of the step, a sample set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclebnn_dist.data.folder import ImageList, scan_folder
    from cyclebnn_dist.data.loader import EvalLoader, TrainLoader
    from cyclebnn_dist.data.mixing import Mixing
    from cyclebnn_dist.data.reader import Batch
    from cyclebnn_dist.data.sample import generate_sample
    from cyclebnn_dist.data.source import Source, open_source

__all__ = [
    "Batch",
    "EvalLoader",
    "ImageList",
    "Mixing",
    "Source",
    "TrainLoader",
    "generate_sample",
    "open_source",
    "scan_folder",
]

_HOMES = {
    "Batch": "reader",
    "EvalLoader": "loader",
    "ImageList": "folder",
    "Mixing": "mixing",
    "Source": "source",
    "TrainLoader": "loader",
    "generate_sample": "sample",
    "open_source": "source",
    "scan_folder": "folder",
}


def __getattr__(name: str) -> Any:
    """Import on first use: making the sample set or listing a folder needs neither torch nor DALI."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
