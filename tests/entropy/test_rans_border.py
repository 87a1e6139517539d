"""What crosses the border to the compiled coder: arrays that begin anywhere, threads of Python."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from percov2 import _native
from percov2.entropy.rans import RansDecoder, RansEncoder, intervals


def at_odd_byte(array: np.ndarray) -> np.ndarray:
    """The same numbers, one byte beyond a boundary, as in a mapped file."""
    return np.frombuffer(b" " + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_arrays_need_not_be_aligned(dtype: type) -> None:
    logits = (np.arange(2 * 9 * 40) * 37 % 911).reshape(2, 9, 40).astype(dtype)
    symbols = np.arange(18, dtype=np.int32).reshape(2, 9)
    expected = intervals(logits, symbols, 12)
    odd, odd_symbols = at_odd_byte(logits), at_odd_byte(symbols)
    assert not odd.flags.aligned and not odd_symbols.flags.aligned
    raw = bytearray(b" " + logits.tobytes())
    tensor = torch.frombuffer(raw, dtype=torch.from_numpy(logits).dtype, offset=1)
    assert tensor.data_ptr() % logits.itemsize
    for given in (odd, tensor.view(2, 9, 40)):
        assert np.array_equal(intervals(given, odd_symbols, 12), expected)
        encoder = RansEncoder([1, 2])
        encoder.push(*(at_odd_byte(part.ravel()) for part in expected), [9, 9], 12)
        decoder = RansDecoder(*encoder.finish())
        assert np.array_equal(decoder.decode_logits(given, 12), symbols)
    with pytest.raises(ValueError, match="multiple of its element size"):
        _native.intervals(
            tensor.view(18, 40), logits.dtype.name, torch.zeros(18, dtype=torch.int32), 12, 1
        )


def test_one_coder_in_several_threads() -> None:
    """Four Python threads on one object: they take turns, and nothing is lost."""
    script = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from percov2.entropy.rans import RansDecoder, RansEncoder
count, calls = 5000, 24
starts, freqs = np.tile(np.array([0, 100, 7], np.int32), count), np.full(3 * count, 3, np.int32)
shared, alone = RansEncoder([5]), RansEncoder([5])
with ThreadPoolExecutor(4) as pool:
    for done in [pool.submit(shared.push, starts, freqs, [3 * count], 12) for _ in range(calls)]:
        done.result()
for _ in range(calls):
    alone.push(starts, freqs, [3 * count], 12)
stream, offsets = shared.finish()
assert stream.tobytes() == alone.finish()[0].tobytes()
tables = np.tile(np.arange(0, 4097, 16, dtype=np.int32), (1, count, 1))
one, several = RansDecoder(stream, offsets), RansDecoder(stream, offsets)
expected = sorted(one.decode_cdf(tables, 12).tobytes() for _ in range(calls))
with ThreadPoolExecutor(4) as pool:
    given = [pool.submit(several.decode_cdf, tables, 12) for _ in range(calls)]
assert sorted(part.result().tobytes() for part in given) == expected
assert several.states == one.states and several.positions == one.positions
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
