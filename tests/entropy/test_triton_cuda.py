"""The Triton kernels on a card, against the oracles of the interpreter."""

from __future__ import annotations

import pytest
import torch

from tools.compiled_kernels import compare_on

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("subject", ["intervals", "layers", "attention", "executor"])
def test_a_card_computes_what_the_oracle_computes(subject: str) -> None:
    compare_on("cuda", f"compare_{subject}.py")


def test_a_card_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    compare_on("cuda:1", "compare_executor.py")
