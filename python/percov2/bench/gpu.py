"""``percov2 bench gpu``: measures the GPU engine on a card, and predicts it where there is none.

Every record says its ``kind``: "prediction" (compiled, counted and derived), "measurement" (taken
on the card after its results were compared) or "missing" (what this machine lacks, and how to get
it).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from tqdm import tqdm

from percov2.bench import gpu_summary
from percov2.bench.environment import environment
from percov2.bench.gpu_kernels import rows
from percov2.bench.gpu_plan import GpuPlan
from percov2.bench.gpu_predict import PREDICTION, predict
from percov2.entropy import rans

SCHEMA = 1


def run(plan: GpuPlan) -> dict[str, Any]:
    """The report, as it is written to JSON."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": PREDICTION,
        "environment": {**environment(), **gpu_environment()},
        "records": [],
    }
    steps = [(card, row) for card in plan.cards for row in rows(plan.sizes)]
    for card, row in tqdm(steps, unit="kernel", leave=False):
        report["records"].append(predict(row, card))
    counted = [gpu_summary.launches(size, PREDICTION) for size in plan.sizes]
    report["records"] += counted
    report["summary"] = gpu_summary.summarize(plan.sizes, counted)
    return report


def gpu_environment() -> dict[str, Any]:
    """Versions and devices that matter on a GPU."""
    triton = importlib.util.find_spec("triton") is not None
    cuda_built = rans.cuda_built()
    return {
        "triton": importlib.metadata.version("triton") if triton else None,
        "cuda_kernels": cuda_built,
        "torch_cuda": torch.version.cuda,
        "devices": list(rans.cuda_devices()) if cuda_built else [],
    }
