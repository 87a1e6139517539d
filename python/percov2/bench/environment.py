"""What figures depend on: versions, processor, threads, load."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from percov2 import __version__
from percov2.entropy import rans


def environment() -> dict[str, Any]:
    """Versions and machine as JSON values; ``load`` is the mean of the last minute."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "percov2": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "instruction_set": rans.instruction_set(),
        "instruction_sets": list(rans.instruction_sets()),
        "cuda_kernels": rans.cuda_state(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's name, as Linux gives it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
