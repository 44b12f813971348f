"""Loading of recipes: defaults <- ``base:`` recipe <- recipe <- ``key=value``; and saving, for a run to find itself again.

The only module that imports omegaconf: it reads the YAML, merges and resolves ``${...}``. Types are this package's own
(see schema.py), since their messages are what a user reads.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cyclebnn_dist.config import schema
from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.pattern import with_pattern
from cyclebnn_dist.config.recipe import Recipe
from cyclebnn_dist.config.resume_rules import MAY_CHANGE
from cyclebnn_dist.config.validate import validate

COMMAND_LINE = "the command line"
SAVED_NAME = "recipe.yaml"
"""Name of the resolved recipe in the run folder."""

T = TypeVar("T")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge it over its base and the defaults, apply ``key=value`` overrides, and validate it.

    What the file ``binary.pattern`` says is in ``binary.layers`` of the result, whose ``binary.pattern`` is empty: it and
    all that is made of it (saved recipes, checkpoints) stand without the file.

    Raises:
        RecipeError: a file that cannot be read, an unknown key, a wrong type, a value out of range, an impossible combination.
    """
    return with_pattern(load_settings(Recipe, path, overrides=overrides, check=validate))


def load_settings(
    settings: type[T],
    path: str | os.PathLike[str] | None,
    *,
    overrides: Sequence[str] = (),
    check: Callable[[T], None] | None = None,
) -> T:
    """Read any settings dataclass the way recipes are read (see load_recipe).

    Args:
        settings: the dataclass to fill.
        path: YAML file, or None for the defaults alone.
        overrides: ``key=value`` texts.
        check: called with the result; the file a RecipeError's key came from is added to the error.

    Raises:
        RecipeError: as load_recipe.
    """
    sources = [] if path is None else list(_chain(Path(path), ()))
    sources += [(COMMAND_LINE, _override(settings, text)) for text in overrides]
    origin: dict[str, str] = {}
    for file, mapping in sources:
        _check_keys(settings, mapping, file, origin)
    _refuse_open_keys([mapping for _, mapping in sources], origin)
    try:
        merged = OmegaConf.merge(schema.plain(settings()), *(mapping for _, mapping in sources))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise RecipeError(key or "recipe", _first_line(error), "", _origin(origin, key)) from None
    try:
        result = schema.convert(settings, values, key="")
        if check is not None:
            check(result)
    except RecipeError as error:
        file = error.file or _origin(origin, error.key)
        raise RecipeError(error.key, error.problem, error.cure, file) from None
    return result


def recipe_from_dict(values: Mapping[str, Any], *, file: str = "") -> Recipe:
    """Build a recipe from what to_dict returned; keys that are not there take their defaults.

    Raises:
        RecipeError: an unknown key or a wrong type.
    """
    mapping = copy.deepcopy(dict(values))
    _check_keys(Recipe, mapping, file, {})
    return schema.convert(Recipe, mapping, key="", file=file)


def to_dict(recipe: Any) -> dict[str, Any]:
    """Return a recipe as nested plain dictionaries, lists and scalars, fit for JSON and YAML."""
    return schema.plain(recipe)


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a resolved recipe as YAML; the file is either the old one or the whole new one."""
    target = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe), flags={"allow_objects": False}))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write("# The resolved recipe of this run.\n" + text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_saved(path: str | os.PathLike[str]) -> Recipe:
    """Read what save_recipe wrote.

    Raises:
        RecipeError: the file is missing, is not YAML, or has keys this version does not know.
    """
    return recipe_from_dict(_read(Path(path)), file=str(path))


def recipe_digest(recipe: Recipe) -> int:
    """Return 63 bits that are equal for two recipes which train the same network the same way.

    Keys that may change between two starts of one run (MAY_CHANGE: paths, threads, logging, saving) do not count.
    """
    values = to_dict(recipe)
    for key in MAY_CHANGE:
        *groups, leaf = key.split(".")
        group = values
        for name in groups:
            group = group[name]
        del group[leaf]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _chain(path: Path, visited: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file, mapping) of a recipe's bases, the most general first, and of itself."""
    mapping = _read(path)
    base = mapping.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError("base", "is not a path", "name one recipe, relative to this one", str(path))
        seen = (*visited, path.resolve())
        base_path = path.parent / base
        if base_path.resolve() in seen:
            names = " -> ".join(p.name for p in (*seen, base_path))
            raise RecipeError("base", f"recipes inherit in a circle: {names}", "", str(path))
        if not base_path.is_file():
            raise RecipeError(
                "base", f"no file {base_path}", "the path is relative to this recipe", str(path)
            )
        yield from _chain(base_path, seen)
    yield str(path), mapping


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=False)
    except IsADirectoryError:
        raise RecipeError(str(path), "is a folder, not a YAML file") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise RecipeError(str(path), "no such file", f"the path is taken from {Path.cwd()}") from None
        if error.errno is not None:
            raise RecipeError(str(path), f"cannot be read: {error.strerror}") from None
        values = None  # OmegaConf's way to say that the file holds one scalar
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or _first_line(error)
        raise RecipeError(str(path), f"is not valid YAML: {reason}{where}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            str(path), "is not a mapping of keys to values", "write lines such as  optim: {lr: 0.001}"
        )
    return {str(key): value for key, value in values.items()}


def _override(settings: type, text: str) -> dict[str, Any]:
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        raise RecipeError(text, "is not of the form key=value", "e.g. optim.lr=0.001", COMMAND_LINE)
    hint = schema.find(settings, key)
    if hint is None:
        raise RecipeError(key, "unknown key", schema.nearest(settings, key), COMMAND_LINE)
    value: Any = written
    if not (schema.is_text(hint) and written[:1] not in ("'", '"')):
        try:
            parsed = OmegaConf.from_dotlist([f"value={written}"])
            value = OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[call-overload, index]
        except (YAMLError, OmegaConfBaseException) as error:
            reason = getattr(error, "problem", None) or _first_line(error)
            cure = f"quote or bracket it as in YAML, e.g. '{key}=[\"a*\"]'"
            raise RecipeError(key, f"'{written}' is not valid YAML: {reason}", cure, COMMAND_LINE) from None
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _refuse_open_keys(mappings: Sequence[Mapping[str, Any]], origin: Mapping[str, str]) -> None:
    """Refuse keys whose last word is ``???``, OmegaConf's "to be given": a merge would keep what was there before."""
    last: dict[str, Any] = {}

    def note(mapping: Mapping[str, Any], prefix: str) -> None:
        for name, value in mapping.items():
            last[f"{prefix}{name}"] = value
            if isinstance(value, Mapping):
                note(value, f"{prefix}{name}.")

    for mapping in mappings:
        note(mapping, "")
    for key, value in last.items():
        if value == "???":
            raise RecipeError(
                key, "has no value", f"give it one, e.g. {key}=... on the command line", origin[key]
            )


def _check_keys(
    root: type,
    mapping: dict[str, Any],
    file: str,
    origin: dict[str, str],
    *,
    group: type | None = None,
    prefix: str = "",
) -> None:
    """Refuse unknown keys of one source, and lists where mappings belong or these where lists do; note where each key was set.

    An empty group means no change.
    """
    known = schema.hints(group or root)
    for name in list(mapping):
        key, value = f"{prefix}{name}", mapping[name]
        if name not in known:
            nested = "." in str(name) and schema.find(root, key) is not None
            cure = (
                f"write it nested: {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
                if nested
                else schema.nearest(root, key)
            )
            raise RecipeError(key, "unknown key", cure, file)
        origin[key] = file
        inner = known[name]
        if not dataclasses.is_dataclass(inner):
            # Of these omegaconf merges none with the other, and its message names no key.
            belongs = typing.get_origin(inner)
            if (belongs is dict and isinstance(value, list)) or (
                belongs is tuple and isinstance(value, dict)
            ):
                schema.convert(inner, value, key=key, file=file)
            continue
        assert isinstance(inner, type)
        if value is None:
            del mapping[name]
        elif isinstance(value, dict):
            _check_keys(root, value, file, origin, group=inner, prefix=f"{key}.")
        else:
            cure = f"{key} has: {', '.join(schema.hints(inner))}"
            raise RecipeError(key, f"{value!r} stands where a group of keys belongs", cure, file)


def _origin(origin: Mapping[str, str], key: str) -> str:
    """Return the source that set a key, or the nearest group around it."""
    key = key.partition("[")[0]
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
