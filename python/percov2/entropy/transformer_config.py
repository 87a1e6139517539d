"""The sizes of a token transformer, shared by its float form and its integer form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from percov2.entropy.cdf import MAX_CODEBOOK, MIN_CODEBOOK
from percov2.entropy.ranges import MAX_DIM, MAX_TERMS, whole_number

__all__ = ["TransformerConfig"]


_MAX_HEAD_DIM = 64
_MAX_HEADS = 64
_MAX_LAYERS = 64

_KIND = "percov2-token-transformer"
_VERSION = 1
"""Version of the integer program."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a token transformer.

    Args:
        codebook_size: number of tokens V, 2 to 8192.
        dim: width of the residual stream, 1 to 1024.
        heads: attention heads per layer, 1 to 64.
        head_dim: width of a head, 1 to 64. heads * head_dim must be at most 1040.
        layers: number of layers, 1 to 64.
        hidden: width inside the feed-forward part, 1 to 1040.

    Raises:
        ValueError: a size outside its range.

    >>> TransformerConfig(codebook_size=1024, layers=4).hidden
    512
    """

    codebook_size: int = 256
    dim: int = 128
    heads: int = 4
    head_dim: int = 32
    layers: int = 6
    hidden: int = 512

    def __post_init__(self) -> None:
        limits = {
            "codebook_size": (MIN_CODEBOOK, MAX_CODEBOOK),
            "dim": (1, MAX_DIM),
            "heads": (1, _MAX_HEADS),
            "head_dim": (1, _MAX_HEAD_DIM),
            "layers": (1, _MAX_LAYERS),
            "hidden": (1, MAX_TERMS),
        }
        for name, (low, high) in limits.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low, high))
        if self.inner > MAX_TERMS:
            raise ValueError(
                f"heads * head_dim is {self.inner}; products are exact only up to {MAX_TERMS} terms"
            )

    @property
    def inner(self) -> int:
        """Return the width of all heads together."""
        return self.heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {"kind": _KIND, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TransformerConfig:
        """Build a config from the content of config.json.

        Raises:
            ValueError: another kind, version or field.
        """
        sizes = dict(content)
        kind, version = sizes.pop("kind", None), sizes.pop("version", None)
        if kind != _KIND:
            raise ValueError(
                f"config.json describes no entropy model: its kind is {kind!r}, not {_KIND!r}; the "
                "entropy models of a model folder are in its folders RATE/entropy"
            )
        if version != _VERSION:
            raise ValueError(
                f"the entropy model has version {version!r}; this percov2 reads {_VERSION}"
            )
        return cls.of(sizes)

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> TransformerConfig:
        """Build a config from sizes by name; ValueError for an unknown name or a wrong size."""
        known = [one.name for one in fields(cls)]
        if unknown := sorted(sizes.keys() - set(known)):
            raise ValueError(f"unknown sizes {unknown} of an entropy model; known ones are {known}")
        return cls(**sizes)
