"""The trained networks on Stable Diffusion 3: hyper-encoder, quantizer and flow of one rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from percov2.models.backbone import BackboneOptions
from percov2.models.config import LATENT_SIDE, Rate
from percov2.models.sd3.base import SD3Folder
from percov2.models.torch.flow import upsample_z_hat, widen_patch_embedding
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.placement import load_part
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.training.lora import add_low_rank
from percov2.training.settings import constructed

__all__ = ["SD3Config", "SD3Networks"]

MODES = ("full", "lora", "patch_embedding")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class SD3Config:
    """The configuration of stage 1 on SD3.

    Raises:
        ValueError: a setting is outside its range.
    """

    base: str  # hub id or folder of the base model
    rate: Rate  # name, token_side in pixels, codebook_size
    # Trained part of the transformer: "full", "lora" (with the patch embedding), or
    # "patch_embedding". Hyper-encoder and quantizer always learn.
    trained: str = "full"
    lora_rank: int = 32
    lora_alpha: float = 32.0  # low-rank updates have the factor alpha / rank
    lora_layers: tuple[str, ...] = ATTENTION  # last parts of the names of the updated linear maps
    hyper_encoder: dict[str, Any] = field(default_factory=dict)  # sizes of the HyperEncoder
    quantizer: dict[str, Any] = field(default_factory=dict)  # without ``codebook_size``
    batch: int = 64  # samples per optimiser step, over all processes and forward passes
    crop: int = 512  # side of the square crops in pixels
    longest: int = 768  # a photo's shorter side is scaled to crop … longest, at random
    caption_dropout: float = 0.1  # share of captions replaced by ""
    shift: float = 3.0  # SD3's timestep shift; a larger one puts more samples near t = 1
    lpips_weight: float = 0.0  # weight of LPIPS on the one-step estimate; 0 skips this loss
    vq_weight: float = 0.25  # weight of the commitment loss
    # Weight of the entropy of the soft code usage, which training increases. The entropy is
    # computed per forward pass and process, so it depends on the number of processes.
    spread_weight: float = 0.0
    codebook_decay: float = 0.97  # decay of the codebook's moving averages
    t5: bool = True  # condition on T5 too; without it, its part of the sequence is zero
    gradient_checkpointing: bool = True  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        if self.trained not in MODES:
            raise ValueError(f"trained must be one of {MODES}, not {self.trained!r}")
        self.rate.check()  # now, because the export after training would refuse it
        if self.crop % self.rate.token_side or self.crop % (2 * LATENT_SIDE):
            both = f"16 and of the token side {self.rate.token_side}"
            raise ValueError(f"crop must be a multiple of {both}, not {self.crop}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be 0 to 1, not {self.caption_dropout}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")


class SD3Networks(nn.Module):
    """The hyper-encoder, quantizer and widened transformer of one rate.

    Args:
        config: settings.
        precision: "no" or "bf16". "bf16" keeps frozen weights in bfloat16. Trained weights are
            always float32.
        folder: folder to which a relative path ``config.base`` refers.

    Raises:
        ValueError: the base model cannot be loaded, or settings do not match it.
    """

    def __init__(self, config: SD3Config, precision: str, folder: Path) -> None:
        super().__init__()
        self.config, self.precision, self.folder = config, precision, folder
        location = self.open_base("cpu").location
        stride, codes = config.rate.token_side // LATENT_SIDE, config.rate.codebook_size
        # With CompressAI's attention blocks.
        fixed = {"stride": stride, "rectified_attention": True}
        sizes = config.hyper_encoder
        self.hyper_encoder = constructed(HyperEncoder, "hyper_encoder", sizes, **fixed)
        sizes = config.quantizer
        self.quantizer = constructed(VectorQuantizer, "quantizer", sizes, codebook_size=codes)
        stored = {"torch_dtype": torch.float32, "use_safetensors": True}
        self.flow = load_part(SD3Transformer2DModel, location, "transformer", **stored)
        if config.trained != "full":
            self.flow.requires_grad_(False)
            if precision == "bf16":
                self.flow.to(torch.bfloat16)
        widen_patch_embedding(self.flow, int(self.quantizer.config["output_channels"]))
        self.flow.pos_embed.proj.float().requires_grad_(True)
        if config.trained == "lora":
            add_low_rank(self.flow, config.lora_layers, config.lora_rank, config.lora_alpha)
        if config.gradient_checkpointing:
            self.flow.enable_gradient_checkpointing()

    def open_base(self, device: str) -> SD3Folder:
        """Return the frozen networks of the base model on a device.

        They have the dtype of frozen weights.
        """
        dtype = "bf16" if self.precision == "bf16" else "fp32"
        options = BackboneOptions(dtype=dtype, t5=self.config.t5)
        return SD3Folder(self.folder, self.config.base, device, options)

    def stored_keys(self) -> set[str]:
        """Return the keys of ``state_dict()`` that training changes."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return trained | {f"quantizer.{name}" for name, _ in self.quantizer.named_buffers()}

    def velocity(
        self, noisy: Tensor, z_hat: Tensor, t: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the flow's velocity, float [B, 16, h, w].

        Args:
            noisy: x_t = (1 − t) · x_0 + t · noise, [B, 16, h, w].
            z_hat: [B, C, h', w'], on the token grid.
            t: [B] in 0 … 1.
            text: the sequence [B, L, d] and pooled [B, p] embeddings of the captions.
        """
        above = upsample_z_hat(z_hat, *noisy.shape[-2:])
        return self.flow(
            hidden_states=torch.cat([noisy, above.to(noisy.dtype)], 1),
            timestep=t * 1000,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            return_dict=False,
        )[0].float()
