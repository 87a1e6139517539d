"""A Stable Diffusion 3 with random weights in diffusers' layout, and a percov2 folder on it.

All classes are those of the real model, with three text encoders; only the sizes are tiny.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from percov2.entropy.uniform import uniform_model
from percov2.models.config import ModelConfig, Rate
from percov2.models.sd3.flow import save_delta
from percov2.models.torch.flow import widen_patch_embedding
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import save_component
from tools.random_model import FLOW

RATES = (Rate("r0313", 16, 256), Rate("r0938", 8, 64), Rate("r0020", 64, 256))
Z_CHANNELS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, as CLIP's own vocabulary has them: inside and at the end of a word."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    return CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Letters as tokens, with scores as T5's own vocabulary has them."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer([*words, *((c, -3.0) for c in LETTERS)], extra_ids=0, model_max_length=64)


CLIP = {"vocab_size": 54, "intermediate_size": 16, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VAE = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
VAE |= {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def clip_encoder(width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(hidden_size=width, projection_dim=width, **CLIP)
    return CLIPTextModelWithProjection(config).eval()


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def transformer() -> SD3Transformer2DModel:
    sizes = {"num_layers": 2, "joint_attention_dim": 32, "pooled_projection_dim": 20}
    model = SD3Transformer2DModel(**FLOW | sizes | {"pos_embed_max_size": 24})
    # A new one ends in zeros; here what goes in must come out.
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    return model.eval()


def autoencoder() -> AutoencoderKL:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    numbers = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return AutoencoderKL(**VAE, **numbers, **plain).eval()


def pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """The whole base model."""
    torch.manual_seed(seed)
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_encoder(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def build(folder: Path, seed: int = 0, rates: tuple[Rate, ...] = RATES) -> Path:
    """Write the base model to ``folder/base`` and our parts to ``folder/model``, which is returned.

    Its flow is a delta: the base's transformer with a widened patch embedding that heeds z_hat.
    """
    base = pipeline(seed)
    base.save_pretrained(folder / "base")
    model = folder / "model"
    kind = {"prediction": "velocity", "backbone": "sd3", "base": "../base"}
    ModelConfig("random-sd3", rates, rates[0].name, steps=2, guidance=2.0, **kind).save(model)
    widened = base.transformer
    widen_patch_embedding(widened, Z_CHANNELS)
    torch.nn.init.normal_(widened.pos_embed.proj.weight, std=0.2)
    state = widened.state_dict()
    names = ("pos_embed.proj.weight", "pos_embed.proj.bias")
    save_delta({name: state[name] for name in names}, 1.0, model / "flow")
    for rate in rates:
        home = model / rate.name
        hyper_encoder = HyperEncoder(16, 8, 16, rate.token_side // 8, rectified_attention=True)
        save_component(hyper_encoder, home / "hyper_encoder", "float16")
        quantizer = VectorQuantizer(16, rate.codebook_size, 8, Z_CHANNELS)
        save_component(quantizer, home / "quantizer", "float32")
        uniform_model(rate.codebook_size).save(home / "entropy")
    return model
