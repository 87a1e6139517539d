"""Parameters and memory of the backbone "sd3" at full size.

``python -m percov2.models.sd3.memory`` prints the tables of docs/reference/sd3.md. The networks are
built on torch's meta device from the base models' published configurations, without weights or
downloads.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from percov2.models.config import LATENT_SIDE, PAPER_RATES
from percov2.models.torch.flow import widen_patch_embedding
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer

__all__ = ["Z_CHANNELS", "networks", "parameters", "tables", "transformer"]

Z_CHANNELS = 320
"""M of the paper: channels of z_hat beside the 16 of the latents."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "stable-diffusion-3-medium": _MEDIUM,
    "stable-diffusion-3.5-medium": _MEDIUM
    | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}


def transformer(base: str) -> SD3Transformer2DModel:
    """Build the transformer of a base model, one of ``TRANSFORMERS``, on the meta device."""
    with torch.device("meta"):
        return SD3Transformer2DModel(**TRANSFORMERS[base])


def networks(base: str) -> dict[str, nn.Module]:
    """Build all networks of a base model, with the widened flow, on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    flow = transformer(base)
    with torch.device("meta"):
        widen_patch_embedding(flow, Z_CHANNELS)
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip_l = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
        )
        sizes = {"num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
        clip_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, **sizes)
        sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        t5 = T5Config(**sizes, feed_forward_proj="gated-gelu")
        return {
            "autoencoder": autoencoder,
            "flow transformer, widened": flow,
            "CLIP-L text encoder": CLIPTextModelWithProjection(clip_l),
            "CLIP-G text encoder": CLIPTextModelWithProjection(clip_g),
            "T5-XXL text encoder": T5EncoderModel(t5),
        }


def parameters(network: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def tables() -> str:
    """Return the tables of docs/reference/sd3.md in Markdown."""
    lines = []

    def cells(count: int) -> str:
        return f"{count:,} | " + " | ".join(f"{count * size / 1e9:.2f}" for size in BYTES.values())

    for base in TRANSFORMERS:
        plain = parameters(transformer(base))
        lines += [f"Base model {base} (its own transformer: {plain:,} parameters):", ""]
        lines += ["| network | parameters | " + " | ".join(f"{name}, GB" for name in BYTES) + " |"]
        lines += ["|---|" + "---:|" * (1 + len(BYTES))]
        counts = {name: parameters(network) for name, network in networks(base).items()}
        every = sum(counts.values())
        sums = {
            **counts,
            "**all**": every,
            "**all without T5-XXL**": every - counts["T5-XXL text encoder"],
            "**largest network (with offload)**": max(counts.values()),
        }
        lines += [*(f"| {name} | {cells(count)} |" for name, count in sums.items()), ""]
    lines += ["| rate | hyper-encoder | quantizer | both in fp32, MB |", "|---|---:|---:|---:|"]
    for rate in PAPER_RATES:
        with torch.device("meta"):
            hyper_encoder = HyperEncoder(16, 192, Z_CHANNELS, rate.token_side // LATENT_SIDE)
            quantizer = VectorQuantizer(Z_CHANNELS, rate.codebook_size, 32, Z_CHANNELS)
        one, two = parameters(hyper_encoder), parameters(quantizer) + quantizer.codebook.numel()
        lines.append(f"| {rate.name} | {one:,} | {two:,} | {4 * (one + two) / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
