"""The phases of `percov2 train`: their options and their help, as data for the command line.

Phase NAME calls ``percov2.training.commands.run_NAME`` with its options as keyword arguments. This
module imports nothing but the standard library, so that every command line starts fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"type": Path, "required": True, "help": "TOML file with a section per phase"},
    "data": {"type": Path, "required": True, "help": "photos (entropy: token maps)"},
    "out": {"type": Path, "required": True, "help": "what the phase writes"},
    "minutes": {"type": float, "help": "stop after this time; the same command goes on"},
    "autoencoder_run": {"type": Path, "help": "start from this out of `train autoencoder`"},
    "start_from": {
        "type": Path,
        "help": "start from the averaged weights of this out of `train codec` instead; rates that "
        "it does not have start from its first",
    },
    "codec_run": {"type": Path, "required": True, "help": "out of `train codec`"},
    "model": {"type": Path, "required": True, "help": "model folder"},
    "rate": {"help": "rate of the model (default: its default)"},
    "precision": {
        "choices": ["no", "bf16"],
        "default": "no",
        "help": "bf16 halves the time; a few tokens near a tie may differ from the codec's",
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
        ("config", "data", "autoencoder_run", "start_from", "out", "minutes"),
    ),
    "tokens": (
        "Make the token maps for `train entropy`.",
        ("model", "data", "out", "rate", "precision"),
    ),
    "entropy": (
        "Train the entropy model on token maps and export its integer form.",
        ("config", "data", "out", "minutes"),
    ),
    "export": ("Assemble a model folder.", ("config", "data", "codec_run", "out", "entropy")),
}
"""Phase -> its help and its options."""
