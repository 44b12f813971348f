"""The code snapshot: a copy of the source in the run folder, so that a queued job runs what was submitted.

``folder/code/<digest>/`` holds the packages as they were in the working tree, committed or not; submissions of equal
source share it. submitit's RsyncSnapshot is not used: it needs git and rsync, leaves out files that are not yet known to
git, and copies the whole repository once for every submission.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from cyclebnn_dist.config import RecipeError

PACKAGES = ("cyclebnn_dist", "launch")
FOLDER = "code"

CODE = "CYCLEBNN_CODE"
"""Environment variable of a rank: the snapshot it has to import from."""

WORKING_FOLDER = "CYCLEBNN_FOLDER"
"""Environment variable of a rank: the folder from which relative paths are meant."""


def source_root() -> Path:
    """Return the folder that holds the packages which are running now."""
    return Path(__file__).resolve().parents[1]


def read_source(root: Path) -> dict[str, bytes]:
    """Return the content of every source file of the packages, by its path below ``root``, in order."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def source_digest(source: dict[str, bytes]) -> str:
    """Return 12 hexadecimal digits that name this source."""
    state = hashlib.sha256()
    for name, content in source.items():
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()[:12]


def snapshot_path(folder: Path, *, root: Path | None = None) -> Path:
    """Return where a snapshot of the present source would lie in the launcher's folder; nothing is written."""
    return folder / FOLDER / source_digest(read_source(root or source_root()))


def take_snapshot(folder: Path, *, root: Path | None = None) -> Path:
    """Copy the source into the launcher's folder, unless it is there already, and return where it is.

    Raises:
        RecipeError: the snapshot of this source is there, but somebody changed it.
    """
    source = read_source(root or source_root())
    final = folder / FOLDER / source_digest(source)
    if not final.exists():
        partial = final.with_name(f".partial_{final.name}_{os.getpid()}")
        for name, content in source.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        try:
            partial.rename(final)
        except OSError:  # another submission was faster
            shutil.rmtree(partial)
    if read_source(final) != source:
        cure = "remove it where no queued job needs it, or submit with --no-snapshot"
        raise RecipeError(str(final), "this code snapshot is not what was submitted any more", cure)
    return final


def setup_lines(snapshot: Path) -> list[str]:
    """Return the shell lines after which Python imports from the snapshot.

    ``python -m`` looks into the current folder before PYTHONPATH, and that is usually the repository: so the snapshot
    becomes the current folder, and ``enter`` goes back.
    """
    path = shlex.quote(str(snapshot))
    return [
        f'export {CODE}={path} {WORKING_FOLDER}="$PWD" PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f'cd "${CODE}" || exit 2',
    ]


def enter() -> str:
    """On a rank: go to the folder relative paths are meant from; return, in words, which code runs.

    Raises:
        RuntimeError: the packages do not come from the snapshot they should come from.
    """
    if CODE not in os.environ:
        return f"code: {source_root()}, as it is now (no snapshot)"
    snapshot = Path(os.environ[CODE])
    os.chdir(os.environ[WORKING_FOLDER])
    for package in PACKAGES:
        file = Path(sys.modules[package].__file__ or "").resolve()
        if not file.is_relative_to(snapshot.resolve()):
            raise RuntimeError(f"{package} is imported from {file.parent}, not from the snapshot {snapshot}")
    return f"code: snapshot {snapshot.name} in {snapshot}"
