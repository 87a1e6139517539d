"""``percov2 train PHASE``: the phases and their options."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from percov2.cli.faults import about
from percov2.cli.options import add_command, number

__all__ = ["OPTIONS", "PHASES", "add_parser", "home", "train"]

_RECIPE = "recipes [{0}.recipes.NAME] whose settings replace those of [{0}] (default: none)"
_HELP = {
    "config": "TOML file with a section per phase (required)",
    "recipe": _RECIPE.format("codec"),
    "data": "folder made by `train data` (required)",
    "out": "run folder to write (required)",
    "minutes": "stop after this time in minutes; the same command resumes (default: no limit)",
    "autoencoder_run": "folder made by `train autoencoder`, used for the initial weights; "
    "required unless --start-from is given (default: none)",
    "start_from": "start from a folder made by `train codec` (averaged weights) or a model "
    "folder (default: start from --autoencoder-run)",
    "codec_run": "folder made by `train codec` (required)",
    "texts": ".txt files with one caption per line, or .tar shards of such files (required)",
    "model": "model folder that makes the tokens (required)",
    "rate": "rate of the model, e.g. r031 (default: the model's)",
    "views": "number of token maps per photo; all but the first are mirrored and shifted "
    "(default: 1)",
    "precision": "mixed precision; bf16 halves the time, but a few tokens near a tie may differ "
    "from the codec's (default: no)",
    "pictures": "folder of validation photos to restore at checkpoints (default: none)",
    "longest": "largest shorter side of a photo in pixels; larger photos are scaled down "
    "(default: 768)",
    "entropy": "`entropy` folders made by `train entropy`; a FOLDER alone is for the first rate "
    "(default: none)",
}
_REQUIRED = ("config", "data", "out", "codec_run", "texts", "model")
# A model may be a name, and a path would lose the "./" that tells a folder from a name.
_PATHS = (*_REQUIRED[:-1], "autoencoder_run", "start_from", "pictures")
_FORMS: dict[str, dict[str, Any]] = {
    "recipe": {"metavar": "NAME[,NAME]"},
    "minutes": {"type": number(float, 0.001, 1e9)},
    "texts": {"nargs": "+"},
    "views": {"type": int, "default": 1},
    "precision": {"choices": ["no", "bf16"], "default": "no"},
    "longest": {"type": int, "default": 768},
    "entropy": {"nargs": "+", "metavar": "RATE=FOLDER"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"help": help_, "type": Path if name in _PATHS else str, "required": name in _REQUIRED}
    | _FORMS.get(name, {})
    for name, help_ in _HELP.items()
}
"""Arguments of ``add_argument`` by option."""
PHASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("Decode photo shards into a memory-mapped cache.", ("data", "out")),
    "autoencoder": ("Train the autoencoder.", ("config", "data", "out", "minutes")),
    "codec": (
        "Train the hyper-encoders, quantizers, flow and decoder together.",
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
    "captions": ("Train the model that codes captions.", ("config", "texts", "out", "minutes")),
    "sd3": (
        "Train stage 1 on Stable Diffusion 3 (works with accelerate launch).",
        ("config", "recipe", "data", "out", "pictures", "minutes"),
    ),
    "sd3-export": (
        "Add the rate trained by `train sd3` to a model folder.",
        ("config", "recipe", "codec_run", "out", "entropy"),
    ),
    "shard-tokens": (
        "Make token maps of photo shards for `train entropy` (works with accelerate launch).",
        ("model", "data", "out", "rate", "longest"),
    ),
    "export": (
        "Assemble a model folder.",
        ("config", "recipe", "data", "codec_run", "out", "entropy"),
    ),
}
"""Help text and options of each phase."""
_SHARDS = "folder of photo shards, .tar files (required)"
_OWN_HELP = {
    "data --data": "folder of photo shards, .tar files, also compressed (required)",
    "data --out": "folder to write the decoded photos to (required)",
    "tokens --out": ".npz file to write (required)",
    "entropy --data": "token maps: .npz file of `train tokens`, or folder of such files (required)",
    "entropy --rate": "rate of the configuration, [entropy.rates.NAME] (default: [entropy] alone)",
    "sd3 --data": _SHARDS,
    "sd3 --recipe": _RECIPE.format("sd3"),
    "sd3-export --recipe": _RECIPE.format("sd3"),
    "sd3-export --codec-run": "folder made by `train sd3` (required)",
    "sd3-export --out": "model folder to write or to extend (required)",
    "sd3-export --entropy": "`entropy` folder made by `train entropy` (default: uniform coding)",
    "shard-tokens --model": "model that makes the tokens: folder or name (required)",
    "shard-tokens --data": _SHARDS,
    "shard-tokens --out": "folder to write, one .npz file per shard (required)",
    "export --out": "model folder to write or to extend (required)",
}
"""Help of an option in one phase, where that of OPTIONS is not exact."""
_READ = ("config", "autoencoder_run", "start_from", "codec_run", "pictures")
"""Options that name one file or folder to read."""
_ON_SD3 = ("sd3", "sd3-export", "shard-tokens")


def add_parser(commands: Any) -> None:
    """Add ``train`` to the commands."""
    parser = commands.add_parser("train", help="Train a model, phase by phase.")
    added = parser.add_subparsers(dest="phase", required=True, metavar="PHASE")
    for phase, (text, options) in PHASES.items():
        one = add_command(added, phase, train, text, ("train", "torch", "accelerate"))
        for option in options:
            name = "--" + option.replace("_", "-")
            help_ = _OWN_HELP.get(f"{phase} {name}", OPTIONS[option]["help"])
            one.add_argument(name, **{**OPTIONS[option], "help": help_})


def train(arguments: argparse.Namespace) -> None:
    """Run ``percov2 train PHASE``."""
    with about(f"train {arguments.phase}"):
        for option in _READ:
            path = getattr(arguments, option, None)
            if path is not None:
                path.stat()
    from percov2.training import loop

    _, options = PHASES[arguments.phase]
    module, name = home(arguments.phase)
    with about(f"train {arguments.phase}"):
        run = getattr(importlib.import_module(module), name)
        run(**{option: getattr(arguments, option) for option in options})
    loop.leave_processes()


def home(phase: str) -> tuple[str, str]:
    """Return the module and the name of the function that runs a phase."""
    package = "percov2.training.sd3" if phase in _ON_SD3 else "percov2.training"
    return f"{package}.commands", f"run_{phase.replace('-', '_')}"
