"""The integer token transformer: parameters, checks, files, and the layers in exact torch.

docs/entropy-model.md defines the program; percov2.entropy.transformer holds the float form that is
trained and exported to this one. Passes over entries (one for encoding, one per stage for
decoding) are in percov2.entropy.stage_pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from percov2.entropy import intmath, tensor_file
from percov2.entropy.entries import (
    HIDDEN_INDEX,
    SIXTEENTHS,
    SIZE_CLASSES,
    START_ENTRIES,
    Block,
    sixteenths,
    size_class,
)
from percov2.entropy.transformer_config import TransformerConfig

_ROWS_AT_ONCE = 1024
"""Rows that go through a layer together, so that what is between two products stays in cache."""


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


class _Linear:
    """One quantized linear map: float32 weights for the exact product, int32 requantization."""

    def __init__(self, tensors: dict[str, Tensor], name: str, low: int, high: int) -> None:
        self._weight = tensors[f"{name}.weight"].to(torch.float32)
        self._bias = tensors[f"{name}.bias"].to(torch.float32)
        self._multiplier = tensors[f"{name}.multiplier"].to(torch.int32)
        self._shift = tensors[f"{name}.shift"].to(torch.int32)
        self._low, self._high = low, high

    def __call__(self, x: Tensor) -> Tensor:
        """float32 integers [n, K] -> int32 [n, outputs] in [low, high]."""
        acc = intmath.linear(x, self._weight, self._bias)
        return intmath.requantize(acc, self._multiplier, self._shift, self._low, self._high)


class IntLayer:
    """One layer of the program: attention, then feed-forward, each added to the residual."""

    def __init__(self, config: TransformerConfig, tensors: dict[str, Tensor], index: int) -> None:
        prefix = f"layers.{index}"
        small, large = intmath.INT8_LIMIT, intmath.RESIDUAL_LIMIT
        self._heads, self._head_dim = config.heads, config.head_dim
        self._attention_gain = tensors[f"{prefix}.attention_norm.gain"].to(torch.int32)
        self._q = _Linear(tensors, f"{prefix}.q", -small, small)
        self._kv = _Linear(tensors, f"{prefix}.kv", -small, small)
        # Score = floor(q.k * 2^-shift + 1/2) + bias; the half is added here once and for all.
        bias = tensors[f"{prefix}.attention.bias"].to(torch.float32) + 0.5
        hidden = bias.new_full((config.heads, 1), float(intmath.HIDDEN_SCORE))
        self._bias = torch.cat([bias, hidden], 1)
        shift = tensors[f"{prefix}.attention.shift"].to(torch.float32)
        self._score_scale = torch.exp2(-shift)[:, None, None]
        self._gain_bits = int(tensors[f"{prefix}.attention.gain_bits"])
        self._out = _Linear(tensors, f"{prefix}.out", -large, large)
        self._mlp_gain = tensors[f"{prefix}.mlp_norm.gain"].to(torch.int32)
        self._up = _Linear(tensors, f"{prefix}.up", -small, small)
        self._gelu = tensors[f"{prefix}.gelu"].to(torch.float32)
        self._down = _Linear(tensors, f"{prefix}.down", -large, large)

    def _project(self, residual: Tensor, linear: _Linear) -> Tensor:
        """Residual int32 [B, E, dim] -> int8 [B, E, parts, heads, head_dim]."""
        rows = residual.reshape(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        parts = [
            linear(intmath.layer_norm(part, self._attention_gain)).to(torch.int8) for part in rows
        ]
        return torch.cat(parts).view(*residual.shape[:2], -1, self._heads, self._head_dim)

    def keys_values(self, contents: Tensor) -> tuple[Tensor, Tensor]:
        """Residual int32 [B, K, dim] -> k, v int8 [B, K, heads, head_dim]."""
        k, v = self._project(contents, self._kv).unbind(2)
        return k, v

    def advance(self, residual: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> None:
        """Apply the layer to the residual int32 [B, E, dim] of some readers, in place.

        k, v: int8 [B, K, heads, head_dim], what they may see; blocks: ``plan_blocks`` of readers
        and keys.
        """
        q = self._project(residual, self._q).squeeze(2)
        inputs = self._attend(q, k, v, blocks).view(-1, self._heads * self._head_dim)
        rows = residual.view(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        for part, x in zip(rows, inputs.split(_ROWS_AT_ONCE), strict=True):
            intmath.residual_add(part, self._out(x.to(torch.float32)))
            hidden = self._up(intmath.layer_norm(part, self._mlp_gain))
            intmath.residual_add(part, self._down(intmath.lookup(hidden, self._gelu)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Attention: q int8 [B, E, heads, head_dim] -> int8 of the same shape, contiguous."""
        result = torch.empty_like(q)
        for block in blocks:
            shape = (self._heads, len(block.readers), len(block.keys))
            bias = self._bias.index_select(1, block.relative()).view(shape)
            for b in range(q.shape[0]):
                query = q[b].index_select(0, block.readers).to(torch.float32).transpose(0, 1)
                key = k[b].index_select(0, block.keys).to(torch.float32).permute(1, 2, 0)
                # |q.k| <= 64 * 127^2 < 2^20 and shift <= 12: exact, and so is the sum with bias.
                scores = torch.bmm(query * self._score_scale, key).add_(bias)
                weights = intmath.softmax_weights_(scores)
                value = v[b].index_select(0, block.keys).to(torch.float32).transpose(0, 1)
                mean = intmath.attention_mean(
                    torch.bmm(weights, value), weights.sum(-1, keepdim=True), self._gain_bits
                )
                result[b].index_copy_(0, block.readers, mean.transpose(0, 1).to(torch.int8))
        return result


class IntTransformer:
    """An integer token transformer, ready to run on one device.

    Args:
        config: its sizes.
        tensors: what ``tensor_layout(config)`` lists.
        device: where it runs.

    Raises:
        ValueError: tensors that do not fit the config or the ranges of the program.
        RuntimeError: the device does not compute exactly (``intmath.self_test``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: dict[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        check_tensors(config, tensors)
        self.config = config
        self.device = torch.device(device)
        self.tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        intmath.self_test(self.device)
        placed = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}
        self._tables = {
            name: tensor.to(torch.int32)
            for name, tensor in placed.items()
            if name.startswith("embedding.")
        }
        self.layers = [IntLayer(config, placed, i) for i in range(config.layers)]
        self._head_gain = placed["head_norm.gain"].to(torch.int32)
        self._head = _Linear(placed, "head", intmath.LOGIT_MIN, intmath.LOGIT_MAX)

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
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> IntTransformer:
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
        return cls(config, tensor_file.read_tensors(folder / "model.safetensors"), device)

    def start_payload(self, height: int, width: int) -> Tensor:
        """Residual of the start entries of a grid: int32 [3, dim]."""
        payload = self._tables["embedding.start"].clone()
        payload[1] += self._tables["embedding.height"][size_class(height)]
        payload[2] += self._tables["embedding.width"][size_class(width)]
        return payload

    def place_payload(self, height: int, width: int) -> Tensor:
        """What every entry at a position adds for its place: int32 [height * width, dim]."""
        rows = torch.from_numpy(sixteenths(height)).to(self.device)
        columns = torch.from_numpy(sixteenths(width)).to(self.device)
        row = self._tables["embedding.row"][rows][:, None]
        return (row + self._tables["embedding.column"][columns][None]).view(height * width, -1)

    def content_payload(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Residual of contents: tokens int64 [B, n], place int32 [n, dim] -> int32 [B, n, dim]."""
        return self._tables["embedding.token"][tokens] + place

    def query_payload(self, batch: int, place: Tensor) -> Tensor:
        """Residual of queries: place int32 [n, dim] -> int32 [batch, n, dim]."""
        return (self._tables["embedding.query"] + place).repeat(batch, 1, 1)

    def logits(self, residual: Tensor) -> Tensor:
        """Residual int32 [B, n, dim] after the last layer -> int16 base-2 logits [B, n, V]."""
        rows = residual.reshape(-1, residual.shape[-1]).split(_ROWS_AT_ONCE)
        parts = [self._head(intmath.layer_norm(part, self._head_gain)) for part in rows]
        flat = torch.cat([part.to(torch.int16) for part in parts])
        return flat.view(*residual.shape[:-1], self.config.codebook_size)

    @classmethod
    def random(
        cls, config: TransformerConfig, seed: int, device: torch.device | str = "cpu"
    ) -> IntTransformer:
        """A model of seeded random integers whose activations fill their ranges: for tests."""
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, shape: tuple, dtype: torch.dtype) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator).to(dtype)

        tensors: dict[str, Tensor] = {}
        for name, (dtype, shape) in sorted(tensor_layout(config).items()):
            if name.startswith("embedding."):
                tensors[name] = draw(-9000, 9000, shape, dtype)
            elif name.endswith(".weight"):
                tensors[name] = draw(-127, 127, shape, dtype)
            elif name.endswith("attention.bias"):
                tensors[name] = draw(-100, 40, shape, dtype)
            elif name.endswith("attention.shift"):
                tensors[name] = draw(9, 11, shape, dtype)
            elif name.endswith(".gain_bits"):
                tensors[name] = draw(1, 2, shape, dtype)
            elif name.endswith(".gain"):
                tensors[name] = draw(400, 900, shape, dtype)
            elif name.endswith(".gelu"):
                tensors[name] = draw(-127, 127, shape, dtype)
            elif name.endswith(".bias"):
                tensors[name] = draw(-9000, 9000, shape, dtype)
            elif name.endswith(".multiplier"):
                tensors[name] = draw(64, 127, shape, dtype)
            else:
                target = name.removesuffix(".shift")
                # Activations of size ~60 and weights of ~73 make sums of ~60 * 73 * sqrt(K).
                shift = {"q": 13, "kv": 13, "up": 13, "out": 8, "down": 8}.get(
                    target.rpartition(".")[2], 11
                )
                tensors[name] = torch.full(shape, shift, dtype=dtype)
        return cls(config, tensors, device)
