"""Checkpoints in PerCo (SD v2.1)'s published layout, with random weights and tiny sizes.

All classes are those of Stable Diffusion 2.1 and its configs differ only in sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from oracles import reference_perco as reference
from tools.random_sd3 import CLIP, VAE, clip_tokenizer

SIZES = {"n": 8, "m": 12, "codes": 256, "dim": 4}
GRIDS = (64, 32, 8)
"""Tokens per side of 512 pixels at the three published rates."""
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_base(folder: Path, seed: int = 0) -> None:
    """Autoencoder, text encoder, tokenizer and scheduler."""
    torch.manual_seed(seed)
    AutoencoderKL(sample_size=768, latent_channels=4, **VAE).save_pretrained(folder / "vae")
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=16, **CLIP))
    encoder.save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")


def plain_unet(seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion's network, before it reads z_hat."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=96,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 2),
        cross_attention_dim=16,
        use_linear_projection=True,
    ).eval()


def save_unet(folder: Path, seed: int = 0) -> None:
    """The published network: both first convolutions, ``in_channels`` still 4."""
    unet = plain_unet(seed)
    unet.conv_in_extended = nn.Conv2d(4 + SIZES["m"], 8, 3, padding=1)
    unet.save_pretrained(folder)


def save_state(state: dict[str, Tensor], folder: Path) -> None:
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


def save_checkpoint(folder: Path, grid: int, seed: int = 0) -> Path:
    """hyper_enc/ and unet/."""
    home = folder / "hyper_enc"
    home.mkdir(parents=True)
    config = {
        "_class_name": "HyperEncoder",
        "_diffusers_version": "0.27.0",
        "M": SIZES["m"],
        "N": SIZES["n"],
        "cfg_cs": SIZES["codes"],
        "cfg_ss": grid,
        "codebook_dim": SIZES["dim"],
        "in_channels": 4,
    }
    (home / "config.json").write_text(json.dumps(config))
    save_state(reference.random_state(grid, **SIZES, seed=seed), home)
    save_unet(folder / "unet", seed)
    return folder


def save_pipeline(folder: Path, grid: int, seed: int = 0) -> Path:
    """A whole pipeline, as the original's training saves it."""
    save_checkpoint(folder, grid, seed)
    save_base(folder)
    index = {"_class_name": "StableDiffusionPipelinePerco", "_diffusers_version": "0.27.0"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
