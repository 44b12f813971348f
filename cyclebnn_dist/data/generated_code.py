"""Generated code: the files DALI writes for itself, among the system's temporary ones, when it reads a pipeline's function.

DALI removes them when Python exits in the ordinary way. A rank that is killed, or leaves at once because a peer was, never
does, and thousands gather in /tmp.
"""

from __future__ import annotations

import contextlib
import os
import sys

PREFIX = "__autograph_generated_file"


def remove_generated_code() -> None:
    """Remove the files of this process; the code is loaded and stays so. DALI does not mind that they are gone."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PREFIX):
            for path in (module.__file__, module.__spec__.cached if module.__spec__ else None):
                with contextlib.suppress(FileNotFoundError):
                    if path:
                        os.unlink(path)
