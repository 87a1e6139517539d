"""``config.json`` of a model folder (rates, defaults, backbone), and the lookup of a model."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "BACKBONES",
    "EMBEDDED",
    "IN_PIPELINE",
    "LATENT_SIDE",
    "PAPER_RATES",
    "PREDICTIONS",
    "ModelConfig",
    "Rate",
    "find_model",
]


EMBEDDED = Path(__file__).resolve().parent.parent / "pretrained"
BACKBONES = ("tiny", "sd3", "perco")
IN_PIPELINE = "percov2"
"""The folder of our parts in a saved ``PerCoV2Pipeline``."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PREDICTIONS = ("velocity", "sample")
LATENT_SIDE = 8
"""Pixels per side of a latent position in every backbone."""


@dataclass(frozen=True)
class Rate:
    """A rate point.

    Attributes:
        name: name of the rate and of its folder in the model folder.
        token_side: side of a token in pixels.
        codebook_size: number of different tokens V.
        steps: default number of flow evaluations; None for the model's.
        realism: default of the dial; None for the model's.
        decoder_noise: standard deviation of the decoder's noise; None for the model's.
    """

    name: str
    token_side: int
    codebook_size: int
    steps: int | None = None
    realism: float | None = None
    decoder_noise: float | None = None

    def check(self) -> None:
        """Raise ValueError for a value of the wrong type or outside its range."""
        name = self.name
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(f"a rate's name must be that of a folder, not {name!r}")
        side, stride = self.token_side, LATENT_SIDE
        _check_whole(f"token_side of {name}", side, stride, 64)
        if side % stride:
            raise ValueError(f"token_side of {name} is {side}, no multiple of {stride}")
        _check_whole(f"codebook_size of {name}", self.codebook_size, 2, 8192)
        if self.steps is not None:
            _check_whole(f"steps of {name}", self.steps, 1, 1000)
        if self.realism is not None:
            _check_number(f"realism of {name}", self.realism, 1)
        if self.decoder_noise is not None:
            _check_number(f"decoder_noise of {name}", self.decoder_noise, 10)


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
        name: name of the model.
        rates: rates in the order of the rate index in files; never reorder them.
        default_rate: name of the default rate.
        default_schedule: name of the default entropy schedule.
        steps, guidance: default sampling; a rate may have its own steps.
        prediction: output of the flow transformer, "velocity" or "sample".
        window, overlap: sides of the sampling windows, in latent positions.
        backbone: kind of the networks, one of ``BACKBONES``.
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
        """Read ``folder/config.json``.

        Raises:
            ValueError: a missing file, unknown keys, or values that do not fit.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            rates = tuple(Rate(**r) for r in values.pop("rates"))
            config = cls(rates=rates, **values)
            config.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
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
        self.rate(self.default_rate)
        _check_whole("steps", self.steps, 1, 1000)
        _check_number("guidance", self.guidance, 100)
        _check_number("decoder_noise", self.decoder_noise, 10)
        if self.realism is not None:
            _check_number("realism", self.realism, 1)
        elif any(rate.realism is not None for rate in self.rates):
            raise ValueError("a rate has a realism, but the model has none")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {BACKBONES}, not {self.backbone!r}")
        if (self.backbone == "tiny") != (self.base == ""):
            raise ValueError(
                f"base is {self.base!r}; backbone {self.backbone} needs "
                + ("none" if self.backbone == "tiny" else "a hub id or a folder")
            )
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {self.prediction!r}")
        _check_whole("window", self.window, 1, 4096)
        _check_whole("overlap", self.overlap, 0, self.window - 1)

    def save(self, folder: Path) -> None:
        """Write ``folder/config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def default_steps(self, rate: str | None = None) -> int:
        """Return the default number of flow evaluations at a rate; None for the default rate.

        Raises:
            ValueError: an unknown rate.
        """
        own = self.rate(rate or self.default_rate).steps
        return self.steps if own is None else own

    def chosen_realism(self, rate: str, realism: float | None) -> float:
        """Return ``realism``, or the default at a rate if it is None.

        Raises:
            ValueError: realism outside 0 to 1, or any realism for a model without a dial.
        """
        if realism is None:
            own = self.rate(rate).realism
            default = self.realism if own is None else own
            return 1.0 if default is None else float(default)
        if self.realism is None:
            raise ValueError(f"model {self.name} has no realism dial; leave realism out")
        _check_number("realism", realism, 1)
        return float(realism)

    def grain(self, rate: str, realism: float) -> float:
        """Return the standard deviation of the decoder's noise at a rate and a realism."""
        own = self.rate(rate).decoder_noise
        return realism * (self.decoder_noise if own is None else own)

    def coarser(self, than: Rate) -> list[Rate]:
        """Return the rates with larger tokens than a rate's, the finest first."""
        coarser = [rate for rate in self.rates if rate.token_side > than.token_side]
        return sorted(coarser, key=lambda rate: (rate.token_side, -rate.codebook_size))

    def rate(self, name: str) -> Rate:
        """Return a rate by name.

        Raises:
            ValueError: an unknown rate; the message lists the rates.
        """
        for rate in self.rates:
            if rate.name == name:
                return rate
        known = ", ".join(r.name for r in self.rates)
        raise ValueError(f"unknown rate {name!r}; model {self.name} has {known}")


def find_model(name_or_path: str | Path) -> tuple[Path, ModelConfig]:
    """Return the folder of a model and its configuration; loads no network and no torch.

    Args:
        name_or_path: as for ``percov2.models.backbone.open_backbone``.

    Raises:
        ValueError: no such model, a damaged configuration, or another kind of backbone.
    """
    kind, path = _split(str(name_or_path))
    folder = _model_folder(path, hub=kind is not None)
    config = ModelConfig.load(folder)
    if kind not in (None, config.backbone):
        raise ValueError(f"{folder} holds a {config.backbone!r} model, not a {kind!r} one")
    return folder, config


def _split(name: str) -> tuple[str | None, str]:
    kind, colon, path = name.partition(":")
    return (kind, path) if colon and kind in BACKBONES else (None, name)


def _model_folder(name_or_path: str | Path, hub: bool = False) -> Path:
    """Return the folder of an embedded model, a path or (with ``hub``) a hub id.

    Raises:
        ValueError: no such model; the message lists the embedded models.
    """
    for folder in (Path(name_or_path), Path(name_or_path) / IN_PIPELINE, EMBEDDED / name_or_path):
        if (folder / "config.json").is_file():
            return folder
    if hub and _HUB_ID.fullmatch(str(name_or_path)) and not Path(name_or_path).exists():
        return _download(str(name_or_path))
    known = sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))
    raise ValueError(f"no model {str(name_or_path)!r}: give a model folder or one of {known}")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id))
    except Exception as error:  # the hub raises errors of many types; the message has the reason
        raise ValueError(
            f"no model {hub_id!r}: no such folder, and the hub says: {error}"
        ) from error
    for place in (folder, folder / IN_PIPELINE):
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"the hub's {hub_id!r} is no percov2 model: it has no config.json")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: object, high: int) -> None:
    if type(value) not in (int, float) or not 0 <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from 0 to {high}, not {value!r}")
