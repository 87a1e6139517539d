"""Flags that choose a model and a captioner."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import about
from percov2.cli.options import DEFAULT_MODEL, add_flag, number
from percov2.container.captions import CAPTIONERS, check_captioner
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from percov2.codec import Codec
    from percov2.container.captions import Captioner
    from percov2.models.backbone import BackboneOptions

__all__ = [
    "add_captioner",
    "add_model",
    "backbone_options",
    "check_choices",
    "chosen_captioner",
    "chosen_flags",
    "open_codec",
]

_SWITCHES = {
    "offload": "keep a network on the device only while it runs (default: keep all networks there)",
    "vae-tiling": "run the autoencoder in tiles to save memory (default: in one piece)",
    "compile": "compile the flow network, which slows the first picture (default: do not)",
    "no-t5": "run sd3 without its largest text encoder (default: use it)",
}
"""Flags of large models that take no value."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--device`` and the flags of large backbones."""
    help_ = "embedded model, model folder, sd3:FOLDER or perco:FOLDER"
    add_flag(parser, "--model", help_, default=DEFAULT_MODEL)
    add_flag(parser, "--device", "device of the networks: cpu, cuda or cuda:N", default="cpu")
    help_ = "runtime of the networks (default: onnx for small models on the CPU, else torch)"
    parser.add_argument("--runtime", choices=["onnx", "torch"], help=help_)
    help_ = "threads of runtime onnx, 1 to 1024; never changes tokens (default: all cores)"
    parser.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help=help_)
    help_ = (
        "number format of painting: fp32 or int8 with runtime onnx (default: int8 where it is "
        "fast); fp32, bf16 or fp16 with torch (default: bf16 for large models on cuda, else fp32)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "int8"], help=help_)
    group = parser.add_argument_group("options of large models (sd3, perco)")
    for name, help_ in _SWITCHES.items():
        group.add_argument("--" + name, action="store_true", help=help_)


def check_choices(
    arguments: argparse.Namespace,
    encode: EncodeOptions | None = None,
    decode: DecodeOptions | None = None,
) -> None:
    """Raise a Fault for wrong choices, before torch or a network is loaded.

    The arguments have the flags of ``add_model``; those of ``add_captioner`` are optional. The rate
    and schedule of ``encode`` must exist, and the realism of ``decode`` must fit the model.
    """
    from percov2.entropy import schedule
    from percov2.models.backbone import check_runtime
    from percov2.models.config import find_model

    if hasattr(arguments, "captioner"):
        name = _captioner(arguments)
        with about(f"captioner {name}"):
            check_captioner(name, arguments.caption, arguments.captioner_model)
    with about(f"model {arguments.model}"):
        folder, config = find_model(arguments.model)
        given = _large_flags(arguments)
        if config.backbone == "tiny" and given:
            raise ValueError(f"this small model does not accept {', '.join(given)}")
        check_runtime(folder, config.backbone, arguments.device, backbone_options(arguments))
        rate = config.default_rate
        if encode is not None:
            rate = config.rate(rate if encode.rate is None else encode.rate).name
            chosen = config.default_schedule if encode.schedule is None else encode.schedule
            schedule.check_name(chosen)
        if decode is not None:
            config.chosen_realism(rate, decode.realism)


def _large_flags(arguments: argparse.Namespace) -> list[str]:
    return [f"--{flag}" for flag in _SWITCHES if getattr(arguments, flag.replace("-", "_"))]


def chosen_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of ``add_model`` that differ from their defaults."""
    defaults: dict[str, Any] = {"model": DEFAULT_MODEL, "device": "cpu"}
    defaults |= {"runtime": None, "threads": None, "dtype": None}
    given = [f"--{name}" for name, value in defaults.items() if getattr(arguments, name) != value]
    return given + _large_flags(arguments)


def backbone_options(arguments: argparse.Namespace) -> BackboneOptions:
    """Return the options of the flags of ``add_model``."""
    from percov2.models.backbone import BackboneOptions

    names = ("runtime", "threads", "dtype", "offload", "vae_tiling", "compile")
    given = {name: getattr(arguments, name) for name in names}
    return BackboneOptions(**given, t5=not arguments.no_t5)


def open_codec(arguments: argparse.Namespace, runtime: str | None = None) -> Codec:
    """Return the codec of the chosen model, with the entropy models of all rates loaded.

    ``runtime`` is the default of ``--runtime``.
    """
    from percov2.codec import Codec

    with about(f"model {arguments.model}"):
        options = backbone_options(arguments)
        if options.runtime is None and options.threads is None:
            options = dataclasses.replace(options, runtime=runtime)
        codec = Codec.from_pretrained(arguments.model, arguments.device, options)
        for rate in codec.config.rates:
            codec.model_id(rate.name)
    return codec


def add_captioner(parser: argparse.ArgumentParser) -> None:
    """Add ``--caption``, ``--captioner`` and ``--captioner-model``."""
    help_ = "caption that guides the decoder; stored in the file (default: none)"
    parser.add_argument("--caption", default="", help=help_)
    help_ = "source of the caption (default: text with --caption, else none)"
    parser.add_argument("--captioner", choices=CAPTIONERS, help=help_)
    help_ = "hub id or folder of the captioner's weights (default: the published ones)"
    parser.add_argument("--captioner-model", metavar="MODEL", help=help_)


def chosen_captioner(arguments: argparse.Namespace) -> Captioner:
    """Return the chosen captioner on ``--device``; its network loads at the first call."""
    from percov2.captioners import open_captioner

    name = _captioner(arguments)
    with about(f"captioner {name}"):
        return open_captioner(name, arguments.caption, arguments.captioner_model, arguments.device)


def _captioner(arguments: argparse.Namespace) -> str:
    return arguments.captioner or ("text" if arguments.caption else "none")
