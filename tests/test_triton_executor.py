"""The Triton executor of the integer transformer: interpreted, chosen, and refused."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from compiled_kernels import compare_on, needs_triton
from percov2.entropy import int_transformer
from percov2.entropy.int_transformer import IntTransformer, default_executor
from percov2.entropy.transformer_config import TransformerConfig

SMALL = TransformerConfig(codebook_size=16, dim=24, heads=2, head_dim=8, layers=1, hidden=40)
CUDA = torch.device("cuda", 0)


@needs_triton
def test_interpreted_passes_equal_torch() -> None:
    compare_on("cpu", "compare_executor.py")


@needs_triton
def test_encoding_takes_three_launches_and_one_copy_after_the_transformer() -> None:
    compare_on("cpu", "compare_launches.py")


@needs_triton
def test_a_cpu_without_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        IntTransformer.random(SMALL, 1, executor="triton")


def test_the_executor_has_a_name() -> None:
    assert IntTransformer.random(SMALL, 1).executor_name == "cpu"
    assert IntTransformer.random(SMALL, 1, executor="torch").executor_name == "torch"


@pytest.mark.parametrize(
    ("installed", "capability", "chosen", "reason"),
    [
        (True, (8, 0), "triton", None),
        (True, (10, 0), "triton", None),
        (True, (7, 5), "torch", "Old Card is older"),
        (False, (9, 0), "torch", "pip install"),
    ],
)
def test_the_choice_on_a_gpu_is_visible(monkeypatch, installed, capability, chosen, reason):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        int_transformer.importlib.util,
        "find_spec",
        lambda name: (object() if installed else None) if name == "triton" else find(name),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    if reason is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert default_executor(CUDA) == chosen
    else:
        with pytest.warns(RuntimeWarning, match=reason):
            assert default_executor(CUDA) == chosen


def test_elsewhere_the_choice_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_executor(torch.device("cpu")) == "cpu"
        assert default_executor(torch.device("meta")) == "torch"
