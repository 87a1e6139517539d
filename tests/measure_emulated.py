"""``percov2 bench gpu`` as on a card, in its own process: ``measure_emulated.py MODULE``.

Triton kernels are interpreted (TRITON_INTERPRET=1), CUDA kernels emulated by MODULE, a path, and
tensors lie on the CPU. Prints the report; everything but device and clock is what a card runs.
With a second argument the CPU's result is changed, "intervals", or that of a decoder, "tokens".
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

from percov2.bench import gpu, gpu_compiled, gpu_device, gpu_paths, gpu_tables
from percov2.bench.gpu_cards import CARDS
from percov2.bench.gpu_kernels import Size
from percov2.bench.gpu_plan import GpuPlan
from percov2.bench.timing import Effort
from percov2.entropy import cdf, rans, rans_cuda, token_coder
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
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3",
            major=9,
            minor=0,
            multi_processor_count=132,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_multiprocessor=228 * 1024,
            L2_cache_size=64,
        )

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
gpu_paths.SCHEDULE = "checkerboard"  # two stages: interpreting takes long
CONFIG = TransformerConfig(codebook_size=16, dim=24, heads=1, head_dim=32, layers=2, hidden=40)
ONCE = Effort(0.0, 1, 1)
PLAN = GpuPlan(CARDS, (Size(1, 4, CONFIG),), ONCE, ONCE)
if changed == ["tokens"]:
    gpu_paths.measure_paths(Pretended(), CARDS[0], PLAN.sizes[0], 1, ONCE, ONCE)
# An interpreted kernel cannot be compiled: what it would need is another test's business.
missing = gpu_compiled.Missing("an interpreted kernel")
with mock.patch.object(gpu_compiled, "compile_kernel", side_effect=missing):
    report = gpu.run(PLAN, Pretended())
print(json.dumps({"report": report, "text": gpu_tables.as_text(report)}))
