"""The Triton kernels on a real card, against the same oracles as under the interpreter."""

from __future__ import annotations

import pytest

from compiled_kernels import compare_on

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("subject", ["intervals", "layers", "attention", "executor"])
def test_a_card_computes_what_the_oracle_computes(subject: str) -> None:
    compare_on("cuda", f"compare_{subject}.py")
