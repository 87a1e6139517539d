"""``percov2 --version``: the installed version, its compiled kernels and its CUDA state."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["VersionAction"]


class VersionAction(argparse.Action):
    """Flag that prints the version and exits.

    The compiled module is imported when the flag is used, not when the parser is built.
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from percov2 import __version__
        from percov2.entropy import rans

        print(f"percov2 {__version__}")
        print(f"compiled kernels: {rans.instruction_set()}; CUDA: {rans.cuda_state()}")
        parser.exit()
