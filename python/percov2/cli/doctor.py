"""``percov2 doctor``: what is installed, what is missing, and whether it works."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import printable
from percov2.cli.options import add_command

if TYPE_CHECKING:
    from percov2.codec import Codec

__all__ = ["CHECKS", "add_parser", "doctor"]

_DEVELOPMENT = ("docs", "test", "dev")
"""Extras for contributors, of which nothing is said."""
_GOLDEN = {
    "r031": (
        "fc2154e2090e24907bf3e778a74d13ff62ba52785b44482ee71d398a9913f4a44683f3ad91154acafc3d68237f"
        "fc7556bdcb110fb659a5359219",
        "7bff819c3503f7e52cea9890fdb14687a81b28c0ae586796fb059a3c0fa8fe5e",
    ),
    "r010": (
        "fc21b8d907b596228237ef04b0fbb77960390d5757f5f36f9f850ae02b9da39df6246796cf57df258348bf6821"
        "9dc3a681e6c3f836d79120032a2a6fdb67fdea77a4c69a67413a8003faec7ef974f69bc79a39c66cbc6fda452a"
        "354d4f0a997734403458dfb14eddc1c441f8d8cb9a49f905",
        "45ec2ec1faf45cc33af3d212e425a419b197cac9109a043c2c833a65326fd1eb",
    ),
    "r002": (
        "fc2103e915ba5cf1a4f9aba9926e1b5116218b6f6110a93ade72ea7b4584bc98bd9f0dd13e6ca39735d762f8de"
        "17268f1fb12d6846157b4401e3d3eb",
        "dc59b57edac43d85c5fe51f4a5ae1a53415d1a23b123d5ec703c0cb3a4f665ff",
    ),
}
"""Rate -> a file of the embedded model, and the SHA-256 of its tokens as ``info --verify``."""
_LEVEL, _TOLERANCE = 128, 16
"""Level of the grey picture that is restored, and largest difference of its mean."""


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the commands."""
    help_ = "Say what is installed and what is missing, and test that it works."
    added = add_command(commands, "doctor", doctor, help_)
    help_ = "also ask torch for GPUs, which takes seconds (default: ask only the compiled coder)"
    added.add_argument("--devices", action="store_true", help=help_)


def doctor(arguments: argparse.Namespace) -> int:
    """Run ``percov2 doctor``; return 1 if a test fails."""
    for name, fact in _facts(arguments.devices):
        print(printable(f"{name:10}{fact}"))
    status = 0
    for name, check in CHECKS.items():
        try:
            check()
        except Exception as error:  # whatever is broken, the next test may work
            status = 1
            reason = " ".join(str(error).split()) or type(error).__name__
            print(printable(f"{'failed':10}{name}: {reason}"))
        else:
            print(f"{'ok':10}{name}")
    return status


# Facts -------------------------------------------------------------------------------------------


def _facts(devices: bool) -> Iterator[tuple[str, str]]:
    for name, fact in (("percov2", _versions), ("kernels", _kernels), ("networks", _networks)):
        try:
            yield name, fact()
        except Exception as error:  # the tests below fail, too, and the other facts are of use
            yield name, f"not known: {error}"
    yield "devices", f"cpu; {_torch(devices)}"
    yield from _extras()


def _versions() -> str:
    from percov2 import __version__
    from percov2.machine import processor

    where = f"{platform.system()} {platform.machine()}, {processor()}"
    return f"{__version__}, Python {platform.python_version()}, {where}"


def _kernels() -> str:
    from percov2.entropy import rans

    threads = rans.default_threads()
    return f"{rans.instruction_set()}, threads: {threads}, CUDA: {rans.cuda_state()}"


def _networks() -> str:
    from percov2.models.backbone import available_cores

    runtime = _version("onnxruntime") or "is missing: pip install onnxruntime"
    return f"onnxruntime {runtime}, threads: {available_cores()}"


def _torch(devices: bool) -> str:
    """Return the state of torch, which is imported only on request."""
    if find_spec("torch") is None:
        return "torch is not installed"
    version = f"torch {_version('torch') or 'of unknown version'}"
    if not devices:
        return f"{version} (--devices asks it for GPUs)"
    try:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # a broken installation raises errors of many types
        return f"{version}, which cannot be imported: {error}"
    return f"{version}: {', '.join(names) or 'no GPU'}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[tuple[str, str]]:
    """Yield the extras that are there on one line, and one line for each other one."""
    try:
        extras = metadata.metadata("percov2").get_all("Provides-Extra") or []
        requirements = metadata.requires("percov2") or []
    except metadata.PackageNotFoundError:
        yield "extras", "not known, because percov2 runs from its sources; install it with pip"
        return
    missing = {}
    for extra in extras:
        if extra not in _DEVELOPMENT:
            missing[extra] = sorted(_packages(extra, requirements))
            missing[extra] = [name for name in missing[extra] if _version(name) is None]
    yield "extras", ", ".join(extra for extra in missing if not missing[extra]) or "none"
    for extra, names in missing.items():
        if names:
            lacks = ", ".join(names)
            yield "missing", f"pip install 'percov2[{extra}]'  # {lacks}"


def _packages(extra: str, requirements: list[str]) -> set[str]:
    """Return the packages of an extra, and of the extras that it builds on."""
    found = set()
    for requirement in requirements:
        begin, _, condition = requirement.partition(";")
        if not re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", condition):
            continue
        (name, further) = re.findall(r"^([\w.-]+)(?:\[([\w,. -]+)\])?", begin.strip())[0]
        if name != "percov2":
            found.add(name)
        for other in filter(None, re.split(r"[, ]+", further) if name == "percov2" else []):
            found |= _packages(other, requirements)
    return found


# Tests -------------------------------------------------------------------------------------------


def _check_rans() -> None:
    """Code random symbols with every instruction set of this machine."""
    import numpy as np

    from percov2.entropy import decode, encode, rans

    random = np.random.default_rng(0)
    logits = random.integers(-2000, 2000, (3, 500, 256), np.int16)
    symbols = random.integers(0, 256, (3, 500))
    streams, before = set(), rans.instruction_set()
    try:
        for name in rans.instruction_sets():
            rans.use_instruction_set(name)
            coded = encode(logits, symbols)
            if not (decode(coded, logits) == symbols).all():
                raise ValueError(f"{name} decodes other symbols than it encoded")
            streams.add(tuple(coded))
    finally:
        rans.use_instruction_set(before)
    if len(streams) != 1:
        raise ValueError("instruction sets give different bytes")


def _check_golden() -> None:
    """Decode a file of each rate of the embedded model."""
    codec = _codec()
    for rate, (data, expected) in _GOLDEN.items():
        (tokens,) = codec.decode_tokens([bytes.fromhex(data)])
        if hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() != expected:
            raise ValueError(f"the file of rate {rate} has other tokens")


def _check_networks() -> None:
    """Compress and restore a grey picture."""
    import numpy as np

    codec = _codec()
    grey = np.full((64, 96, 3), _LEVEL, np.uint8)
    mean = float(np.asarray(codec.decompress(codec.compress(grey))).mean())
    if abs(mean - _LEVEL) > _TOLERANCE:
        raise ValueError(f"grey of level {_LEVEL} was restored with level {mean:.0f}")


def _codec() -> Codec:
    from percov2.codec import Codec
    from percov2.models.config import EMBEDDED

    return Codec.from_pretrained(os.fspath(EMBEDDED / "tiny"))


CHECKS: dict[str, Callable[[], None]] = {
    "the coder decodes what it encoded": _check_rans,
    "files of the embedded model give the known tokens": _check_golden,
    "the networks compress and restore a picture": _check_networks,
}
"""What is tested -> a function that raises an error of any type if it does not hold."""
