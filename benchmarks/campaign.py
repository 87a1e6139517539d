"""Train the embedded model on a GPU for a fixed time: python benchmarks/campaign.py

`run` builds the compiled module, runs the tests marked cuda and decodes the photos. Then it trains
from the given weights until the time is over, and writes files of at most 16 MB for `join`:

    python benchmarks/campaign.py run --shards SHARDS --start RUN --out OUT --minutes 9

`join` makes a run folder from them, for `percov2 train export` and `--start-from`:

    python benchmarks/campaign.py join OUT --start RUN --run JOINED

`--start` is the folder of a run of `percov2 train codec` or a model folder, the same for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "python/percov2/training/configs/tiny.toml"
PIECE = 15_000_000
"""Largest number of tensor bytes in a file."""


def build(log: dict[str, Any]) -> None:
    """Build the compiled module in place unless it can be imported."""
    started = time.monotonic()
    sys.path.insert(0, str(ROOT / "python"))
    link = ROOT / "python/percov2/triton_kernels"
    if not link.exists():
        link.symlink_to("../../triton_kernels")
    if subprocess.run([sys.executable, "-c", "import percov2.entropy"], env=_paths()).returncode:
        import pybind11

        folder = ROOT / "build/campaign"
        options = [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True)
        subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
        subprocess.run(["cmake", "--install", folder, "--prefix", ROOT / "python"], check=True)
    log["build_s"] = time.monotonic() - started


def _paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"}


def check(log: dict[str, Any], seconds: float) -> None:
    """Run the tests marked cuda until the time is over, and log their last lines."""
    if seconds <= 0:
        return
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", str(ROOT / "tests")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=_paths(), cwd=ROOT
        )
        lines = done.stdout.splitlines()[-15:]
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        lines = [*output.decode().splitlines()[-5:], f"stopped after {seconds:g} s"]
    log["tests"], log["tests_s"] = lines, time.monotonic() - started


def decode(log: dict[str, Any], shards: Path, cache: Path) -> None:
    """Decode the shards in parallel threads into one cache."""
    from percov2.photos import decode_shards, join_caches

    started = time.monotonic()
    if not (cache / "photos.json").is_file():
        parts = {path: cache / "parts" / path.stem for path in sorted(shards.glob("*.tar"))}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: decode_shards([item[0]], item[1]), parts.items()))
        join_caches(list(parts.values()), cache)
        shutil.rmtree(cache / "parts")
    log["photos_s"] = time.monotonic() - started


def run(arguments: argparse.Namespace) -> None:
    """Build, check, decode and train; write the seconds of each part to OUT/campaign.json."""
    began = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    log: dict[str, Any] = {"recipe": arguments.recipe, "minutes": arguments.minutes}
    build(log)
    check(log, arguments.tests)
    work: Path = arguments.work
    decode(log, arguments.shards, work / "photos")

    from percov2.photos import PhotoCrops
    from percov2.training import warm_start
    from percov2.training.commands import codec_stage
    from percov2.training.loop import train

    photos = PhotoCrops(work / "photos")
    stage, loop = codec_stage(arguments.config, photos, arguments.recipe)
    log["origins"] = warm_start.start_from(stage, arguments.start)
    left = arguments.minutes - (time.monotonic() - began) / 60 - arguments.reserve
    if left <= 0:
        raise SystemExit(f"no time is left to train: {log}")
    if not torch.cuda.is_available():
        loop = dataclasses.replace(loop, record=False, precision="no")
    loop = dataclasses.replace(loop, minutes=left)
    log["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    log["torch"] = torch.__version__
    log["steps"] = train(stage, loop, work / "run")
    log["train_s"] = time.monotonic() - began
    pack(work / "run" / "checkpoint.pt", arguments.start, stage, out)
    for name in ("log.csv", "samples.png"):
        shutil.copy(work / "run" / name, out / name)
    (out / "campaign.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log, indent=2))


def pack(checkpoint: Path, start: Path, stage: torch.nn.Module, out: Path) -> None:
    """Write the changed weights as float16, in files of about ``PIECE`` bytes at most."""
    from percov2.training import warm_start

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    before, _, _ = warm_start.stored_state(start)
    changed: dict[str, Tensor] = {}
    for name, value in state["ema"].items():
        if name not in before or not torch.equal(before[name], value):
            changed[name] = value.half() if value.is_floating_point() else value
    for name, adversary in state["side"].items():
        for key, value in adversary["network"].items():
            changed[f"side:{name}:{key}"] = value.half() if value.is_floating_point() else value
    piece: dict[str, Tensor] = {}
    size = index = 0
    for name, value in [*changed.items(), ("step", torch.tensor(state["step"]))]:
        count = value.numel() * value.element_size()
        if piece and size + count > PIECE:
            save_file(piece, out / f"weights-{index}.safetensors")
            piece, size, index = {}, 0, index + 1
        piece[name] = value.contiguous()
        size += count
    save_file(piece, out / f"weights-{index}.safetensors")


def join(arguments: argparse.Namespace) -> None:
    """Make a run folder from the pieces and the starting weights."""
    from percov2.training import warm_start

    ema, side, _ = warm_start.stored_state(arguments.start)
    pieces = sorted(arguments.out.glob("weights-*.safetensors"))
    if not pieces:
        raise SystemExit(f"{arguments.out} holds no weights-*.safetensors; give the --out of `run`")
    found = {name: value for piece in pieces for name, value in load_file(piece).items()}
    step = int(found.pop("step"))
    for name, value in found.items():
        value = value.float() if value.is_floating_point() else value
        if name.startswith("side:"):
            _, adversary, key = name.split(":")
            side.setdefault(adversary, {}).setdefault("network", {})[key] = value
        else:
            ema[name] = value
    arguments.run.mkdir(parents=True, exist_ok=True)
    torch.save({"ema": ema, "side": side, "step": step}, arguments.run / "checkpoint.pt")
    print(f"{arguments.run}: {len(found)} tensors of {len(pieces)} pieces, {step} steps")


def main(argv: list[str] | None = None) -> None:
    """Read the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, work: Callable[[argparse.Namespace], None], help_: str) -> Any:
        one = commands.add_parser(name, help=help_, description=help_)
        one.set_defaults(command=work)
        start = "folder of the starting weights: a run or a model"
        one.add_argument("--start", type=Path, required=True, help=start)
        return one

    one = command("run", run, "build, check, decode and train for a fixed time")
    one.add_argument("--shards", type=Path, required=True, help="folder of .tar shards")
    one.add_argument("--out", type=Path, required=True, help="folder of the files to keep")
    one.add_argument(
        "--work",
        type=Path,
        default=Path("runs/campaign"),
        help="folder of all other files (default: runs/campaign)",
    )
    one.add_argument("--minutes", type=float, required=True, help="total time in minutes")
    one.add_argument(
        "--reserve", type=float, default=0.5, help="part for writing, in minutes (default: 0.5)"
    )
    one.add_argument("--tests", type=float, default=60, help="seconds for tests (default: 60)")
    help_ = "configuration file (default: tiny.toml)"
    one.add_argument("--config", type=Path, default=CONFIG, help=help_)
    help_ = "recipes of the configuration (default: painting,gpu)"
    one.add_argument("--recipe", default="painting,gpu", help=help_)
    one = command("join", join, "make a run folder from the files of `run`")
    one.add_argument("out", type=Path, help="--out of `run`")
    one.add_argument("--run", type=Path, required=True, help="run folder to write")
    arguments = parser.parse_args(argv)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
