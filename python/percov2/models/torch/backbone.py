"""The base of the backbones that run on torch, and of their networks' loading."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.caching import remembered
from percov2.models.backbone import Backbone
from percov2.models.torch.hyper_encoder import HyperEncoder, load_hyper_encoder
from percov2.models.torch.isolation import running
from percov2.models.torch.quantizer import VectorQuantizer, load_quantizer

__all__ = ["TorchBackbone"]


def _public(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method accept an array for its first tensor, and then return arrays.

    The method does not depend on torch's process-wide settings.
    """
    signature = inspect.signature(method)
    first = list(signature.parameters)[1]

    @wraps(method)
    def either(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        value = bound.arguments[first]
        with running(given[0].device):
            if isinstance(value, Tensor):
                return method(*given, **named)
            bound.arguments[first] = torch.from_numpy(np.ascontiguousarray(value))
            with torch.inference_mode():
                found = method(*bound.args, **bound.kwargs)
            parts = found if isinstance(found, tuple) else (found,)
            arrays = tuple(part.cpu().numpy() for part in parts)
        return arrays if isinstance(found, tuple) else arrays[0]

    return either


class TorchBackbone(Backbone):
    """A backbone whose networks are torch modules.

    ``quantizer`` and ``hyper_encoder`` return the network of a rate by name, loaded once. All
    methods return tensors for tensors and arrays for arrays.
    """

    def __init__(self, folder: Path, device: str) -> None:
        super().__init__(folder, device)
        self.quantizer = remembered(self._load_quantizer)
        self.hyper_encoder = remembered(self._load_hyper_encoder)

    @property
    def runtime(self) -> str:
        """Return the runtime of the networks, as ``Backbone.runtime``."""
        return f"torch {torch.__version__} on {self.device}, {torch.get_num_threads()} threads"

    def _load_quantizer(self, rate: str) -> VectorQuantizer:
        point = self.config.rate(rate)
        return load_quantizer(self.component(f"{point.name}/quantizer"), point, self.device)

    def _load_hyper_encoder(self, rate: str) -> HyperEncoder:
        point = self.config.rate(rate)
        folder = self.component(f"{point.name}/hyper_encoder")
        return load_hyper_encoder(folder, point, self.device)

    @abstractmethod
    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents [1, M, H/s, W/s] of one image after the other.

        Images never share a batch: convolution libraries choose their summation order by batch
        size, and an image's tokens must not depend on its neighbours. Arguments and errors as for
        ``encode_tokens``.
        """

    @_public
    @torch.inference_mode()
    def directions(self, images: Any, rate: str) -> Any:
        """Return unit vectors, as ``Backbone.directions``."""
        quantizer = self.quantizer(rate)
        return torch.cat([quantizer.directions(z) for z in self.hyper_latents(images, rate)])

    @_public
    def candidates(self, directions: Any, rate: str, count: int) -> tuple[Any, Any]:
        """Return tokens and similarities, as ``Backbone.candidates``."""
        return self.quantizer(rate).candidates(directions.to(self.device), count)

    @_public
    def nearest(self, directions: Any, rate: str) -> Any:
        """Return tokens, as ``Backbone.nearest``."""
        return self.quantizer(rate).nearest(directions.to(self.device))

    @_public
    @torch.inference_mode()
    def encode_tokens(self, images: Any, rate: str) -> Any:
        """Return tokens, as ``Backbone.encode_tokens``, without copies to the host between."""
        return self.nearest(self.directions(images, rate), rate)

    @_public
    @torch.inference_mode()
    def reconstruct(
        self,
        tokens: Any,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> Any:
        """Return images, as ``Backbone.reconstruct``."""
        return self.paint(tokens, rate, captions, steps, guidance, seed, realism)

    @torch.inference_mode()
    def pictures(
        self,
        tokens: Any,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> NDArray[np.uint8]:
        """Return pictures, as ``Backbone.pictures``; only their bytes leave the device."""
        placed = torch.from_numpy(np.ascontiguousarray(tokens))
        images = self.reconstruct(placed, rate, captions, steps, guidance, seed, realism)
        levels = images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @abstractmethod
    def paint(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None,
    ) -> Tensor:
        """Return images of tensors; arguments and errors as for ``reconstruct``."""
