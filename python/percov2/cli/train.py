"""``percov2 train PHASE``: the phases, their options and their help."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from percov2.cli.faults import about

OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"type": Path, "required": True, "help": "TOML file with a section per phase"},
    "recipe": {
        "metavar": "NAME[,NAME]",
        "help": "settings of [codec.recipes.NAME] (or [sd3.recipes.NAME]) replace those of [codec]",
    },
    "data": {"type": Path, "required": True, "help": "photos, shards or token maps"},
    "out": {"type": Path, "required": True, "help": "what the phase writes"},
    "minutes": {"type": float, "help": "stop after this time; the same command goes on"},
    "autoencoder_run": {"type": Path, "help": "start from this out of `train autoencoder`"},
    "start_from": {
        "type": Path,
        "help": "start from the averaged weights of this out of `train codec`, or from this model "
        "folder, instead; rates that it does not have start from its first",
    },
    "codec_run": {"type": Path, "required": True, "help": "out of `train codec` (or sd3)"},
    "texts": {
        "type": Path,
        "nargs": "+",
        "required": True,
        "help": ".txt files with a caption a line, or shards with such members",
    },
    "model": {"type": Path, "required": True, "help": "model folder"},
    "rate": {
        "help": "rate of the model (default: its default), or of the configuration (default: none, "
        "the common settings)"
    },
    "views": {
        "type": int,
        "default": 1,
        "help": "maps per photo: mirrored and shifted ones after the first (default: 1)",
    },
    "precision": {
        "choices": ["no", "bf16"],
        "default": "no",
        "help": "bf16 halves the time; a few tokens near a tie may differ from the codec's",
    },
    "pictures": {"type": Path, "help": "folder of validation pictures, restored at checkpoints"},
    "longest": {
        "type": int,
        "default": 768,
        "help": "scale photos down to this shorter side (default: 768)",
    },
    "entropy": {
        "nargs": "+",
        "metavar": "RATE=FOLDER",
        "help": "folders `entropy` in the outs of `train entropy`; FOLDER alone: the first rate",
    },
}
PHASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("Decode photo shards into a memory-mapped cache.", ("data", "out")),
    "autoencoder": ("Train the autoencoder.", ("config", "data", "out", "minutes")),
    "codec": (
        "Train hyper-encoders, quantizers, flow and decoder together.",
        ("config", "recipe", "data", "autoencoder_run", "start_from", "out", "minutes"),
    ),
    "tokens": (
        "Make the token maps for `train entropy`.",
        ("model", "data", "out", "rate", "precision", "views"),
    ),
    "entropy": (
        "Train the entropy model on token maps and export its integer form.",
        ("config", "data", "out", "rate", "minutes"),
    ),
    "captions": (
        "Train the model that codes captions.",
        ("config", "texts", "out", "minutes"),
    ),
    "sd3": (
        "Stage 1 on Stable Diffusion 3; may be run by accelerate launch.",
        ("config", "recipe", "data", "out", "pictures", "minutes"),
    ),
    "sd3-export": (
        "Add the rate of a stage-1 run on Stable Diffusion 3 to a model folder.",
        ("config", "recipe", "codec_run", "out", "entropy"),
    ),
    "shard-tokens": (
        "Make token maps of shards, for `train entropy`; may be run by accelerate launch.",
        ("model", "data", "out", "rate", "longest"),
    ),
    "export": (
        "Assemble a model folder.",
        ("config", "recipe", "data", "codec_run", "out", "entropy"),
    ),
}
"""Phase -> its help and its options."""
_ON_SD3 = ("sd3", "sd3-export", "shard-tokens")


def add_parser(commands: Any) -> None:
    """Add ``train`` to the commands."""
    parser = commands.add_parser("train", help="Train a model, phase by phase.")
    added = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for phase, (text, options) in PHASES.items():
        one = added.add_parser(phase, help=text, description=text)
        one.set_defaults(run=train)
        for option in options:
            one.add_argument("--" + option.replace("_", "-"), **OPTIONS[option])


def train(arguments: argparse.Namespace) -> None:
    """``percov2 train PHASE``."""
    from percov2.training import loop

    _, options = PHASES[arguments.phase]
    module, name = home(arguments.phase)
    with about(f"train {arguments.phase}"):
        run = getattr(importlib.import_module(module), name)
        run(**{option: getattr(arguments, option) for option in options})
    loop.leave_processes()


def home(phase: str) -> tuple[str, str]:
    """Return module and name of the function that runs a phase."""
    package = "percov2.training.sd3" if phase in _ON_SD3 else "percov2.training"
    return f"{package}.commands", f"run_{phase.replace('-', '_')}"
