"""The reference of every setting, written from the docstrings under the fields."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any, Literal

from cyclebnn_dist.config import schema
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.config.resume_rules import MAY_CHANGE


def render_reference(
    format: Literal["text", "markdown"] = "text", *, settings: type = Recipe, width: int = 100
) -> str:
    """Return every dotted key with its type, default and docstring.

    Args:
        format: ``text`` for a terminal, ``markdown`` for one table per group of keys.
        settings: the settings dataclass; the recipe, or a cluster profile.
        width: columns of the text format.
    """
    blocks = []
    for group, doc, leaves in _groups(settings):
        if format == "markdown":
            title = [f"### {group}", ""] if group else []
            rows = [
                f"| `{leaf.key}` | {_cell(schema.describe(leaf.hint))} | `{_value(leaf.default)}` | {_cell(leaf.doc)} |"
                for leaf in leaves
            ]
            blocks.append(
                "\n".join([*title, doc, "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])
            )
        else:
            title = [f"{group}: {doc}" if group else doc]
            entries = [
                f"  {leaf.key} = {_value(leaf.default)}   ({schema.describe(leaf.hint)})\n"
                + textwrap.fill(leaf.doc, width, initial_indent="      ", subsequent_indent="      ")
                for leaf in leaves
            ]
            blocks.append("\n".join([*title, *entries]))
    if settings is Recipe:
        may_change = [leaf.key for leaf in schema.leaves(Recipe) if leaf.key in MAY_CHANGE]
        keys = ", ".join(f"`{key}`" if format == "markdown" else key for key in may_change)
        text = f"When a run is resumed only these keys may differ: {keys}; train.epochs with run.extend_epochs=true."
        blocks.append(text if format == "markdown" else textwrap.fill(text, width, break_on_hyphens=False))
    return "\n\n".join(blocks) + "\n"


def _groups(settings: type) -> list[tuple[str, str, list[schema.Leaf]]]:
    """Return (group, first paragraph of its class, leaves) in source order; settings without groups form one, named ''."""
    groups: dict[str, list[schema.Leaf]] = {}
    for leaf in schema.leaves(settings):
        groups.setdefault(leaf.key.rpartition(".")[0], []).append(leaf)
    return [(group, _doc(settings, group), leaves) for group, leaves in groups.items()]


def _doc(settings: type, group: str) -> str:
    """Return what a group means: the docstring of its field, where it has one, else of its class."""
    owner = settings
    doc = ""
    for name in group.split(".") if group else ():
        doc = schema.field_docs(owner).get(name, "")
        owner = schema.hints(owner)[name]
    assert dataclasses.is_dataclass(owner)
    return doc or (inspect.getdoc(owner) or "").partition("\n\n")[0].replace("\n", " ")


def _value(default: Any) -> str:
    """Return a default as it would be written in YAML."""
    if isinstance(default, bool):
        return str(default).lower()
    if default is None:
        return "null"
    if isinstance(default, str):
        return default or '""'
    if isinstance(default, tuple | list):
        return "[" + ", ".join(_item(item) for item in default) + "]"
    if isinstance(default, float):
        return f"{default:.6g}"
    return str(default)


def _item(item: Any) -> str:
    return f'"{item}"' if isinstance(item, str) else _value(item)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
