"""Configuration files as dataclasses, and the model ids of a model folder's rates."""

from __future__ import annotations

import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from percov2.codec import Codec
from percov2.training.loop import LoopConfig

__all__ = [
    "as_table",
    "build_config",
    "build_phase",
    "read_recipe",
    "read_section",
    "write_model_ids",
]

Config = TypeVar("Config")
Values = dict[str, Any]


def read_section(path: Path, section: str) -> Values:
    """Return the table of a phase from a TOML file. Raise ValueError if there is none."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no TOML file: {error}") from error
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
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            raise ValueError(f"setting {name} must be {wanted}, not {values[name]!r}")
    try:
        return kind(**given)
    except TypeError as error:  # a missing setting
        raise ValueError(f"{error}; the settings are {sorted(hints)}") from error


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
