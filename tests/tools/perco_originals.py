"""PerCo's hyper-encoder and quantizer, built from the original libraries' layers.

For the interpreter of benchmarks/originals.sh, which has no percov2: ``python perco_originals.py IN
OUT``, both safetensors. IN holds a published state dict and ``latents``; its metadata hold grid, n,
m, codes and dim. OUT gets ``z``, ``indices`` and ``z_hat``.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def without_initialisation(package: str) -> None:
    """Let submodules be imported though the package's own imports are not installed."""
    parent, _, name = package.rpartition(".")
    if parent:
        place = str(Path(sys.modules[parent].__path__[0]) / name)
    else:
        found = importlib.util.find_spec(package)
        assert found is not None and found.submodule_search_locations
        place = found.submodule_search_locations[0]
    module = types.ModuleType(package)
    module.__path__ = [place]
    sys.modules[package] = module


for package in ("compressai", "compressai.layers", "compressai.models"):
    without_initialisation(package)

from compressai.layers.layers import AttentionBlock, conv1x1, conv3x3  # noqa: E402
from compressai.models.utils import conv  # noqa: E402
from vector_quantize_pytorch import VectorQuantize  # noqa: E402


class Bottleneck(nn.Module):
    """PerCo's own block; everything else here is the libraries'."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.layers = nn.Sequential(
            conv1x1(channels, half),
            nn.ReLU(),
            conv3x3(half, half),
            nn.ReLU(),
            conv1x1(half, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def step(inputs: int, n: int, halve: bool) -> nn.Module:
    return conv(inputs, n) if halve else conv1x1(inputs, n)


def main(given: str, wanted: str) -> None:
    with safe_open(given, "pt") as file:
        sizes = {name: int(value) for name, value in file.metadata().items()}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    latents = state.pop("latents")
    grid, n, m = sizes["grid"], sizes["n"], sizes["m"]
    model = nn.Module()
    model.backbone = nn.Sequential(
        step(latents.shape[1], n, grid < 16),
        *[Bottleneck(n) for _ in range(3)],
        step(n, n, grid < 32),
        *[Bottleneck(n) for _ in range(3)],
        AttentionBlock(n),
        step(n, n, grid < 64),
        *[Bottleneck(n) for _ in range(3)],
        conv1x1(n, m),
        AttentionBlock(m),
    )
    model.quantizer = VectorQuantize(
        dim=m, codebook_size=sizes["codes"], codebook_dim=sizes["dim"], use_cosine_sim=True
    )
    model.load_state_dict(state)  # names and shapes are exactly those of the libraries
    model.eval()
    with torch.inference_mode():
        z = model.backbone(latents)
        batch, _, height, width = z.shape
        z_hat, indices, _ = model.quantizer(z.permute(0, 2, 3, 1).reshape(batch, -1, m))
        again = model.quantizer.get_output_from_indices(indices)
    assert torch.equal(z_hat, again)
    out = {
        "z": z,
        "indices": indices.view(batch, height, width),
        "z_hat": z_hat.view(batch, height, width, m).permute(0, 3, 1, 2),
    }
    save_file({name: value.contiguous() for name, value in out.items()}, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
