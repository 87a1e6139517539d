"""A trial of coding on a device: its intervals, bytes and symbols must equal those of the CPU.

A wrong encoder would silently write unreadable files. Emulations prove the kernels, but not the
compiler, the driver and the GPU.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from percov2.entropy import rans
from percov2.entropy.cdf import default_prob_bits
from percov2.entropy.torch import cdf, rans_cuda

__all__ = ["prove_coder"]


_STREAMS, _SYMBOLS = 5, 70


@cache
def prove_coder(device: torch.device, codebook_size: int, kernels: bool) -> None:
    """Code a few tokens on ``device``, once for each codebook size, and compare with the CPU.

    This compares the intervals and, if ``kernels`` is True, also the streams of ``rans_cuda``. It
    waits for the device. Raises RuntimeError if anything differs.
    """
    rng = np.random.default_rng(codebook_size)
    prob_bits = default_prob_bits(codebook_size)
    # Rows range from equal logits to distances where weights are 0.
    scale = rng.integers(0, 17, (_STREAMS, _SYMBOLS, 1), dtype=np.int32)
    wide = rng.integers(-(2**15), 2**15, (_STREAMS, _SYMBOLS, codebook_size), dtype=np.int32)
    logits = torch.from_numpy((wide >> scale).astype(np.int16))
    tokens = rng.integers(0, codebook_size, (_STREAMS, _SYMBOLS), dtype=np.int32)
    tokens[:, :2] = 0, codebook_size - 1
    starts, freqs = rans.intervals(logits, tokens, prob_bits)

    there, symbols = logits.to(device), torch.from_numpy(tokens).to(device)
    intervals = cdf.marked_intervals(there, symbols, prob_bits)
    if not np.array_equal(intervals.cpu().numpy(), np.stack([starts, freqs])):
        raise RuntimeError(
            f"{device} computes other intervals than the CPU from the same logits: files written "
            "there could not be read; load the model on the CPU"
        )
    if not kernels:
        return

    checks = rng.integers(0, 2**16, _STREAMS, dtype=np.int32)
    encoder = rans.RansEncoder(checks)
    counts = np.full(_STREAMS, _SYMBOLS, dtype=np.int64)
    encoder.encode(starts.ravel(), freqs.ravel(), counts, prob_bits)
    expected = encoder.finish()
    placed = torch.from_numpy(checks).to(device)
    buffer, offsets, quiet = rans_cuda.encode(
        intervals[0], intervals[1], placed, prob_bits
    ).to_host()
    right = np.array_equal(buffer, expected[0]) and np.array_equal(offsets, expected[1])
    right = right and np.array_equal(quiet, encoder.symbols_before_output)

    joined, bounds = (torch.from_numpy(array) for array in expected)
    decoder = rans_cuda.CudaRansDecoder(joined, bounds, device)
    read = [decoder.decode(there[:, :33], prob_bits).cpu()]
    rest = there[:, 33:].flatten(0, 1)[None].contiguous()
    rows = torch.arange(_STREAMS + 1).to(device) * (_SYMBOLS - 33)
    read.append(decoder.decode_rows(rest, rows, prob_bits).cpu().view(_STREAMS, -1))
    right = right and np.array_equal(torch.cat(read, 1).numpy(), tokens)
    if not right or not decoder.finished(checks).all():
        raise RuntimeError(
            f"the CUDA kernels on {device} write or read other streams than the CPU: files written "
            "there could not be read; use coder='cpu'"
        )
