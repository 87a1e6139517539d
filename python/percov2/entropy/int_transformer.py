"""The integer token transformer: parameters, their ranges, files, and compiled passes.

docs/reference/entropy-model.md defines the program. ``percov2.entropy.torch`` trains the float
form, exports it to this one, and has executors for other devices.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from percov2.entropy import ranges, rans, sampling, tensor_file
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import (
    HIDDEN_INDEX,
    SIXTEENTHS,
    SIZE_CLASSES,
    START_ENTRIES,
)
from percov2.stored_files import read_json

__all__ = [
    "TRIAL",
    "IntTransformer",
    "check_tensors",
    "prove_compiled",
    "random_tensors",
    "tensor_layout",
    "trial",
]


_INT8, _INT16, _INT32 = np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32)


def _linear_shapes(name: str, outputs: int, terms: int) -> dict[str, tuple[np.dtype, tuple]]:
    return {
        f"{name}.weight": (_INT8, (outputs, terms)),
        f"{name}.bias": (_INT32, (outputs,)),
        f"{name}.multiplier": (_INT8, (outputs,)),
        f"{name}.shift": (_INT8, (outputs,)),
    }


def tensor_layout(config: TransformerConfig) -> dict[str, tuple[np.dtype, tuple]]:
    """Return name -> (dtype, shape) of every tensor of the integer program."""
    dim = config.dim
    layout: dict[str, tuple[np.dtype, tuple]] = {
        "embedding.token": (_INT16, (config.codebook_size, dim)),
        "embedding.query": (_INT16, (dim,)),
        "embedding.row": (_INT16, (SIXTEENTHS, dim)),
        "embedding.column": (_INT16, (SIXTEENTHS, dim)),
        "embedding.start": (_INT16, (START_ENTRIES, dim)),
        "embedding.height": (_INT16, (SIZE_CLASSES, dim)),
        "embedding.width": (_INT16, (SIZE_CLASSES, dim)),
        "head_norm.gain": (_INT16, (dim,)),
        **_linear_shapes("head", config.codebook_size, dim),
    }
    for i in range(config.layers):
        prefix = f"layers.{i}"
        layout[f"{prefix}.attention_norm.gain"] = (_INT16, (dim,))
        layout |= _linear_shapes(f"{prefix}.q", config.inner, dim)
        layout |= _linear_shapes(f"{prefix}.kv", 2 * config.inner, dim)
        layout[f"{prefix}.attention.bias"] = (_INT16, (config.heads, HIDDEN_INDEX))
        layout[f"{prefix}.attention.shift"] = (_INT8, (config.heads,))
        layout[f"{prefix}.attention.gain_bits"] = (_INT8, (1,))
        layout |= _linear_shapes(f"{prefix}.out", dim, config.inner)
        layout[f"{prefix}.mlp_norm.gain"] = (_INT16, (dim,))
        layout |= _linear_shapes(f"{prefix}.up", config.hidden, dim)
        layout[f"{prefix}.gelu"] = (_INT8, (256,))
        layout |= _linear_shapes(f"{prefix}.down", dim, config.hidden)
    return layout


def _check_range(name: str, tensor: NDArray[Any], low: int, high: int) -> None:
    least, most = int(tensor.min()), int(tensor.max())
    if least < low or most > high:
        raise ValueError(
            f"{name} ranges from {least} to {most}; the integer program needs {low} .. {high}"
        )


def check_tensors(config: TransformerConfig, tensors: dict[str, NDArray[Any]]) -> None:
    """Raise ValueError unless the tensors match ``config`` and keep every sum in range."""
    layout = tensor_layout(config)
    if tensors.keys() != layout.keys():
        odd = sorted(tensors.keys() ^ layout.keys())
        raise ValueError(f"missing or unknown tensors in the entropy model: {', '.join(odd[:5])}")
    limits = {
        "weight": (-ranges.INT8_LIMIT, ranges.INT8_LIMIT),
        "multiplier": (1, ranges.MAX_MULTIPLIER),
        "gain": (-ranges.MAX_GAIN, ranges.MAX_GAIN),
        "gain_bits": (0, ranges.MAX_GAIN_BITS),
        "gelu": (-ranges.INT8_LIMIT, ranges.INT8_LIMIT),
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
            _check_range(name, tensor, ranges.SCORE_SHIFT_MIN, ranges.SCORE_SHIFT_MAX)
        elif kind == "shift":
            _check_range(name, tensor, 1, ranges.MAX_SHIFT)
        elif name.endswith("attention.bias"):
            _check_range(name, tensor, -ranges.MAX_SCORE_BIAS, ranges.MAX_SCORE_BIAS)
        elif kind == "bias":
            weight = tensors[name.removesuffix("bias") + "weight"].astype(np.int64)
            reach = np.abs(weight).sum(1) * ranges.INT8_LIMIT + np.abs(tensor.astype(np.int64))
            _check_range(f"the largest sum of {name[:-5]}", reach, 0, ranges.ACC_LIMIT - 1)


TRIAL = TransformerConfig(codebook_size=40, dim=48, heads=2, layers=1, hidden=1040)
"""Sizes of the model that proves an executor. Its tensors are ``random_tensors(TRIAL, 0)``."""
_TRIAL_LOGITS = "1cd29e267127fb21bc7c8ca31c341208c44f94f57b279724f9f441f7c718a81d"
"""SHA-256 of the trial's logits, int16 little-endian, computed by ``percov2.entropy.torch``."""


def trial(images: int = 1) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the input that proves an executor.

    The tokens [images, 5, 20] are below 40, and the stages are [5, 20].
    """
    stages = np.arange(100, dtype=np.int32).reshape(5, 20) * 7 % 5 + 1
    return (stages * 31 + np.arange(images, dtype=np.int32)[:, None, None]) % 40, stages


@cache
def prove_compiled(instruction_set: str) -> None:
    """Raise RuntimeError unless the compiled program gives the known logits of the trial.

    ``instruction_set`` is the one in use. Each instruction set is tried only once.
    """
    tokens, stages = trial()
    program = _compiled(TRIAL, random_tensors(TRIAL, 0))
    logits = program.logits(program.encode(stages, tokens, 1), 1)
    if hashlib.sha256(logits.astype("<i2").tobytes()).hexdigest() != _TRIAL_LOGITS:
        raise RuntimeError(
            f"the compiled entropy model ({instruction_set}) computes other integers on this "
            "machine than the format says: it would give other tokens; use the executor 'torch'"
        )


def _compiled(
    config: TransformerConfig, tensors: dict[str, NDArray[Any]]
) -> rans.IntegerTransformer:
    sizes = (config.dim, config.heads, config.head_dim, config.layers, config.hidden)
    return rans.IntegerTransformer(tensors, config.codebook_size, *sizes)


class IntTransformer:
    """An integer token transformer that the compiled program runs on the CPU.

    Args:
        config: sizes of the model.
        tensors: the arrays or tensors that ``tensor_layout(config)`` lists, by name.

    Raises:
        ValueError: the tensors do not match the config or exceed the ranges of the program.
        RuntimeError: this machine does not compute exactly.

    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> model = IntTransformer.random(config, seed=1)
    >>> model.logits(np.zeros((1, 4, 8), np.int32)).shape
    (1, 4, 16)
    """

    executor_name = "cpu"

    def __init__(self, config: TransformerConfig, tensors: dict[str, Any]) -> None:
        self.config = config
        self.tensors = {name: rans.as_array(tensor, name) for name, tensor in tensors.items()}
        check_tensors(config, self.tensors)
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process prepares its own program, on its own instruction set.
        return type(self), (self.config, self.tensors)

    def _prepare(self) -> None:
        prove_compiled(rans.instruction_set())
        self._program = _compiled(self.config, self.tensors)

    def fingerprint(self) -> bytes:
        """Return the SHA-256 of the canonical bytes of the config and the tensors."""
        return tensor_file.fingerprint(self.config.to_dict(), self.tensors)

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors into ``folder`` (created if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tensor_file.write_tensors(folder / "model.safetensors", self.tensors)

    @classmethod
    def load(cls, folder: Path | str, **options: Any) -> Self:
        """Read a folder written by ``save``.

        Args:
            folder: the model's folder.
            options: further arguments for the constructor of the class.

        Raises:
            ValueError: the folder holds no entropy model of this version.
            RuntimeError: the machine does not compute exactly.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                raise ValueError(f"{folder} is no entropy model: it has no {name}")
        content = read_json(folder / "config.json")
        if not isinstance(content, dict):
            raise ValueError(f"{folder / 'config.json'} must contain a JSON object")
        config = TransformerConfig.from_dict(content)
        return cls(config, tensor_file.read_tensors(folder / "model.safetensors"), **options)

    @classmethod
    def random(cls, config: TransformerConfig, seed: int, **options: Any) -> Self:
        """Return a model of random integers from a seed, whose activations fill their ranges.

        Raises ValueError unless 0 <= seed < 2^48.
        """
        return cls(config, random_tensors(config, seed), **options)

    # Passes --------------------------------------------------------------------------------------

    def encode(self, tokens: Any, stages: NDArray[np.int32]) -> Any:
        """Return the residual of all queries in coding order, int32 [B, h * w, dim].

        ``tokens`` [B, h, w] come from ``place``; ``stages`` is int32 [h, w].
        ``percov2.entropy.staging`` checks both.
        """
        return self._program.encode(np.ascontiguousarray(stages), tokens, rans.default_threads())

    def staged(self, stages: NDArray[np.int32], batch: int) -> Any:
        """Return the stage-by-stage passes that decode ``batch`` grids."""
        return _Staged(rans.StagedPass(self._program, np.ascontiguousarray(stages), batch))

    def logits(self, residual: Any) -> Any:
        """Return the base-2 logits, int16 [B, n, V], of a residual, int32 [B, n, dim]."""
        return self._program.logits(np.ascontiguousarray(residual), rans.default_threads())

    def place(self, tokens: Any) -> Any:
        """Return the tokens as a contiguous int32 array, which the passes read.

        Raises:
            ValueError: the tokens are no integers, or one lies outside the codebook.
        """
        array = rans.as_array(tokens, "tokens")
        if array.dtype.kind not in "iu":
            raise ValueError(f"tokens have dtype {array.dtype}; they must be integers")
        size = self.config.codebook_size
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < size:
            raise ValueError(
                f"tokens range from {array.min()} to {array.max()}; the codebook has {size} entries"
            )
        return np.ascontiguousarray(array, dtype=np.int32)


class _Staged:
    """The passes of decoding. Per stage, call ``residual``, then ``accept`` with the tokens."""

    def __init__(self, native: rans.StagedPass) -> None:
        self._native = native
        self.accept = native.accept
        self.tokens = native.tokens

    def residual(self) -> NDArray[np.int32]:
        """Return the residual of the next stage's queries: int32 [B, n, dim]."""
        return self._native.residual(rans.default_threads())


def random_tensors(config: TransformerConfig, seed: int) -> dict[str, NDArray[Any]]:
    """Return random integers for ``tensor_layout(config)``.

    A seed gives the same integers on every machine.
    """
    # Activations of ~60 times weights of ~73 give sums of ~60 * 73 * sqrt(K). Shifts scale them.
    shifts = {"q": 13, "kv": 13, "up": 13, "out": 8, "down": 8, "head": 11, "attention": 10}
    spans = {
        "embedding": (-9000, 9000),
        "weight": (-127, 127),
        "gain_bits": (1, 2),
        "gain": (400, 900),
        "gelu": (-127, 127),
        "multiplier": (64, 127),
    }
    seed = ranges.whole_number("seed", seed, 0, 2**48 - 1)
    tensors: dict[str, NDArray[Any]] = {}
    for i, (name, (dtype, shape)) in enumerate(sorted(tensor_layout(config).items())):
        part, _, kind = name.rpartition(".")
        owner = part.rpartition(".")[2]
        if kind == "shift":
            low = high = shifts[owner]
        elif kind == "bias":
            low, high = (-100, 40) if owner == "attention" else (-9000, 9000)
        else:
            low, high = spans["embedding" if owner == "embedding" else kind]
        count = int(np.prod(shape))
        words = sampling.philox(seed << 16 | i, np.arange(-(-count // 4))).ravel()[:count]
        drawn = low + (words % (high + 1 - low)).astype(np.int64)
        tensors[name] = drawn.astype(dtype).reshape(shape)
    return tensors
