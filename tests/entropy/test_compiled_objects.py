"""The compiled module refuses objects and tensors with no memory behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from percov2 import _native


def test_compiled_objects_without_a_beginning_are_refused() -> None:
    none, grid = np.zeros(0, np.int32), np.ones((2, 2), np.int32)
    residual, tokens = np.zeros((1, 1, 8), np.int32), np.zeros((1, 2, 2), np.int32)
    for kind, calls in (
        (_native.BatchEncoder, {"finish": (), "symbols_before_output": ()}),
        (_native.BatchEncoder, {"push": (none, none, none.astype(np.int64), 16, 1)}),
        (_native.BatchDecoder, {"states": (), "positions": (), "exhausted": ()}),
        (_native.BatchDecoder, {"finished": (none.astype(np.uint32),)}),
        (_native.StagedPass, {"residual": (1,), "accept": (grid,), "tokens": ()}),
        (_native.IntegerTransformer, {"logits": (residual, 1), "encode": (grid, tokens, 1)}),
    ):
        for name, given in calls.items():
            with pytest.raises(TypeError, match=r"__init__\(\) was not called"):
                getattr(kind.__new__(kind), name)(*given)
    with pytest.raises(TypeError, match=r"__init__\(\) was not called"):
        _native.StagedPass(_native.IntegerTransformer.__new__(_native.IntegerTransformer), grid, 1)


def test_the_compiled_module_refuses_a_tensor_without_data() -> None:
    logits = torch.zeros(5, 16, dtype=torch.int16)
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="without data"):
        _native.intervals(logits, "int16", np.zeros(5, np.int32), 16, 1)
