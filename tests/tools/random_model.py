"""A model folder with random weights: every part of the codec in a few hundred kilobytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.transformer_config import TransformerConfig
from percov2.models.config import ModelConfig, Rate
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.text_encoder import HashedTextEncoder
from percov2.models.torch.flow import build_flow
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import save_component

RATES = (Rate("fine", 16, 64), Rate("coarse", 32, 300))
FLOW = {"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16}
FLOW |= {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
FLOW |= {"joint_attention_dim": 8, "caption_projection_dim": 16}
FLOW |= {"pooled_projection_dim": 8, "pos_embed_max_size": 16}
"""The smallest flow transformer that trains."""


def build(folder: Path, seed: int = 0, rates: tuple[Rate, ...] = RATES, layers: int = 2) -> Path:
    """Write a random model, by default with two rates of unlike codebooks; returns the folder."""
    torch.manual_seed(seed)
    config = ModelConfig("random", rates, rates[0].name, steps=2, guidance=1.5, window=16)
    config.save(folder)
    autoencoder = PatchAutoencoder(16, (8, 16), (1, 1), (1, 1))
    save_component(autoencoder, folder / "autoencoder", "float16")
    sizes = {**FLOW, "sample_size": 16, "pos_embed_max_size": 32}
    flow = build_flow(8, **sizes, qk_norm="rms_norm")
    # A new flow ignores z_hat; here the tokens must have a say in the picture.
    torch.nn.init.normal_(flow.pos_embed.proj.weight, std=0.2)
    save_component(flow, folder / "flow", "int8")
    save_component(HashedTextEncoder(64, 8, 4), folder / "text_encoder", "float16")
    for i, rate in enumerate(rates):
        home = folder / rate.name
        hyper = HyperEncoder(16, 8, 16, rate.token_side // 8)
        save_component(hyper, home / "hyper_encoder", "float16")
        quantizer = VectorQuantizer(16, rate.codebook_size, 8, 8)
        save_component(quantizer, home / "quantizer", "float32")
        sizes = TransformerConfig(
            rate.codebook_size, dim=16, heads=2, head_dim=8, layers=layers, hidden=32
        )
        IntTransformer.random(sizes, seed + i).save(home / "entropy")
    return folder


def with_entropy(model: Path, run: Path, folder: Path) -> Path:
    """A copy of that model whose rate "fine" has the entropy model of a training run."""
    shutil.copytree(model, folder, ignore=lambda home, _: ["entropy"] * (Path(home).name == "fine"))
    shutil.copytree(run / "entropy", folder / "fine" / "entropy")
    return folder
