"""Options that several commands share, and parsers of numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from percov2 import bitstream


def number(kind: type[int] | type[float], low: int, high: int) -> Callable[[str], float]:
    """A parser of one number from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low - 1)
        if not low <= value <= high:  # also false for nan
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, not {text}")
        return value

    return parse


def add_rate(parser: argparse.ArgumentParser) -> None:
    """Add ``--rate`` and ``--schedule``."""
    parser.add_argument("--rate", help="rate of the model, e.g. r031")
    parser.add_argument("--schedule", help="entropy schedule, e.g. qlds12")


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Add what decides on the bytes: rate, schedule, effort, slack, and how much is held."""
    add_rate(parser)
    parser.add_argument(
        "--effort",
        type=number(int, 0, 1000),
        default=0,
        help="rounds of a search for better tokens, e.g. 16; each takes as long as decoding the "
        "picture three times (default: 0)",
    )
    parser.add_argument(
        "--slack",
        type=number(float, 0, 2),
        default=0.0,
        help="take the likeliest of the 16 nearest codes whose cosine similarity is at most this "
        "below the nearest one's (default: 0)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--stages",
        type=number(int, 1, bitstream.MAX_STAGES_SENT),
        help="hold so many stages of tokens; the decoder draws the others (default: all)",
    )
    part.add_argument(
        "--target-bytes",
        type=number(int, 1, 1 << 26),
        help="hold as many stages as so many bytes have room for; a picture with more tokens "
        "than a file may hold in part takes a coarser rate",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add ``--realism``, ``--steps``, ``--guidance`` and ``--seed``."""
    parser.add_argument(
        "--realism",
        type=number(float, 0, 1),
        help="0 paints a faithful picture, 1 a realistic one (default: the rate's)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1, 1000),
        help="flow evaluations: few fit, more look real (default: the rate's)",
    )
    parser.add_argument(
        "--guidance", type=number(float, 0, 100), help="weight of the caption; 1 turns it off"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of the starting noise (default: 0)",
    )
