"""The search folder: what is finished, and who is at work on what. Processes share it; none waits for another's message.

    search_dir/
      recipe.yaml                    the resolved recipe; what makes the folder a search's
      round_001/
        weights.safetensors          the network of this round, trained
        unchanged.json               what it reaches after a candidate's training
        layer1.0.conv1.json          what it reaches with this layer changed
      pattern.json  pattern.png      the result
      .locks/                        held by the process that makes the file of that name

A file has its name only when it is whole, and keeps its content from then on. Whoever finds one missing makes it, under its
lock, which the operating system takes from a process that dies. So ranks of a job, tasks of an array and later starts share
the work in the same way, and a finished file is never made again. On a file system without locks, or one that shows files
late, two processes may make the same file: the first that is finished counts, so that all see the same scores.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cyclebnn_dist import disk
from cyclebnn_dist.checkpoint.statefile import encode_tensors, write_encoded
from cyclebnn_dist.config import SAVED_NAME, Recipe, RecipeError, load_saved, resume_differences, save_recipe
from cyclebnn_dist.config.resume_rules import MAY_CHANGE
from cyclebnn_dist.config.search_rules import SEARCH_KEYS
from cyclebnn_dist.file_lock import LockState, file_lock
from cyclebnn_dist.search.selection import Outcome

log = logging.getLogger(__name__)

PATTERN, PICTURE = "pattern.json", "pattern.png"
LOCKS = ".locks"
POLL_SECONDS = 0.2
TELL_SECONDS = 60.0
SEARCH_MAY_CHANGE = (MAY_CHANGE - SEARCH_KEYS - {"model.pretrained", "model.weights"}) | {"search.dir"}
"""Keys that may differ between two starts of one search."""


def search_dir(recipe: Recipe) -> Path:
    """``search.dir``, or the run's folder with ``-mixbin`` behind its name."""
    run_dir = Path(recipe.run.dir)
    return Path(recipe.search.dir) if recipe.search.dir else run_dir.with_name(f"{run_dir.name}-mixbin")


class Folder:
    """One search's files, as one of ``workers`` processes sees them.

    Args:
        worker: its number; workers begin at different files, so that they seldom want the same.
        leave: called between files and while waiting; it raises what is to end the work.
    """

    def __init__(self, path: Path, *, worker: int = 0, leave: Callable[[], None] = lambda: None) -> None:
        self.path, self.leave = path, leave
        self._worker, self._warned = worker, False

    @property
    def claimed(self) -> bool:
        """Whether it is a search's already."""
        return (self.path / SAVED_NAME).exists()

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's.

        Raises:
            RecipeError: it is another search's, or holds something else, or cannot be written.
        """
        saved = self.path / SAVED_NAME
        with refusing_disk(self.path, cure="name another folder"):
            # Listed before the recipe is looked for: another process may just be claiming the folder.
            others = self.path.exists() and any(not each.name.startswith(".") for each in self.path.iterdir())
            if others and not saved.exists():
                raise RecipeError(
                    "search.dir",
                    f"{self.path} holds something, but no {SAVED_NAME}: it is not the folder of a search",
                    "name a new or empty folder",
                )
            (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
            with self._lock(SAVED_NAME, wait=True):
                if not saved.exists():
                    save_recipe(recipe, saved)
        place = f"search.dir (now {self.path})"
        resume_differences(load_saved(saved), recipe, may_change=SEARCH_MAY_CHANGE, folder=place)

    def make_all(self, makers: Mapping[str, Callable[[Path], None]], *, told: Callable[[int], None]) -> None:
        """Have every one of these files: make those nobody makes, and wait for those that others make.

        Args:
            makers: by name below the folder, what makes each: it writes the path it is given.
            told: called with the number of files there are, whenever that may have changed.
        """
        names = list(makers)
        first = self._worker % max(1, len(names))
        waited = 0.0
        while True:
            self.leave()
            missing = [name for name in names[first:] + names[:first] if not (self.path / name).exists()]
            told(len(names) - len(missing))
            if not missing:
                return
            if any(self._make(name, makers[name]) for name in missing):
                waited = 0.0
                continue
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
            if waited % TELL_SECONDS < POLL_SECONDS:
                log.info("waiting for others, who are making %s", ", ".join(missing))

    def _make(self, name: str, make: Callable[[Path], None]) -> bool:
        """Make a file, unless someone else makes it or has made it; whether this process did."""
        target = self.path / name
        with self._lock(name) as lock:
            if lock == "held":
                return False
            if target.exists():
                return True
            with refusing_disk(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if lock == "ours":
                    for left_behind in target.parent.glob(f".{target.name}.*.partial"):
                        left_behind.unlink(missing_ok=True)
            # Process ids would do on one machine; on several, in containers, they are often the same.
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            try:
                make(partial)
                with refusing_disk(target):
                    publish(partial, target)
            except RecipeError as error:
                if self._worker:  # the command itself tells only what rank 0 meets
                    log.error("%s could not be made: %s", target, error)
                raise
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            return True

    @contextmanager
    def _lock(self, name: str, *, wait: bool = False) -> Iterator[LockState]:
        """The lock of a file within, or who has it."""
        path = self.path / LOCKS / name.replace("/", ".")
        with contextlib.ExitStack() as stack:
            with refusing_disk(path):
                state = stack.enter_context(file_lock(path, wait=wait))
            if state == "impossible" and not self._warned:
                log.warning("%s cannot be locked: processes may do the same work", self.path)
                self._warned = True
            yield state


def publish(partial: Path, target: Path) -> None:
    """Give a file its name, unless another has it by now: what others may have read stays as it is."""
    try:
        os.link(partial, target)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.replace(partial, target)


@contextmanager
def refusing_disk(path: Path, *, cure: str = "") -> Iterator[None]:
    """Errors of the file system within, as a refusal.

    Args:
        cure: what to do; by default that which the error asks for.

    Raises:
        RecipeError: naming ``path``, what is wrong and what to do.
    """
    try:
        yield
    except OSError as error:
        problem = f"cannot write {path}: {disk.cause(error)}"
        raise RecipeError("search.dir", problem, cure or disk.cure(error.errno)) from error


def write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as safetensors.

    Raises:
        RecipeError: the disk is full or otherwise not to be written.
    """
    with refusing_disk(path.parent):
        write_encoded(path, encode_tensors(dict(weights)))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What ``write_weights`` wrote.

    Raises:
        RecipeError: it is damaged, or gone.
    """
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            str(path),
            f"is damaged or gone ({error})",
            f"delete {path.parent.name} and the rounds after it: they are then made again",
        ) from None


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Write an outcome as JSON; a loss that is not finite becomes null.

    Raises:
        RecipeError: the disk is full or otherwise not to be written.
    """
    loss = outcome.loss if math.isfinite(outcome.loss) else None
    with refusing_disk(path.parent), path.open("w") as file:
        file.write(json.dumps({"accuracy": outcome.accuracy, "loss": loss}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_outcome(path: Path) -> Outcome:
    """What ``write_outcome`` wrote.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
        loss = values["loss"]
        return Outcome(accuracy=float(values["accuracy"]), loss=math.inf if loss is None else float(loss))
    except (ValueError, KeyError, TypeError):
        raise RecipeError(str(path), "is damaged", "delete it: it is then made again") from None
