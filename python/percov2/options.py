"""How pictures are compressed and restored: two frozen objects that travel whole.

The command line makes its flags from the same fields (``cli_options``).
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

from percov2.container import bitstream


class OptionError(ValueError):
    """An option has a value that it cannot have; the message names options as Python does."""


def _option(default: Any, help_: str, low: float | None = None, high: float | None = None) -> Any:
    """Return a field with what help and checks need: an inclusive range, or none."""
    return field(default=default, metadata={"help": help_, "low": low, "high": high})


def _checked(options: Any) -> None:
    """Check types and ranges of the fields that have one, and make plain numbers of NumPy's."""
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
    """Return a plain int or float, None for anything that is no such number."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return None
    return operator.index(value) if whole else float(value)  # type: ignore[arg-type]


Options = TypeVar("Options", "EncodeOptions", "DecodeOptions")


def options_from(kind: type[Options], options: Options | None, changes: dict[str, Any]) -> Options:
    """Return options with some fields replaced.

    Raises:
        TypeError: an object of another kind, or a field that there is not.
        OptionError: values that do not fit.
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
    """How pictures are compressed.

    Attributes:
        rate: name of a rate of the model; None for the model's default.
        schedule: name of an entropy schedule; None for the model's default.
        target_bytes: hold as many stages as so many bytes have room for. Where the complete file is
            longer and readers accept no part of so many tokens, the picture takes the finest
            coarser rate that has a file of so many bytes. 1 to 67,108,864.
        stages: hold the tokens of so many stages; the decoder draws the others (the paper's hybrid
            mode). 1 to 65,536; None, or all of a picture's: a complete file.
        draw_seed: of the decoder's draws for files that do not hold all stages, 0 to 65,535; others
            than 0 cost two or three bytes.
        slack: 0 to 2; above 0 a place takes, of its 16 nearest codes, the likeliest whose cosine
            similarity is at most so much below the nearest one's.
        effort: rounds of a search for tokens that paint the picture better, 0 to 1,000; each takes
            as long as decoding it about three times, and 16 bring most of the gain.
        max_pixels: refuse pictures with more pixels, 1 to 2^32.

    Raises:
        OptionError: a value of another type or outside its range, both stages and target_bytes, or
            a draw_seed without either.

    >>> EncodeOptions(rate="r010", target_bytes=300).target_bytes
    300
    """

    rate: str | None = _option(None, "rate of the model, e.g. r031 (default: the model's)")
    schedule: str | None = _option(None, "entropy schedule, e.g. qlds12 (default: the model's)")
    target_bytes: int | None = _option(
        None, "hold as many stages of tokens as so many bytes have room for", 1, 1 << 26
    )
    stages: int | None = _option(
        None,
        "hold so many stages of tokens; the decoder draws the others (default: all)",
        1,
        bitstream.MAX_STAGES_SENT,
    )
    draw_seed: int = _option(
        0,
        "seed of the tokens that the decoder draws after --stages or --target-bytes (default: 0)",
        0,
        bitstream.MAX_SEED,
    )
    slack: float = _option(
        0.0,
        "take the likeliest of the 16 nearest codes whose cosine similarity is at most this below "
        "the nearest one's (default: 0)",
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
        f"refuse pictures with more pixels (default: {bitstream.MAX_PIXELS})",
        1,
        bitstream.MAX_SIDE**2,
    )

    def __post_init__(self) -> None:
        _checked(self)
        if self.stages is not None and self.target_bytes is not None:
            raise OptionError("stages and target_bytes exclude each other; give one")
        if self.draw_seed and self.stages is None and self.target_bytes is None:
            raise OptionError("draw_seed needs stages or target_bytes: without, nothing is drawn")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How pictures are restored.

    Attributes:
        realism: 0 (faithful) to 1 (realistic), for models with a dial; None for the rate's default.
        steps: flow evaluations, 1 to 1,000; None for the rate's default.
        guidance: classifier-free guidance on the caption, 0 to 100; None for the model's default.
        seed: of the starting noise, 0 to 2^63 - 1.
        allow_truncated: of a file that lacks its end take the stages that are whole, and draw the
            others. Nothing protects such a file from damage in what is left of it.
        max_pixels: refuse files that declare more pixels, 1 to 2^32.

    Raises:
        OptionError: a value of another type or outside its range.

    >>> DecodeOptions(steps=20, realism=0.5).steps
    20
    """

    realism: float | None = _option(
        None, "0 paints a faithful picture, 1 a realistic one (default: the rate's)", 0, 1
    )
    steps: int | None = _option(None, "flow evaluations (default: the rate's)", 1, 1000)
    guidance: float | None = _option(
        None, "weight of the caption; 1 turns it off (default: the model's)", 0, 100
    )
    seed: int = _option(0, "seed of the starting noise (default: 0)", 0, 2**63 - 1)
    allow_truncated: bool = _option(False, "restore what is left of a file that lacks its end")
    max_pixels: int = _option(
        bitstream.MAX_PIXELS,
        f"refuse files that declare more pixels (default: {bitstream.MAX_PIXELS})",
        1,
        bitstream.MAX_SIDE**2,
    )

    def __post_init__(self) -> None:
        _checked(self)
