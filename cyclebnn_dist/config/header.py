"""The header of a recipe: what it is, what it is known to reach, what it needs and how long it takes.

It is the comment at the top of the file: a title, an empty comment line, and then a line for each of ``FIELDS``,
which may go on in lines that are indented further:

    # CycleBNN's ResNet-18 on ImageNet.
    #
    #   published  60.4 % top-1 (arXiv 2410.00050)
    #   measured   not yet run
    #   needs      16 GPUs as written
    #   takes      not yet measured

Whatever follows a further empty comment line is for readers of the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cyclebnn_dist.config.errors import RecipeError

FIELDS = ("published", "measured", "needs", "takes")
"""published: an accuracy with its source; measured: by this project, and on what; needs: hardware; takes: time."""

_FIELD = re.compile(r"   ?(\w+) +(\S.*)")


@dataclass(frozen=True)
class Header:
    """What the top of a recipe says."""

    path: Path
    title: str
    published: str
    measured: str
    needs: str
    takes: str


def read_header(path: Path) -> Header:
    """The header of a recipe.

    Raises:
        RecipeError: there is none, or not all of it.
    """
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    blocks = [block.split("\n") for block in "\n".join(lines).split("\n\n")]
    title = " ".join(line.strip() for line in blocks[0])
    fields: dict[str, str] = {}
    for line in blocks[1] if len(blocks) > 1 else ():
        found = _FIELD.fullmatch(line)
        if found and found[1] in FIELDS:
            name = found[1]
            fields[name] = found[2]
        elif fields:
            fields[name] += f" {line.strip()}"
    missing = [name for name in FIELDS if name not in fields]
    if not title or missing:
        raise RecipeError(
            str(path),
            f"its header does not say {', '.join(missing)}" if title else "it has no header",
            f"begin the file with comments: a title, an empty one, and lines for {', '.join(FIELDS)}",
        )
    return Header(path, title, **fields)


def find_recipes(folder: Path) -> list[Path]:
    """All recipes below a folder, by name.

    Raises:
        RecipeError: there are none.
    """
    found = sorted(folder.rglob("*.yaml"))
    if not found:
        raise RecipeError(str(folder), "holds no recipe", "name a folder with .yaml files")
    return found


def render_headers(headers: list[Header], *, markdown: bool = False) -> str:
    """What recipes are and reach: a paragraph each for a terminal, or a table in Markdown."""
    if markdown:
        rows = ["| recipe | what it trains | published | measured here | needs |", "|---|---|---|---|---|"]
        for header in headers:
            cells = (_without_stop(header.title), header.published, header.measured, header.needs)
            rows.append(f"| [{header.path.stem}]({header.path}) | {' | '.join(map(_cell, cells))} |")
        return "\n".join(rows) + "\n"
    return "\n".join(
        f"{header.path}\n    {header.title}\n"
        + "".join(f"    {name:<9}  {getattr(header, name)}\n" for name in FIELDS)
        for header in headers
    )


def _without_stop(title: str) -> str:
    return title.removesuffix(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
