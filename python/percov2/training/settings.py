"""Configuration files as dataclasses, and the model ids of a model folder's rates."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from percov2.codec import Codec
from percov2.training.loop import LoopConfig

__all__ = ["build_config", "build_phase", "read_recipe", "read_section", "write_model_ids"]

Config = TypeVar("Config")
Values = dict[str, Any]


def read_section(path: Path, section: str) -> Values:
    """Return the table of a phase from a TOML file. Raise ValueError if there is none."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if section not in tables:
        raise ValueError(f"{path.name} has no [{section}] section; it has {sorted(tables)}")
    return tables[section]


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
    recipes = values.pop(table, {})
    for name in chosen.split(",") if chosen else ():
        if name not in recipes:
            wanted = f"[{section}.{table}.{name}]"
            raise ValueError(f"{path.name} has no {wanted}; it has {sorted(recipes)}")
        values = _merged(values, recipes[name])
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

    Raises ValueError if the values do not match the class.
    """
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise ValueError(f"unknown settings {unknown}; known ones are {sorted(names)}")
    try:
        # Settings are tuples, but TOML and JSON have lists.
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:  # a missing setting, or a text instead of a number
        raise ValueError(f"{error}; the settings are {sorted(names)}") from error


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
