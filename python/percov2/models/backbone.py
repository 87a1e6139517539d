"""The interface between the codec and its networks, and the lookup of a backbone by name.

A backbone turns images into tokens and tokens into images; it knows no entropy models or files. Its
module is imported when it is opened, and its networks load on first use.
"""

from __future__ import annotations

import importlib
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.batching import by_group
from percov2.extras import require
from percov2.images import from_unit_range, to_unit_range
from percov2.models.checksums import Checksums
from percov2.models.config import ModelConfig, find_model
from percov2.models.stored_tensors import read_tensors

__all__ = [
    "DTYPES",
    "RUNTIMES",
    "Backbone",
    "BackboneOptions",
    "available_cores",
    "check_runtime",
    "open_backbone",
]

_ON_ONNX = {"tiny": "tiny.backbone:TinyModel"}
_ON_TORCH = {
    "tiny": "tiny.torch.backbone:TinyTorchModel",
    "sd3": "sd3.backbone:SD3Model",
    "perco": "perco.backbone:PerCoModel",
}
"""The module and class of a kind of backbone, imported when a model is opened."""
DTYPES = ("fp32", "bf16", "fp16", "int8")
RUNTIMES = ("onnx", "torch")


MAX_THREADS = 1024


def _whole(value: Any) -> int:
    """Return a whole number of any type as an int; -1 for other values."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Options of the networks' runtime. They never change a file's meaning.

    Attributes:
        runtime: "onnx" (ONNX Runtime, for small models on the CPU) or "torch"; None for "onnx" if
            the model folder has a graph and the device is the CPU, else "torch".
        threads: threads of "onnx", 1 to 1,024; None for all available cores. They never change
            tokens.
        dtype: number format of the networks that paint. For "tiny" with runtime "onnx": "fp32" or
            "int8" for the decoder; None for "int8" if the folder has that graph and the processor
            has AVX-512 VNNI. For "tiny" on torch: "fp32" (None), "bf16" or "fp16". For large
            backbones: "fp32", "bf16" or "fp16" for the base model's networks; None for "fp32" on
            the CPU and "bf16" elsewhere.
        offload: keep networks in CPU memory and move each to the device only while it runs. This
            option and the following ones are for large backbones.
        vae_tiling: run the base model's autoencoder in tiles, to bound its memory.
        compile: compile the flow network with ``torch.compile``; this slows the first picture.
        t5: use SD3's third and largest text encoder; False replaces its embeddings with zeros.

    Raises:
        ValueError: an unknown dtype or runtime, threads outside their range, or a switch that is
            neither True nor False.
    """

    runtime: str | None = None
    threads: int | None = None
    dtype: str | None = None
    offload: bool = False
    vae_tiling: bool = False
    compile: bool = False
    t5: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {DTYPES}, not {self.dtype!r}")
        if self.runtime not in (None, *RUNTIMES):
            raise ValueError(f"runtime must be one of {RUNTIMES}, not {self.runtime!r}")
        for name in ("offload", "vae_tiling", "compile", "t5"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.threads is not None:
            threads = -1 if isinstance(self.threads, bool) else _whole(self.threads)
            if not 1 <= threads <= MAX_THREADS:
                raise ValueError(
                    f"threads must be a whole number from 1 to {MAX_THREADS}, not {self.threads!r}"
                )
            object.__setattr__(self, "threads", threads)

    def large(self) -> list[str]:
        """Return the names of the options of large backbones that are not at their defaults."""
        given = {"t5": not self.t5}
        given |= {name: getattr(self, name) for name in ("offload", "vae_tiling", "compile")}
        return [name for name, is_given in given.items() if is_given]


class Backbone(ABC):
    """The float networks of a model folder: images -> tokens, tokens -> images.

    Arrays go in and come out; a backbone on torch returns tensors for tensors. ``config`` is the
    folder's ``config.json``, and ``component`` returns a network's folder by name ("flow",
    "r031/quantizer") after a comparison with the model's checksums. Raises ValueError for a folder
    that is no model.
    """

    opened_with = BackboneOptions()
    """The options of ``open_backbone``."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = Path(os.path.abspath(folder)), device
        self.config = ModelConfig.load(self.folder)
        self.component = lru_cache(None)(Checksums(self.folder).checked)

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Return the runtime of the networks, its version and its threads, for reports."""

    parallel = False
    """Whether several threads may use the networks at once."""

    def with_threads(self, threads: int) -> Backbone:
        """Return the same model with networks that use a number of threads, if that can be set."""
        return self

    def codebook_bytes(self, rate: str) -> bytes:
        """Return the stored codebook, float32 little-endian, row after row, for the model id."""
        folder = self.component(f"{self.config.rate(rate).name}/quantizer")
        (codebook,) = read_tensors(folder / "model.safetensors", "codebook").values()
        return codebook.astype("<f4").tobytes()

    def token_side(self, images: Any, rate: str) -> int:
        """Return a rate's token side; ValueError unless it divides the sides of images."""
        side = self.config.rate(rate).token_side
        height, width = images.shape[-2:]
        if height % side or width % side:
            raise ValueError(f"picture sides must be multiples of {side}: {(height, width)}")
        return side

    @abstractmethod
    def directions(self, images: Any, rate: str) -> Any:
        """Return the unit vectors before quantization, float32 [B, H/s, W/s, D].

        Arguments and errors as for ``encode_tokens``.
        """

    @abstractmethod
    def candidates(self, directions: Any, rate: str, count: int) -> tuple[Any, Any]:
        """Return tokens int32 and cosine similarities float32 of the nearest codes, nearest first.

        Both are [B, h, w, min(count, V)]; directions are those of the method of this name.
        """

    @abstractmethod
    def nearest(self, directions: Any, rate: str) -> Any:
        """Return the token int32 [B, h, w] of each direction; the lowest index wins a tie."""

    def encode_tokens(self, images: Any, rate: str) -> Any:
        """Return tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Images are float32 [B, 3, H, W] in [-1, 1]; a batch never changes an image's tokens. Raises
        ValueError if H or W is not a multiple of s, and for an unknown rate.
        """
        return self.nearest(self.directions(images, rate), rate)

    def encode_pictures(
        self, pictures: Sequence[NDArray[np.uint8]], rate: str
    ) -> list[NDArray[np.int32]]:
        """Return tokens [H/s, W/s] of each picture uint8 [H, W, 3]; sizes may differ.

        Errors are those of ``encode_tokens``. A picture's tokens do not depend on the others.
        """
        shapes = [picture.shape for picture in pictures]
        side = self.config.rate(rate).token_side
        sizes = [height * width // side**2 for height, width, _ in shapes]

        def encode(group: list[NDArray[np.uint8]]) -> list[NDArray[np.int32]]:
            return list(self.encode_tokens(to_unit_range(np.stack(group)), rate))

        return by_group(pictures, shapes, sizes, encode)

    @abstractmethod
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
        """Return images float32 [B, 3, h·s, w·s] in [-1, 1] from tokens int [B, h, w] and captions.

        Args:
            tokens: codebook indices.
            rate: name of their rate.
            captions: one per image, "" for none.
            steps: evaluations of the flow, at least 1.
            guidance: classifier-free guidance on captions; 1 turns it off.
            seed: seed of the starting noise, which all images of the batch share.
            realism: 0 (faithful) to 1 (realistic) for models with a dial; None for the rate's
                default.

        Raises:
            ValueError: tokens out of range, an unknown rate, steps < 1, realism outside 0 to 1, or
                any realism for a model without a dial.
        """

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
        """Return pictures uint8 [B, h·s, w·s, 3] of an array of tokens.

        Arguments and errors are those of ``reconstruct``. A backbone may need less memory for
        pictures than for images.
        """
        images = self.reconstruct(tokens, rate, captions, steps, guidance, seed, realism)
        return from_unit_range(images)


def check_runtime(folder: Path, kind: str, device: str, options: BackboneOptions) -> str:
    """Return the runtime of a kind of backbone in a folder on a device: "onnx" or "torch".

    Raises:
        ValueError: a device, runtime or option that this kind does not have.
        MissingExtra: the runtime is torch, which is not installed.
    """
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,4})?", device):
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if kind == "tiny" and (given := options.large()):
        raise ValueError(f"this small model accepts no {', '.join(given)}")
    possible = kind == "tiny" and device == "cpu"
    if options.runtime == "onnx" and not possible:
        raise ValueError(
            f"runtime 'onnx' runs small models on the CPU; {kind} on {device} needs 'torch'"
        )
    without = possible and not any(folder.glob("*/*.onnx"))
    runtime = options.runtime or ("onnx" if possible and not without else "torch")
    known = ("fp32", "int8") if runtime == "onnx" else ("fp32", "bf16", "fp16")
    if options.dtype not in (None, *known):
        raise ValueError(f"dtype {options.dtype!r} is not one of {kind} with runtime {runtime!r}")
    why = f", which {folder} needs, because it has no graphs" if without else ""
    if options.threads is not None and runtime != "onnx":
        raise ValueError(f"threads is an option of runtime 'onnx', not of torch{why}")
    if runtime == "torch":
        require("torch", f"runtime 'torch'{why},", "torch", "diffusers", "transformers")
    return runtime


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_backbone(
    name_or_path: str | Path, device: str = "cpu", options: BackboneOptions | None = None
) -> Backbone:
    """Open a model by name; networks load on first use.

    Args:
        name_or_path: an embedded model ("tiny"), a model folder or a saved pipeline. ``KIND:PATH``
            ("sd3:PATH", "perco:PATH") requires a kind of backbone; its PATH may also be a hub id
            ("owner/name"), which is downloaded.
        device: "cpu", "cuda" or "cuda:N"; "cuda" is the GPU that is current now.
        options: backbone options; None for the defaults.

    Raises:
        ValueError: no such model or device, another kind of backbone, or options that the backbone
            does not accept.
        MissingExtra: the runtime needs torch, which is not installed.
    """
    if options is None:
        options = BackboneOptions()
    elif not isinstance(options, BackboneOptions):
        raise TypeError(f"options must be BackboneOptions, not {options!r}")
    folder, config = find_model(name_or_path)
    if check_runtime(folder, config.backbone, str(device), options) == "onnx":
        threads = options.threads or available_cores()
        opened: Backbone = _home(_ON_ONNX[config.backbone])(folder, threads, options.dtype)
    else:
        opened = _open_on_torch(folder, config.backbone, str(device), options)
    opened.opened_with = options
    return opened


def _home(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"percov2.models.{module}"), name)


def _open_on_torch(folder: Path, kind: str, device: str, options: BackboneOptions) -> Backbone:
    import torch

    if device.startswith("cuda"):
        place = torch.device(device)
        if (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device!r} is not available on this machine; use cpu")
        if place.index is None:
            device = f"cuda:{torch.cuda.current_device()}"
    backbone: Backbone = _home(_ON_TORCH[kind])(folder, device, options)
    return backbone
