"""The integer token transformer: parameters, their ranges, files and payloads.

docs/entropy-model.md defines the program; percov2.entropy.transformer holds the float form that is
trained and exported to this one. torch_executor (the oracle, any device), cpu_executor (C++) and
triton_executor (GPUs) run it; stage_pass offers their passes (one for encoding, one per stage for
decoding).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from percov2.entropy import intmath, tensor_file
from percov2.entropy.entries import (
    HIDDEN_INDEX,
    SIXTEENTHS,
    SIZE_CLASSES,
    START_ENTRIES,
)
from percov2.entropy.transformer_config import TransformerConfig

EXECUTORS = ("cpu", "torch", "triton")


def _linear_shapes(name: str, outputs: int, terms: int) -> dict[str, tuple[torch.dtype, tuple]]:
    return {
        f"{name}.weight": (torch.int8, (outputs, terms)),
        f"{name}.bias": (torch.int32, (outputs,)),
        f"{name}.multiplier": (torch.int8, (outputs,)),
        f"{name}.shift": (torch.int8, (outputs,)),
    }


def tensor_layout(config: TransformerConfig) -> dict[str, tuple[torch.dtype, tuple]]:
    """Name -> (dtype, shape) of every tensor of the integer program."""
    dim = config.dim
    layout: dict[str, tuple[torch.dtype, tuple]] = {
        "embedding.token": (torch.int16, (config.codebook_size, dim)),
        "embedding.query": (torch.int16, (dim,)),
        "embedding.row": (torch.int16, (SIXTEENTHS, dim)),
        "embedding.column": (torch.int16, (SIXTEENTHS, dim)),
        "embedding.start": (torch.int16, (START_ENTRIES, dim)),
        "embedding.height": (torch.int16, (SIZE_CLASSES, dim)),
        "embedding.width": (torch.int16, (SIZE_CLASSES, dim)),
        "head_norm.gain": (torch.int16, (dim,)),
        **_linear_shapes("head", config.codebook_size, dim),
    }
    for i in range(config.layers):
        prefix = f"layers.{i}"
        layout[f"{prefix}.attention_norm.gain"] = (torch.int16, (dim,))
        layout |= _linear_shapes(f"{prefix}.q", config.inner, dim)
        layout |= _linear_shapes(f"{prefix}.kv", 2 * config.inner, dim)
        layout[f"{prefix}.attention.bias"] = (torch.int16, (config.heads, HIDDEN_INDEX))
        layout[f"{prefix}.attention.shift"] = (torch.int8, (config.heads,))
        layout[f"{prefix}.attention.gain_bits"] = (torch.int8, (1,))
        layout |= _linear_shapes(f"{prefix}.out", dim, config.inner)
        layout[f"{prefix}.mlp_norm.gain"] = (torch.int16, (dim,))
        layout |= _linear_shapes(f"{prefix}.up", config.hidden, dim)
        layout[f"{prefix}.gelu"] = (torch.int8, (256,))
        layout |= _linear_shapes(f"{prefix}.down", dim, config.hidden)
    return layout


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    least, most = int(tensor.min()), int(tensor.max())
    if least < low or most > high:
        raise ValueError(
            f"{name} ranges from {least} to {most}; the integer program needs {low} .. {high}"
        )


def check_tensors(config: TransformerConfig, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors are those of ``config`` and keep every sum in range."""
    layout = tensor_layout(config)
    if tensors.keys() != layout.keys():
        odd = sorted(tensors.keys() ^ layout.keys())
        raise ValueError(f"missing or unknown tensors in the entropy model: {', '.join(odd[:5])}")
    limits = {
        "weight": (-intmath.INT8_LIMIT, intmath.INT8_LIMIT),
        "multiplier": (1, intmath.MAX_MULTIPLIER),
        "gain": (-intmath.MAX_GAIN, intmath.MAX_GAIN),
        "gain_bits": (0, intmath.MAX_GAIN_BITS),
        "gelu": (-intmath.INT8_LIMIT, intmath.INT8_LIMIT),
    }
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}"
            )
        kind = name.rpartition(".")[2]
        if kind in limits:
            _check_range(name, tensor, *limits[kind])
        elif name.endswith("attention.shift"):
            _check_range(name, tensor, intmath.SCORE_SHIFT_MIN, intmath.SCORE_SHIFT_MAX)
        elif kind == "shift":
            _check_range(name, tensor, 1, intmath.MAX_SHIFT)
        elif name.endswith("attention.bias"):
            _check_range(name, tensor, -intmath.MAX_SCORE_BIAS, intmath.MAX_SCORE_BIAS)
        elif kind == "bias":
            weight = tensors[name.removesuffix("bias") + "weight"].to(torch.int64)
            reach = weight.abs().sum(1) * intmath.INT8_LIMIT + tensor.to(torch.int64).abs()
            _check_range(f"the largest sum of {name[:-5]}", reach, 0, intmath.ACC_LIMIT - 1)


_TRITON_CAPABILITY = (8, 0)
"""The oldest cards for which the kernels are compiled in tests."""


def default_executor(device: torch.device) -> str:
    """What runs a model on ``device`` unless its user says otherwise.

    "cpu" on the CPU; on CUDA devices "triton" if triton is installed and the card is one of compute
    capability 8.0 or later, else "torch", with a warning that says why; "torch" elsewhere.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install 'percov2[gpu]')"
    elif torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    else:
        return "triton"
    warnings.warn(
        f"the entropy model runs on {device} in torch, slower than in Triton kernels: {reason}; "
        "executor='torch' silences this",
        RuntimeWarning,
        stacklevel=3,
    )
    return "torch"


def _trial(device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Tokens int64 [B, 5, 20] below 40 and stages for which an executor is proven on ``device``.

    On a GPU the kernels take larger tiles from 1024 rows on: there the queries fill these, and the
    contents do not.
    """
    stages = np.arange(100, dtype=np.int32).reshape(5, 20) * 7 % 5 + 1
    images = np.arange(11 if device.type == "cuda" else 1)[:, None, None]
    return torch.from_numpy((stages * 31 + images) % 40).to(torch.int64), stages


@cache
def _executor(name: str, device: torch.device) -> Any:
    """The module of an executor, proven to agree with torch on this machine.

    The compiled executor and the kernels of ``device`` compute a random layer, which torch computes
    on the CPU. Raises RuntimeError if they disagree.
    """
    module = importlib.import_module(f"percov2.entropy.{name}_executor")
    oracle = importlib.import_module("percov2.entropy.torch_executor")
    if module is not oracle:
        config = TransformerConfig(codebook_size=40, dim=48, heads=2, layers=1, hidden=1040)
        tensors = random_tensors(config, 0)
        tokens, stages = _trial(device)
        results = []
        for executor, place in ((module, device), (oracle, torch.device("cpu"))):
            placed = {name: tensor.to(place) for name, tensor in tensors.items()}
            model = executor.Executor(config, placed, place)
            results.append(model.logits(model.encode(tokens.to(place), stages)).cpu())
        if not torch.equal(*results):
            raise RuntimeError(
                f"the executor {name!r} does not compute what torch computes on this machine: "
                "the entropy model would give other tokens; use executor='torch'"
            )
    return module


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is another card after set_device or in another thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class IntTransformer:
    """An integer token transformer, ready to run on one device.

    Args:
        config: its sizes.
        tensors: what ``tensor_layout(config)`` lists.
        device: where it runs.
        executor: what runs it, "torch" (any device), "cpu" (C++) or "triton" (CUDA devices); by
            default what ``default_executor`` says. ``executor_name`` tells which it became.

    Raises:
        ValueError: tensors that do not fit the config or the ranges of the program, or an executor
            that does not fit the device.
        RuntimeError: the device or the executor does not compute exactly, or triton is missing for
            the executor "triton".

    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> model = IntTransformer.random(config, seed=1)
    >>> model.logits(torch.zeros(1, 4, 8, dtype=torch.int32)).shape
    torch.Size([1, 4, 16])
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: dict[str, Tensor],
        device: torch.device | str = "cpu",
        executor: str | None = None,
    ) -> None:
        check_tensors(config, tensors)
        self.config = config
        self.device = _numbered(torch.device(device))
        if executor is not None and executor not in EXECUTORS:
            raise ValueError(f"executor is {executor!r}; it must be one of {EXECUTORS}")
        self.executor_name = executor or default_executor(self.device)
        self.tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        with torch.device("cpu"):  # whatever the default device of tensors is
            intmath.self_test(self.device)
            placed = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}
            module = _executor(self.executor_name, self.device)
            self.executor = module.Executor(config, placed, self.device)

    def to(self, device: torch.device | str) -> IntTransformer:
        """The same model on another device."""
        return IntTransformer(self.config, self.tensors, device)

    def fingerprint(self) -> bytes:
        """SHA-256 over the canonical bytes of config and tensors (``tensor_file.fingerprint``)."""
        return tensor_file.fingerprint(self.config.to_dict(), self.tensors)

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors into ``folder`` (created if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tensor_file.write_tensors(folder / "model.safetensors", self.tensors)

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", executor: str | None = None
    ) -> IntTransformer:
        """Read what ``save`` wrote.

        Raises OSError for missing files, ValueError for files that are not an entropy model of
        this version, RuntimeError if the device does not compute exactly.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{folder / 'config.json'} must hold a JSON object")
        config = TransformerConfig.from_dict(content)
        tensors = tensor_file.read_tensors(folder / "model.safetensors")
        return cls(config, tensors, device, executor)

    def logits(self, residual: Tensor) -> Tensor:
        """Residual int32 [B, n, dim] after the last layer -> int16 base-2 logits [B, n, V]."""
        return self.executor.logits(residual)

    @classmethod
    def random(
        cls,
        config: TransformerConfig,
        seed: int,
        device: torch.device | str = "cpu",
        executor: str | None = None,
    ) -> IntTransformer:
        """A model of seeded random integers whose activations fill their ranges: for tests."""
        return cls(config, random_tensors(config, seed), device, executor)


def random_tensors(config: TransformerConfig, seed: int) -> dict[str, Tensor]:
    """Seeded random integers for ``tensor_layout(config)``."""
    generator = torch.Generator().manual_seed(seed)
    # Activations of size ~60 and weights of ~73 make sums of ~60 * 73 * sqrt(K), to be scaled.
    shifts = {"q": 13, "kv": 13, "up": 13, "out": 8, "down": 8, "head": 11, "attention": 10}
    ranges = {
        "embedding": (-9000, 9000),
        "weight": (-127, 127),
        "gain_bits": (1, 2),
        "gain": (400, 900),
        "gelu": (-127, 127),
        "multiplier": (64, 127),
    }
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in sorted(tensor_layout(config).items()):
        part, _, kind = name.rpartition(".")
        owner = part.rpartition(".")[2]
        if kind == "shift":
            low = high = shifts[owner]
        elif kind == "bias":
            low, high = (-100, 40) if owner == "attention" else (-9000, 9000)
        else:
            low, high = ranges["embedding" if owner == "embedding" else kind]
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        tensors[name] = drawn.to(dtype)
    return tensors
