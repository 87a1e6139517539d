"""Measurements in a fresh process: the first call with its imports, and the peak memory.

``python -m percov2.bench.fresh cold FOLDER`` and ``... encode|decode FOLDER IMAGES SIDE`` print one
JSON object. FOLDER holds an integer entropy model. The functions ``cold`` and ``memory`` start
these commands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["STATUS", "cold", "memory"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SCHEDULE = "qlds12"


def _start(*arguments: object) -> dict[str, Any]:
    """Run this module in a fresh process. Return the JSON object it prints, with its wall time."""
    command = [sys.executable, "-m", __name__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"a fresh process failed: {lines[-1]}")
    return {**json.loads(done.stdout), "process_s": wall}


def cold(folder: Path) -> dict[str, Any]:
    """Measure the steps of a first use in a new process."""
    return {"section": "cold", **_start("cold", folder)}


def memory(what: str, folder: Path, images: int, side: int) -> dict[str, Any]:
    """Measure the peak memory of a new process that runs "encode" or "decode" on a batch."""
    sizes = {"images": images, "grid": side}
    return {"section": "memory", "what": what, **sizes, **_start(what, folder, images, side)}


def _cold(folder: Path) -> dict[str, float]:
    # So far, only the standard library is imported.
    marks: dict[str, float] = {}

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        marks[f"{name}_s"] = time.perf_counter() - started

    with mark("import"):
        import torch

        from percov2.bench import cases, coders
    torch.set_num_threads(1)
    case = cases.make_case(cases.Shape(256, 256, 1))
    logits = cases.integer_logits(case.logits)
    for turn in ("first", "second"):
        with mark(f"{turn}_encode"):
            streams = coders.encode(case, logits, case.prob_bits)
        with mark(f"{turn}_decode"):
            coders.rans.RansDecoder(*streams).decode(logits, case.prob_bits)
    from percov2.bench import model
    from percov2.entropy import IntTransformer, TokenCoder

    with mark("load_model"):
        coder = TokenCoder(IntTransformer.load(folder))
    with mark("first_model_decode"):
        tokens = model.draw_tokens(coder, 1, 16)
    with mark("first_model_encode"):
        streams = model.encode(coder, tokens, SCHEDULE, 1)
    with mark("second_model_decode"):
        model.decode(coder, streams, SCHEDULE, 16, 1)
    with mark("second_model_encode"):
        model.encode(coder, tokens, SCHEDULE, 1)
    return marks


def _memory(what: str, folder: Path, images: int, side: int) -> dict[str, float | None]:
    import numpy as np
    import torch

    from percov2.bench import model
    from percov2.entropy import IntTransformer, TokenCoder

    torch.set_num_threads(1)
    coder = TokenCoder(IntTransformer.load(folder))
    # The first call allocates what later calls reuse, so it runs before the peak is reset.
    tokens = model.draw_tokens(coder, 1, side)
    model.encode(coder, tokens, SCHEDULE, 1)
    if not STATUS.exists():
        return {"peak_mb": None, "extra_mb": None}
    before = _megabytes("VmRSS")
    CLEAR.write_text("5", encoding="ascii")  # resets the peak
    if what == "encode":
        model.encode(coder, np.repeat(tokens, images, 0), SCHEDULE, 1)
    else:
        model.decode(coder, model.random_streams(images, side), SCHEDULE, side, 1)
    peak = _megabytes("VmHWM")
    return {"peak_mb": peak, "extra_mb": peak - before}


def _megabytes(name: str) -> float:
    """Return a size in MB from the status of this process on Linux."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    what, home, *sizes = sys.argv[1:]
    folder = Path(home)
    answer = _memory(what, folder, *map(int, sizes)) if sizes else _cold(folder)
    print(json.dumps(answer))
