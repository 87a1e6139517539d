"""``config.json`` of a model folder (rates, defaults, backbone), and the lookup of a model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from percov2.extras import require
from percov2.stored_files import one_line, read_json

__all__ = ["EMBEDDED", "LATENT_SIDE", "PAPER_RATES", "PREDICTIONS", "ModelConfig", "Rate"]
__all__ += ["embedded_rate", "find_model", "read_config"]

EMBEDDED = Path(__file__).resolve().parent.parent / "pretrained"
"""The folder of the models that are part of percov2."""
_BACKBONES = ("tiny", "sd3", "perco")
_IN_PIPELINE = "percov2"
"""The folder of our parts in a saved ``PerCoV2Pipeline``."""
_Settings = TypeVar("_Settings", "Rate", "ModelConfig")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PREDICTIONS = ("velocity", "sample")
LATENT_SIDE = 8
"""Pixels per side of a latent position in every backbone."""
_SAMPLING = {"steps": (1, 1000), "realism": (0.0, 1), "decoder_noise": (0.0, 10)}
"""Ranges of settings that a model and its rates have; whole numbers are ints."""


@dataclass(frozen=True)
class Rate:
    """A rate point, whose name is also that of its folder in the model folder.

    Tokens are squares of ``token_side`` pixels; V is ``codebook_size``. The defaults of flow
    ``steps``, dial and decoder noise are the model's if None.
    """

    name: str
    token_side: int
    codebook_size: int
    steps: int | None = None
    realism: float | None = None
    decoder_noise: float | None = None

    def check(self) -> None:
        """Raise ValueError for a value of the wrong type or outside its range."""
        name, side = self.name, self.token_side
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(f"a rate's name must be that of a folder, not {name!r}")
        if not name.isprintable():
            raise ValueError(f"a rate's name must consist of printable characters, not {name!r}")
        _check_ranges(self, f" of {name}", token_side=(LATENT_SIDE, 64), codebook_size=(2, 8192))
        if side % LATENT_SIDE:
            raise ValueError(f"token_side of {name} is {side}, no multiple of {LATENT_SIDE}")
        own = {field: _SAMPLING[field] for field in _SAMPLING if getattr(self, field) is not None}
        _check_ranges(self, f" of {name}", **own)


PAPER_RATES = (
    Rate("r0020", 64, 256),
    Rate("r0024", 64, 1024),
    Rate("r0098", 32, 1024),
    Rate("r0313", 16, 256),
    Rate("r0508", 16, 8192),
    Rate("r0938", 8, 64),
    Rate("r1250", 8, 256),
)
"""The paper's seven rates. Names count ten thousandths of a bit per pixel under uniform coding,
log2 V / token_side²."""


@dataclass(frozen=True)
class ModelConfig:
    """``config.json`` of a model folder.

    Attributes:
        rates: rates in the order of the rate index in files; never reorder them.
        default_rate, default_schedule: names of a rate and of an entropy schedule.
        steps, guidance: default sampling; a rate may have its own steps.
        prediction: output of the flow transformer, "velocity" or "sample".
        window, overlap: sides of the sampling windows, in latent positions; those of "tiny" may be
            an eighth longer (``percov2.models.windows.window_side``).
        backbone: kind of the networks, one of ``_BACKBONES``.
        base: hub id or folder of a large backbone's base model; "" for "tiny".
        decoder_noise: standard deviation at realism 1 of the noise that "tiny" adds to the sampled
            latents; its decoder turns the noise into textures that do not repeat.
        realism: default of the realism dial, 0 to 1; None for a model without a dial, which paints
            as at realism 1.
    """

    name: str
    rates: tuple[Rate, ...]
    default_rate: str
    default_schedule: str = "qlds12"
    steps: int = 1
    guidance: float = 1.0
    prediction: str = "sample"
    window: int = 32
    overlap: int = 8
    backbone: str = "tiny"
    base: str = ""
    decoder_noise: float = 0.0
    realism: float | None = None

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``; ValueError if it is missing or its values do not match."""
        path = folder / "config.json"
        if not path.exists():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        values = read_json(path)
        try:
            if not isinstance(values, dict) or "rates" not in values:
                raise ValueError("it describes no percov2 model: it has no rates")
            rates = values["rates"]
            if not isinstance(rates, list) or not rates:
                raise ValueError(f"rates must be a list of at least one rate, not {rates!r:.60}")
            values["rates"] = tuple(_built(Rate, rate, "a rate") for rate in rates)
            config = _built(cls, values, "the model")
            config.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return config

    def check(self) -> None:
        """Raise ValueError for a value of the wrong type or outside its range."""
        for rate in self.rates:
            rate.check()
        if len({rate.name for rate in self.rates}) != len(self.rates):
            raise ValueError("two rates have the same name")
        for field in ("name", "default_schedule", "base"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} must be a text, not {getattr(self, field)!r}")
        if not self.name.isprintable():
            raise ValueError(f"name must consist of printable characters, not {self.name!r}")
        if not isinstance(self.default_rate, str):
            raise ValueError(f"default_rate must be the name of a rate, not {self.default_rate!r}")
        self.rate(self.default_rate)
        ranges = {"guidance": (0.0, 100), **_SAMPLING}
        if self.realism is None:
            del ranges["realism"]
            if any(rate.realism is not None for rate in self.rates):
                raise ValueError("a rate has a realism, but the model has none")
        _check_ranges(self, "", **ranges)
        if self.backbone not in _BACKBONES:
            raise ValueError(f"backbone must be one of {_BACKBONES}, not {self.backbone!r}")
        if (self.backbone == "tiny") != (self.base == ""):
            needed = "none" if self.backbone == "tiny" else "a hub id or a folder"
            raise ValueError(f"base is {self.base!r}; backbone {self.backbone} needs {needed}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {self.prediction!r}")
        _check_ranges(self, "", window=(1, 4096))
        _check_ranges(self, "", overlap=(0, self.window - 1))

    def save(self, folder: Path) -> None:
        """Write ``folder/config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def default_steps(self, rate: str | None = None) -> int:
        """Return the default number of flow evaluations at a rate; None for the default rate."""
        return self._own(rate or self.default_rate, "steps")

    def _own(self, rate: str, setting: str) -> Any:
        """Return a setting of a rate, or the model's if the rate has none."""
        own = getattr(self.rate(rate), setting)
        return getattr(self, setting) if own is None else own

    def chosen_realism(self, rate: str, realism: float | None) -> float:
        """Return ``realism``, or the default at a rate if it is None.

        Raises ValueError outside 0 to 1, and for any realism if the model has no dial.
        """
        if realism is None:
            default = self._own(rate, "realism")
            return 1.0 if default is None else float(default)
        if self.realism is None:
            raise ValueError("this model has no realism dial; leave realism out")
        _check("realism", realism, 0.0, 1)
        return float(realism)

    def grain(self, rate: str, realism: float) -> float:
        """Return the standard deviation of the decoder's noise at a rate and a realism."""
        return realism * self._own(rate, "decoder_noise")

    def coarser(self, than: Rate) -> list[Rate]:
        """Return the rates with larger tokens than a rate's, the finest first."""
        coarser = [rate for rate in self.rates if rate.token_side > than.token_side]
        return sorted(coarser, key=lambda rate: (rate.token_side, -rate.codebook_size))

    def rate(self, name: str) -> Rate:
        """Return a rate by name; the ValueError for an unknown one lists the rates."""
        found = next((rate for rate in self.rates if rate.name == name), None)
        if found is None:
            names = ", ".join(rate.name for rate in self.rates)
            raise ValueError(f"unknown rate {name!r}; model {self.name} has {names}")
        return found


def _built(kind: type[_Settings], values: Any, owner: str) -> _Settings:
    """Return a dataclass of an object of JSON; ValueError for unknown or missing settings."""
    if not isinstance(values, dict):
        raise ValueError(f"{owner} must be an object of settings, not {values!r:.60}")
    known = dataclasses.fields(kind)
    if unknown := sorted(values.keys() - {field.name for field in known}):
        raise ValueError(f"{owner} has unknown settings: {', '.join(map(repr, unknown))}")
    needed = [field.name for field in known if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{owner} lacks the settings {', '.join(missing)}")
    return kind(**values)


def read_config(folder: Path, *settings: str) -> dict[str, Any]:
    """Return the ``config.json`` of a network.

    Args:
        folder: the network's folder.
        settings: names of settings that must be whole numbers from 1 to 65,536, or two of them
            from 0 if the name ends in "blocks".

    Raises:
        ValueError: the file is missing or damaged, or a setting is missing or wrong.
        OSError: the file cannot be read.
    """
    path = folder / "config.json"
    values = read_json(path)
    try:
        if not isinstance(values, dict):
            raise ValueError("it contains no settings")
        for name in settings:
            value = values.get(name)
            if name.endswith("blocks"):
                if not isinstance(value, list) or len(value) != 2:
                    raise ValueError(f"{name} must be two whole numbers, not {value!r}")
                for one in value:
                    _check(name, one, 0, 65536)
            else:
                _check(name, value, 1, 65536)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


@lru_cache(1)
def _rates_by_id(folder: Path) -> dict[int, tuple[str, str]]:
    """Return the model and rate of every id of the models in a folder.

    Each line of a ``model_id`` file holds the hexadecimal id of a rate, a space and its name.
    """
    found: dict[int, tuple[str, str]] = {}
    for path in sorted(folder.glob("*/model_id")):
        model = read_json(path.with_name("config.json"))["name"]
        for line in path.read_text(encoding="utf-8").splitlines():
            known, _, rate = line.partition(" ")
            found.setdefault(int(known, 16), (model, rate))
    return found


def embedded_rate(model_id: int) -> tuple[str, str] | None:
    """Return the names of the embedded model and rate with this id, or None."""
    return _rates_by_id(EMBEDDED).get(model_id)


def find_model(name_or_path: str | Path) -> tuple[Path, ModelConfig]:
    """Return the folder of a model and its configuration; loads no network and no torch.

    Args:
        name_or_path: as for ``percov2.models.backbone.open_backbone``. The name of an embedded
            model means a folder of this name only if that holds a model of ours; a path with a
            slash never means an embedded model.

    Raises:
        ValueError: no such model, a damaged configuration, or another kind of backbone.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"a model must be a name or a folder, not {name_or_path!r}")
    kind, colon, path = str(name_or_path).partition(":")
    if not colon or kind not in _BACKBONES:
        kind, path = "", str(name_or_path)
    embedded = sorted(p.parent.name for p in EMBEDDED.glob("*/model_id"))
    folder = _first_model(Path(path), Path(path) / _IN_PIPELINE)
    # A folder that happens to have the name, such as a clone of another project, does not count.
    if path in embedded and (folder is None or not _has_rates(folder)):
        folder = EMBEDDED / path
    if folder is None and kind and _HUB_ID.fullmatch(path) and not Path(path).exists():
        folder = _download(path)
    if folder is None:
        raise ValueError(f"no model {path!r}: give a model folder or one of {embedded}")
    config = ModelConfig.load(folder)
    if kind not in ("", config.backbone):
        raise ValueError(f"{folder} holds a {config.backbone!r} model, not a {kind!r} one")
    return folder, config


def _first_model(*folders: Path) -> Path | None:
    """Return the first folder with a model of ours, else the first with any config.json."""
    present = [folder for folder in folders if os.path.exists(folder / "config.json")]
    return next((folder for folder in present if _has_rates(folder)), next(iter(present), None))


def _has_rates(folder: Path) -> bool:
    """Return True for a model of ours, also a damaged one: its rates have names and token sides."""
    try:
        values = read_json(folder / "config.json")
        rates = values["rates"]
        return bool(rates) and all({"name", "token_side"} <= rate.keys() for rate in rates)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _download(hub_id: str) -> Path:
    require("torch", f"downloading {hub_id}", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id))
    except Exception as error:  # the hub raises errors of many types; the message has the reason
        text = f"no model {hub_id!r}: no such folder, and the hub says: {one_line(error)}"
        raise ValueError(text) from error
    if (found := _first_model(folder, folder / _IN_PIPELINE)) is None:
        raise ValueError(f"the hub's {hub_id!r} is no percov2 model: it has no config.json")
    return found


def _check_ranges(config: object, of: str, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        _check(name + of, getattr(config, name), low, high)


def _check(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless a value is in the range, and whole if ``low`` is an int."""
    whole = type(low) is int
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} must be a {kind} from {low:g} to {high}, not {value!r}")
