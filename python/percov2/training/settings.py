"""Configuration files as dataclasses, and the model ids of a model folder's rates."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from percov2.codec import Codec
from percov2.stored_files import one_line, read_regular
from percov2.training.loop import LoopConfig

__all__ = [
    "as_table",
    "build_config",
    "build_phase",
    "constructed",
    "read_recipe",
    "read_section",
    "write_model_ids",
]

Config = TypeVar("Config")
Network = TypeVar("Network")
_MOST_BYTES = 1 << 24
Values = dict[str, Any]


def read_section(path: Path, section: str) -> Values:
    """Return the table of a phase from a TOML file. Raise ValueError if there is none."""
    try:
        tables = tomllib.loads(read_regular(path, _MOST_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no TOML file: {one_line(error)}") from error
    if section not in tables:
        raise ValueError(f"{path.name} has no [{section}] section; it has {sorted(tables)}")
    return as_table(tables[section], f"{path.name}: [{section}]")


def as_table(value: Any, name: str) -> Values:
    """Return a value of a TOML file that must be a table; ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, not {value!r}")
    return value


def read_recipe(path: Path, section: str, chosen: str | None, table: str = "recipes") -> Values:
    """Return the table of a phase with the chosen recipes merged over it, in order.

    Recipe ``NAME`` is the table ``[SECTION.recipes.NAME]``. It holds only what differs from the
    section.

    Args:
        path: the TOML file.
        section: name of the phase's table.
        chosen: names of recipes, separated by commas. None returns the section alone.
        table: name of the table of recipes.

    Raises:
        ValueError: the file has no such section or recipe.
    """
    values = read_section(path, section)
    recipes = as_table(values.pop(table, {}), f"{path.name}: [{section}.{table}]")
    for name in chosen.split(",") if chosen else ():
        if name not in recipes:
            wanted = f"[{section}.{table}.{name}]"
            raise ValueError(f"{path.name} has no {wanted}; it has {sorted(recipes)}")
        recipe = as_table(recipes[name], f"{path.name}: [{section}.{table}.{name}]")
        values = _merged(values, recipe)
    return values


def _merged(values: Values, own: Values) -> Values:
    """Merge ``own`` over ``values``, table by table."""
    merged = {**values, **own}
    for key in values.keys() & own.keys():
        if isinstance(values[key], dict) and isinstance(own[key], dict):
            merged[key] = _merged(values[key], own[key])
    return merged


def build_config(kind: type[Config], values: Values) -> Config:
    """Return the dataclass ``kind`` with the values of a TOML table.

    Raises ValueError if the values do not match the fields' types.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict) or (unknown := sorted(set(values) - hints.keys())):
        found = values if not isinstance(values, dict) else unknown
        raise ValueError(f"unknown settings {found}; known ones are {sorted(hints)}")
    # Settings are tuples, but TOML and JSON have lists.
    given = {name: _tuples(value) for name, value in values.items()}
    for name, value in given.items():
        if not _fits(value, hints[name]):
            wanted = _wanted(hints[name])
            raise ValueError(f"setting {name} must be {wanted}, not {values[name]!r}")
    missing = dataclasses.MISSING
    needed = [
        field.name
        for field in dataclasses.fields(cast(Any, kind))
        if field.default is missing and field.default_factory is missing
    ]
    if lacking := [name for name in needed if name not in given]:
        raise ValueError(f"missing settings {lacking}; known ones are {sorted(hints)}")
    return kind(**given)


def constructed(kind: Callable[..., Network], table: str, sizes: Values, **fixed: Any) -> Network:
    """Return a network with the sizes of a table.

    Args:
        kind: class or function that makes the network.
        table: name of the table, for messages.
        sizes: keyword arguments by name.
        fixed: further ones, which the table must not have.

    Raises:
        ValueError: a size is unknown, or of a wrong type or value.
    """
    accepted = inspect.signature(kind).parameters
    known = sorted(accepted.keys() - fixed.keys())
    anything = any(one.kind is one.VAR_KEYWORD for one in accepted.values())
    if not anything and (unknown := sorted(sizes.keys() - set(known))):
        raise ValueError(f"unknown settings {unknown} of {table}; known ones are {known}")
    try:
        return kind(**sizes, **fixed)
    except MemoryError:
        raise
    except Exception as error:  # constructors raise errors of many types for wrong arguments
        raise ValueError(f"settings of {table}: {one_line(error)}") from error


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _wanted(hint: Any) -> str:
    """Return a type in words of TOML, which has lists instead of tuples."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(kind) for kind in kinds if kind is not types.NoneType)
    if origin is tuple and kinds[-1] is Ellipsis:
        return f"a list, each {_wanted(kinds[0])}"
    if origin is tuple:
        return f"a list of {len(kinds)} values"
    return _WORDS.get(hint, "a table")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a setting has the type of its field."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in kinds)
    if origin is tuple:
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value) if isinstance(value, tuple) else kinds
        return (
            isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
        )
    if hint in (int, float):
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        return number and not math.isnan(value)
    return hint is Any or isinstance(value, origin or hint)


def build_phase(kind: type[Config], values: Values) -> tuple[Config, LoopConfig]:
    """Return the settings of a phase and of its loop, which ``values`` holds in table "loop"."""
    loop = build_config(LoopConfig, values.pop("loop", {}))
    return build_config(kind, values), loop


def write_model_ids(folder: Path) -> None:
    """Write the file ``model_id``, which holds the model id of each rate.

    With it, `percov2 info` names the model and the rate of a file without loading them. Rates
    without an entropy model have no id.
    """
    codec = Codec.from_pretrained(folder)
    names = [rate.name for rate in codec.config.rates]
    able = [name for name in names if (folder / name / "entropy" / "config.json").is_file()]
    text = "".join(f"{codec.model_id(name):04x} {name}\n" for name in able)
    (folder / "model_id").write_text(text, encoding="utf-8")
