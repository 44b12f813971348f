"""The schema of a settings dataclass: its dotted keys, their types in words, and the conversion of plain values.

A settings dataclass (Recipe, a cluster profile) is frozen, nests other settings dataclasses, and has leaves of type
``bool``, ``int``, ``float``, ``str``, ``Literal``, ``tuple``, ``dict`` or one of these ``| None``.
Each leaf has a docstring under it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from cyclebnn_dist.config.errors import RecipeError


class Leaf(NamedTuple):
    """One setting: its dotted key, type hint, default value and docstring."""

    key: str
    hint: Any
    default: Any
    doc: str


def leaves(settings: type) -> tuple[Leaf, ...]:
    """Return every setting of a settings dataclass, in the order of its source."""
    return _leaves(settings)


def flatten(settings: Any) -> dict[str, Any]:
    """Return the plain value of every dotted key."""
    result = {}
    for leaf in leaves(type(settings)):
        value: Any = settings
        for name in leaf.key.split("."):
            value = getattr(value, name)
        result[leaf.key] = list(value) if isinstance(value, tuple) else value
    return result


@cache
def _leaves(settings: type) -> tuple[Leaf, ...]:
    return tuple(_walk(settings, settings(), ""))


def _walk(settings: type, defaults: Any, prefix: str) -> Iterator[Leaf]:
    docs = field_docs(settings)
    for name, hint in hints(settings).items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _walk(hint, default, f"{prefix}{name}.")
        else:
            yield Leaf(prefix + name, hint, default, docs.get(name, ""))


@cache
def hints(settings: type) -> dict[str, Any]:
    """Return the resolved type hint of every field."""
    resolved = typing.get_type_hints(settings)
    return {field.name: resolved[field.name] for field in dataclasses.fields(settings)}


@cache
def field_docs(settings: type) -> dict[str, str]:
    """Return the docstring under every field that has one, read from the class's source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return docs


def find(settings: type, key: str) -> Any:
    """Return the type hint behind a dotted key: a leaf's, a nested settings class, or None for an unknown key."""
    hint: Any = settings
    for part in key.split("."):
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            hint = hints(hint).get(part)
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif hint is not Any:
            return None
    return hint


def nearest(settings: type, key: str) -> str:
    """Return advice that names the valid key nearest to an unknown one, or what its group has."""
    keys = [leaf.key for leaf in leaves(settings)]
    group, _, last = key.rpartition(".")
    siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == group}
    found = [known for known in keys if known.rpartition(".")[2] == last]
    groups = {known.rpartition(".")[0]: known for known in found}
    if close := difflib.get_close_matches(group, groups, n=1, cutoff=0.6):
        found = [groups[close[0]]]
    found = found or [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    found = found or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if found:
        return f"did you mean {' or '.join(found[:3])}?"
    if group and siblings:
        return f"{group} has: {', '.join(siblings)}"
    tops = list(dict.fromkeys(known.partition(".")[0] for known in keys))
    close = difflib.get_close_matches(key.partition(".")[0], tops, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(tops)}"


def describe(hint: Any) -> str:
    """Return a type in a reader's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return (
            " or ".join(describe(argument) for argument in arguments if argument is not type(None))
            + " or null"
        )
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            inner = describe(arguments[0])
            return f"list of {inner}" + ("" if arguments[0] is str else " pairs" if inner[0] == "[" else "s")
        if len(set(arguments)) > 1:
            return f"[{', '.join(map(describe, arguments))}]"
        return f"list of {len(arguments)} {describe(arguments[0])}s"
    if origin is dict:
        return "mapping"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(hint, "any value")


def is_text(hint: Any) -> bool:
    """Say whether a leaf takes text only, so that an override needs no quotes: text is taken as it is written."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(isinstance(choice, str) for choice in arguments)
    return hint is str


def convert(hint: Any, value: Any, *, key: str, file: str = "") -> Any:
    """Turn a plain value (from YAML or JSON) into the type of its field, without guessing.

    Integers are taken for numbers; numbers written ``1e-3``, which YAML 1.1 reads as text, too. Nothing else changes type.

    Raises:
        RecipeError: the value has another type, or is none of the choices.
    """
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _convert_group(hint, value, key=key, file=file)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return convert(inner, value, key=key, file=file)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
    elif origin is tuple and isinstance(value, list | tuple):
        many = arguments[-1] is Ellipsis
        if many or len(value) == len(arguments):
            inner_hints = arguments[:1] * len(value) if many else arguments
            return tuple(
                convert(inner, item, key=f"{key}[{index}]", file=file)
                for index, (inner, item) in enumerate(zip(inner_hints, value, strict=True))
            )
    elif origin is dict and isinstance(value, Mapping):
        return {str(k): convert(arguments[1], v, key=f"{key}.{k}", file=file) for k, v in value.items()}
    elif hint is float and (number := _number(value)) is not None:
        return number
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    problem = "has no value" if value is None else f"{_show(value)} is not {_article(describe(hint))}"
    raise RecipeError(key, problem, _advice(hint, value), file)


def _convert_group(settings: type, value: Any, *, key: str, file: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(
            key, f"{_show(value)} stands where a group of keys belongs", nearest(settings, ""), file
        )
    prefix = f"{key}." if key else ""
    known = hints(settings)
    for name in value:
        if name not in known:
            raise RecipeError(f"{prefix}{name}", "unknown key", nearest(settings, str(name)), file)
    return settings(**{n: convert(known[n], v, key=prefix + n, file=file) for n, v in value.items()})


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _advice(hint: Any, value: Any) -> str:
    if value is None:
        return "give it a value, or leave the key out for its default"
    if hint in (int, float) and isinstance(value, float):
        return "it must be a whole number" if hint is int else "it must be finite"
    if hint is str or (is_text(hint) and isinstance(value, bool)):
        return "YAML reads it as another type: put it in quotes"
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        choices = [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else ""
    if typing.get_origin(hint) is tuple:
        return "write it in brackets: [a, b]"
    return ""


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _article(words: str) -> str:
    if words.startswith(("one of", "true or", "any", "text", "[")):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def plain(value: Any) -> Any:
    """Return settings as nested dictionaries, lists and scalars; integers in number fields become floats."""
    return _plain(type(value), value)


def _plain(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return {name: _plain(inner, getattr(value, name)) for name, inner in hints(hint).items()}
    if isinstance(value, list | tuple):
        inner = typing.get_args(hint) or (Any, ...)
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        return [_plain(kind, item) for kind, item in zip(inner, value, strict=True)]
    if isinstance(value, Mapping):
        return {str(k): _plain(Any, v) for k, v in value.items()}
    if hint is float and isinstance(value, int):
        return float(value)
    return value
