"""``percov2 bench gpu`` without a card, in its own process: ``measure_emulated.py MODULE``.

Triton kernels are interpreted (TRITON_INTERPRET=1), and MODULE, a path, emulates the CUDA kernels.
Tensors are on the CPU. The script prints the report; only device and clock differ from a card. A
second argument changes the CPU's result: "intervals", or "tokens" for those of a decoder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.runtime import interpreter

from percov2.bench import gpu, gpu_device
from percov2.bench.gpu_jobs import Size
from percov2.bench.report import page
from percov2.bench.timing import Effort
from percov2.entropy import rans, token_coder
from percov2.entropy.torch import cdf, rans_cuda
from percov2.entropy.transformer_config import TransformerConfig

path, *changed = sys.argv[1:]
spec = importlib.util.spec_from_file_location("emulated_cuda", path)
assert spec is not None and spec.loader is not None
emulated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulated)


class Pretended(gpu_device.Gpu):
    """The CPU as a card: its own clock, and a book of what kernels ran."""

    def find(self) -> torch.device:
        return torch.device("cpu")

    def ask(self) -> Any:
        return SimpleNamespace(name="NVIDIA H100 80GB HBM3", L2_cache_size=64)

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def wait(self) -> None:
        pass

    def trace(self, work: Callable[[], object]) -> list[str]:
        names: list[str] = []
        run, encode, decode = interpreter.GridExecutor.__call__, rans.cuda_encode, rans.cuda_decode
        to_host = rans_cuda.EncodedStreams.to_host

        def launched(self: Any, *arguments: Any, **others: Any) -> Any:
            names.append(self.fn.__name__)
            return run(self, *arguments, **others)

        def noted(call: Callable[..., Any], *found: str) -> Callable[..., Any]:
            def noting(*arguments: Any) -> Any:
                before = emulated.launches()
                result = call(*arguments)
                names.extend(found)
                assert "Memcpy" in found[0] or emulated.launches() - before == len(found)
                return result

            return noting

        with (
            mock.patch.object(interpreter.GridExecutor, "__call__", launched),
            mock.patch.object(rans, "cuda_encode", noted(encode, "encode_kernel", "pack_kernel")),
            mock.patch.object(rans, "cuda_decode", noted(decode, "decode_kernel")),
            mock.patch.object(rans_cuda.EncodedStreams, "to_host", noted(to_host, "Memcpy DtoH")),
        ):
            work()
        return names


def wrong_intervals(*arguments: Any) -> Any:
    starts, freqs = real_intervals(*arguments)
    starts[0, 0] += 1
    return starts, freqs


def wrong_tokens(self: Any, *arguments: Any, **others: Any) -> torch.Tensor:
    tokens = real_decode(self, *arguments, **others)
    if self.coder_name == "cuda":
        tokens[0, 0, 0] ^= 1
    return tokens


real_intervals, real_decode = rans.intervals, token_coder.TokenCoder.decode
for name in ("cuda_built", "cuda_devices", "cuda_encode_sizes", "cuda_encode", "cuda_decode"):
    setattr(rans, name, getattr(emulated, name))
rans_cuda.DEVICE_TYPE = "cpu"
cdf.fused = lambda device: True
if changed == ["intervals"]:
    rans.intervals = wrong_intervals
elif changed == ["tokens"]:
    token_coder.TokenCoder.decode = wrong_tokens
torch.set_num_threads(1)
gpu_device.WARM_UP = 0
gpu.SCHEDULE = "checkerboard"  # two stages: interpreting takes long
CONFIG = TransformerConfig(codebook_size=16, dim=24, heads=1, head_dim=32, layers=2, hidden=40)
ONCE = Effort(0.0, 1, 1)
PLAN = gpu.Plan((Size(1, 2, CONFIG),), ONCE, ONCE)
device = Pretended()
if changed == ["tokens"]:
    gpu.Bench(device, PLAN, 1, device.bandwidth(ONCE)).paths(PLAN.sizes[0])
report = gpu.run(PLAN, device)
print(json.dumps({"report": report, "text": page(report)}))
