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

from percov2.bench import gpu_measure, gpu_summary
from percov2.bench.environment import environment
from percov2.bench.gpu_device import Gpu
from percov2.bench.gpu_kernels import rows
from percov2.bench.gpu_plan import GpuPlan
from percov2.bench.gpu_predict import PREDICTION, predict
from percov2.entropy import rans

SCHEMA = 1
Predictions = dict[tuple[str, str], dict[str, Any]]
"""(kernel, case) -> record of gpu_predict."""


def find() -> Gpu | None:
    """The current CUDA device, if torch finds one."""
    return Gpu() if torch.cuda.is_available() else None


def run(plan: GpuPlan, gpu: Gpu | None = None) -> dict[str, Any]:
    """The report, as it is written to JSON: measured on ``gpu``, else predicted for the plan.

    The CPU engine takes as many threads as torch. Raises Mismatch (a RuntimeError) if the device
    returns anything but what the CPU returns.
    """
    cards = plan.cards if gpu is None else (gpu.card(),)
    records: list[dict[str, Any]] = []
    predicted = [(card, row) for card in cards for row in rows(plan.sizes)]
    for card, row in tqdm(predicted, unit="kernel", leave=False):
        records.append(predict(row, card))
    records += gpu_summary.whole(plan.sizes[0], records)
    records += [gpu_summary.launches(size) for size in plan.sizes]
    lacking = gpu_measure.lacking()
    if gpu is not None and lacking is not None:
        records.append(lacking)
    elif gpu is not None:
        known = {(r["kernel"], r["case"]): r for r in records if r["section"] == "kernels"}
        records += measured(gpu, plan, known)
    return {
        "schema": SCHEMA,
        "kind": PREDICTION if gpu is None else gpu_measure.MEASUREMENT,
        "environment": {**environment(), **gpu_environment()},
        "records": records,
        "summary": gpu_summary.summarize(plan.sizes, records),
    }


def measured(gpu: Gpu, plan: GpuPlan, predictions: Predictions) -> list[dict[str, Any]]:
    """The records of a device. Errors as for ``run``."""
    card = gpu.card()
    first = gpu_measure.bandwidth(gpu, card, plan.effort)
    bench = gpu_measure.Bench(
        gpu,
        card,
        plan.effort,
        plan.cpu_effort,
        torch.get_num_threads(),
        first["peak_bytes_per_s"],
        predictions,
    )
    records = [first]
    steps = list(gpu_measure.steps(bench, plan))
    with tqdm(total=len(steps), unit="step", leave=False) as bar:
        for name, work in steps:
            bar.set_description(name)
            records += work()
            bar.update()
    return records


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
