"""The options of compressing and restoring: two frozen objects with checked values.

The command line makes its flags from their fields.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

from percov2.container import bitstream

__all__ = ["DecodeOptions", "EncodeOptions", "OptionError", "options_from"]


class OptionError(ValueError):
    """The error for an invalid value of an option. The message has the option's Python name."""


def _option(default: Any, help_: str, low: float | None = None, high: float | None = None) -> Any:
    """Return a field with a help text and an inclusive range. None means that there is no limit."""
    return field(default=default, metadata={"help": help_, "low": low, "high": high})


def _checked(options: Any) -> None:
    """Check the types and ranges of fields, and convert NumPy's numbers to plain ones."""
    for one in dataclasses.fields(options):
        value, (low, high) = getattr(options, one.name), (one.metadata["low"], one.metadata["high"])
        whole = "int" in str(one.type)
        if one.type == "bool":
            if not isinstance(value, bool):
                raise OptionError(f"{one.name} must be True or False, not {value!r}")
        elif low is None:
            if value is not None and not isinstance(value, str):
                raise OptionError(f"{one.name} must be a text, not {value!r}")
        elif value is not None:
            number = _number(value, whole)
            if number is None or not low <= number <= high:
                kind = "a whole number" if whole else "a number"
                raise OptionError(f"{one.name} must be {kind} from {low} to {high}, not {value!r}")
            object.__setattr__(options, one.name, number)
        elif "None" not in str(one.type):
            raise OptionError(f"{one.name} must be a number, not None")


def _number(value: Any, whole: bool) -> float | None:
    """Return a plain int or float, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return None
    try:
        return operator.index(value) if whole else float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None


Options = TypeVar("Options", "EncodeOptions", "DecodeOptions")


def options_from(kind: type[Options], options: Options | None, changes: dict[str, Any]) -> Options:
    """Return ``options``, or the defaults if it is None, with some fields replaced.

    Raises:
        TypeError: ``options`` has another class, or a field is unknown.
        OptionError: a value is invalid.
    """
    if options is None:
        options = kind()
    elif not isinstance(options, kind):
        raise TypeError(f"options must be {kind.__name__}, not {options!r}")
    known = [one.name for one in dataclasses.fields(kind)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; there are {', '.join(known)}")
    return dataclasses.replace(options, **changes) if changes else options


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """The options of compressing.

    Attributes:
        rate: name of a rate of the model. None means the model's default.
        schedule: name of an entropy schedule. None means the model's default.
        target_bytes: largest size of a file in bytes, 1 to 67,108,864. The file holds as many
            stages as fit. A picture with too many tokens for an incomplete file uses the finest
            coarser rate whose complete file fits. None sets no limit.
        stages: number of stages in the file, 1 to 65,536. The decoder draws the other stages (the
            paper's hybrid mode). None, or the number of all stages, gives a complete file.
        draw_seed: seed of the decoder's draws for incomplete files, 0 to 65,535. A value above 0
            costs two or three bytes.
        slack: largest loss of cosine similarity, 0 to 2. Each place takes the likeliest of those of
            its 16 nearest codes whose similarity is at most ``slack`` below that of the nearest.
        effort: number of rounds of a search for better tokens, 0 to 1,000. A round takes about as
            long as decoding the picture three times. 16 rounds bring most of the gain.
        max_pixels: largest accepted number of pixels, 1 to 2^32.

    Raises:
        OptionError: a value has the wrong type or is outside its range, ``stages`` and
            ``target_bytes`` are both given, or ``draw_seed`` is given without either.

    >>> EncodeOptions(rate="r010", target_bytes=300).target_bytes
    300
    """

    rate: str | None = _option(None, "rate of the model, e.g. r031 (default: the model's)")
    schedule: str | None = _option(None, "entropy schedule, e.g. qlds12 (default: the model's)")
    target_bytes: int | None = _option(
        None,
        "largest size of the file in bytes; as many stages as fit are sent (default: no limit)",
        1,
        1 << 26,
    )
    stages: int | None = _option(
        None,
        "number of entropy stages in the file; the decoder draws the others (default: all)",
        1,
        bitstream.MAX_STAGES_SENT,
    )
    draw_seed: int = _option(
        0,
        "seed of the tokens that --stages or --target-bytes leaves to the decoder (default: 0)",
        0,
        bitstream.MAX_SEED,
    )
    slack: float = _option(
        0.0,
        "most cosine similarity to give up for a likelier one of the 16 nearest codes (default: 0)",
        0,
        2,
    )
    effort: int = _option(
        0,
        "rounds of a search for better tokens, e.g. 16; each takes as long as decoding the picture "
        "three times (default: 0)",
        0,
        1000,
    )
    max_pixels: int = _option(
        bitstream.MAX_PIXELS,
        f"largest accepted number of pixels (default: {bitstream.MAX_PIXELS})",
        1,
        bitstream.MAX_SIDE**2,
    )

    def __post_init__(self) -> None:
        _checked(self)
        if self.stages is not None and self.target_bytes is not None:
            raise OptionError("stages and target_bytes exclude each other; give one")
        if self.draw_seed and self.stages is None and self.target_bytes is None:
            raise OptionError("draw_seed needs stages or target_bytes; complete files draw nothing")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """The options of restoring.

    Attributes:
        realism: 0 (faithful) to 1 (realistic), for models with a realism dial. None means the
            rate's default.
        steps: number of flow evaluations, 1 to 1,000. None means the rate's default.
        guidance: scale of the classifier-free guidance on the caption, 0 to 100. 1 disables
            guidance. None means the model's default.
        seed: seed of the starting noise, 0 to 2^63 - 1.
        allow_truncated: True to restore the intact stages of a truncated file and draw the others.
            Damage in a truncated file is not detected. False refuses such a file.
        allow_sparse: True to restore a file that declares more than 65,536 tokens in almost no
            bytes, as a large picture of a plain colour does. False refuses such a file at once,
            because a forged one would cost minutes.
        max_pixels: largest number of pixels that a file may declare, 1 to 2^32.

    Raises:
        OptionError: a value has the wrong type or is outside its range.

    >>> DecodeOptions(steps=20, realism=0.5).steps
    20
    """

    realism: float | None = _option(
        None,
        "realism of the picture: 0 = faithful, 1 = realistic (default: the rate's)",
        0,
        1,
    )
    steps: int | None = _option(
        None, "number of flow evaluations, 1 to 1000 (default: the rate's)", 1, 1000
    )
    guidance: float | None = _option(
        None,
        "guidance scale of the caption, 0 to 100; 1 disables guidance (default: the model's)",
        0,
        100,
    )
    seed: int = _option(0, "seed of the starting noise (default: 0)", 0, 2**63 - 1)
    allow_truncated: bool = _option(
        False, "restore the intact part of a truncated file (default: refuse the file)"
    )
    allow_sparse: bool = _option(
        False, "restore a large plain picture whose tokens cost almost no bytes (default: refuse)"
    )
    max_pixels: int = _option(
        bitstream.MAX_PIXELS,
        f"largest number of pixels that a file may declare (default: {bitstream.MAX_PIXELS})",
        1,
        bitstream.MAX_SIDE**2,
    )

    def __post_init__(self) -> None:
        _checked(self)
