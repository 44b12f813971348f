"""The preview of a schedule: what a recipe will do, told before anything is trained. ``plot`` is imported when asked for."""

from cyclebnn_dist.preview.describe import Length, expected_traffic, preview, run_length
from cyclebnn_dist.preview.text import render_preview

__all__ = ["Length", "expected_traffic", "preview", "render_preview", "run_length"]
