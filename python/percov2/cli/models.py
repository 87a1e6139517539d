"""Flags that choose a model and a captioner."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from percov2.cli.faults import about
from percov2.container.captions import CAPTIONERS, check_captioner
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from percov2.codec import Codec
    from percov2.container.captions import Captioner

__all__ = [
    "DEFAULT_MODEL",
    "add_captioner",
    "add_model",
    "check_choices",
    "chosen_captioner",
    "open_codec",
]

DEFAULT_MODEL = "tiny"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--device`` and the flags of large backbones."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="embedded model, model folder, sd3:FOLDER or perco:FOLDER (default: tiny)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="device of the networks: cpu, cuda or cuda:N (default: cpu)",
    )
    group = parser.add_argument_group("options of large models (sd3, perco)")
    group.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="number format of the networks (default: fp32 on cpu, bf16 on cuda)",
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep each network on the device only while it runs (default: keep all there)",
    )
    group.add_argument(
        "--vae-tiling",
        action="store_true",
        help="run the autoencoder in tiles to save memory (default: in one piece)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the flow network, which slows the first picture (default: do not)",
    )
    group.add_argument(
        "--no-t5",
        dest="t5",
        action="store_false",
        help="run sd3 without its largest text encoder (default: with it)",
    )


def check_choices(
    arguments: argparse.Namespace,
    encode: EncodeOptions | None = None,
    decode: DecodeOptions | None = None,
) -> None:
    """Raise a Fault for wrong choices, before torch or a network is loaded.

    Args:
        arguments: arguments with the flags of ``add_model``; those of ``add_captioner`` are
            optional.
        encode: options whose rate and schedule must exist.
        decode: options whose realism must fit the model.
    """
    from percov2.entropy import schedule
    from percov2.models.config import find_model

    if hasattr(arguments, "captioner"):
        name = _captioner(arguments)
        with about(f"captioner {name}"):
            check_captioner(name, arguments.caption, arguments.captioner_model)
    with about(f"model {arguments.model}"):
        if not re.fullmatch(r"(cpu|cuda)(:\d+)?", arguments.device):
            raise ValueError(f"unknown device {arguments.device!r}; use cpu, cuda or cuda:N")
        _, config = find_model(arguments.model)
        given = [flag for flag, is_given in _big_options(arguments).items() if is_given]
        if config.backbone == "tiny" and given:
            raise ValueError(f"this small model does not take {', '.join(given)}")
        rate = config.default_rate
        if encode is not None:
            rate = config.rate(encode.rate or rate).name
            schedule.check_name(encode.schedule or config.default_schedule)
        if decode is not None:
            config.chosen_realism(rate, decode.realism)


def _big_options(arguments: argparse.Namespace) -> dict[str, bool]:
    """Return, for each flag of large models, True if it is given."""
    return {
        "--dtype": arguments.dtype is not None,
        "--offload": arguments.offload,
        "--vae-tiling": arguments.vae_tiling,
        "--compile": arguments.compile,
        "--no-t5": not arguments.t5,
    }


def open_codec(arguments: argparse.Namespace) -> Codec:
    """Return the codec of the chosen model, with the entropy models of all rates loaded."""
    from percov2.codec import Codec
    from percov2.models.backbone import BackboneOptions

    with about(f"model {arguments.model}"):
        options = BackboneOptions(
            arguments.dtype,
            arguments.offload,
            arguments.vae_tiling,
            arguments.compile,
            arguments.t5,
        )
        codec = Codec.from_pretrained(arguments.model, arguments.device, options)
        for rate in codec.config.rates:
            codec.model_id(rate.name)
    return codec


def add_captioner(parser: argparse.ArgumentParser) -> None:
    """Add ``--caption``, ``--captioner`` and ``--captioner-model``."""
    parser.add_argument(
        "--caption",
        default="",
        help="caption that guides the decoder; stored in the file (default: none)",
    )
    parser.add_argument(
        "--captioner",
        choices=CAPTIONERS,
        help="source of the caption (default: text with --caption, else none)",
    )
    parser.add_argument(
        "--captioner-model",
        metavar="MODEL",
        help="hub id or folder of the captioner's weights (default: the published ones)",
    )


def chosen_captioner(arguments: argparse.Namespace) -> Captioner:
    """Return the chosen captioner on ``--device``; its network loads at the first call."""
    from percov2.captioners import open_captioner

    name = _captioner(arguments)
    with about(f"captioner {name}"):
        return open_captioner(name, arguments.caption, arguments.captioner_model, arguments.device)


def _captioner(arguments: argparse.Namespace) -> str:
    return arguments.captioner or ("text" if arguments.caption else "none")
