"""``percov2 --version``: which percov2 is installed, and what its compiled module can use."""

from __future__ import annotations

import argparse
from typing import NoReturn


class VersionAction(argparse.Action):
    """Prints it and exits; only then is the compiled module loaded."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from percov2 import __version__
        from percov2.entropy import rans

        print(f"percov2 {__version__}")
        print(f"compiled kernels: {rans.instruction_set()}; CUDA: {rans.cuda_state()}")
        parser.exit()
