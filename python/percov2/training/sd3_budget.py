"""What a run on Stable Diffusion 3 needs: memory and time, from networks without weights.

Parameters and floating-point operations are counted on torch's meta device. Memory of activations
and all times are estimates; nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from percov2.models import sd3_memory
from percov2.models.flow import widen_patch_embedding
from percov2.models.hyper_encoder import HyperEncoder
from percov2.models.model_config import LATENT_SIDE
from percov2.models.quantizer import VectorQuantizer
from percov2.models.sd3_text import T5_TOKENS
from percov2.training.loop import LoopConfig
from percov2.training.lora import add_low_rank
from percov2.training.sd3_networks import SD3Config

_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Budget:
    """Needs of one process with ``per_pass`` samples per forward pass.

    Attributes:
        parameters: per network, and of those the trained ones.
        trained: trained parameters.
        memory: bytes per use, on each device.
        flops: floating-point operations per sample and use, training included (one multiply-add
            counts as two).
    """

    parameters: dict[str, int]
    trained: int
    memory: dict[str, int]
    flops: dict[str, float]

    def hours(self, samples: int, processes: int, sustained: float) -> float:
        """Estimated hours: samples · FLOP per sample / (processes · sustained FLOP/s · 3600)."""
        return samples * sum(self.flops.values()) / (processes * sustained * 3600)


def _base_name(config: SD3Config) -> str:
    name = config.base.rpartition("/")[2].removesuffix("-diffusers")
    if name not in sd3_memory.TRANSFORMERS:
        known = ", ".join(sd3_memory.TRANSFORMERS)
        raise ValueError(f"the sizes of {config.base} are not known here; those of {known} are")
    return name


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def _saved_bytes(call: Callable[[], object], skip_squares_of: int = 0) -> int:
    """Bytes of activations that a forward pass keeps for its backward pass.

    Args:
        skip_squares_of: leave out [.., n, n], which fused attention never stores.
    """
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        square = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] == skip_squares_of
        if not isinstance(tensor, nn.Parameter) and tensor.grad_fn is not None and not square:
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(seen.values())


def budget(config: SD3Config, loop: LoopConfig, processes: int) -> Budget:
    """Memory and operations of a configuration.

    Raises:
        ValueError: when the batch cannot be divided among the processes, or the base model's sizes
            are not known.
    """
    if config.batch % (processes * loop.accumulate):
        raise ValueError(
            f"a batch of {config.batch} cannot be divided among {processes} processes and "
            f"{loop.accumulate} forward passes"
        )
    per_pass = config.batch // (processes * loop.accumulate)
    frozen_bytes = 2 if loop.precision == "bf16" else 4
    stride = config.rate.token_side // LATENT_SIDE
    name = _base_name(config)
    networks = sd3_memory.networks(name)
    autoencoder, flow = networks.pop("autoencoder"), sd3_memory.transformer(name)
    assert isinstance(autoencoder, AutoencoderKL)
    with torch.device("meta"):
        hyper_encoder = HyperEncoder(
            stride=stride, rectified_attention=True, **config.hyper_encoder
        )
        quantizer = VectorQuantizer(codebook_size=config.rate.codebook_size, **config.quantizer)
        widen_patch_embedding(flow, int(quantizer.config["output_channels"]))
        if config.trained != "full":
            flow.requires_grad_(False)
            flow.pos_embed.proj.requires_grad_(True)
        base_parameters = _count(flow)
        if config.trained == "lora":
            add_low_rank(flow, config.lora_layers, config.lora_rank, config.lora_alpha)
    text = {
        key: _count(network)
        for key, network in networks.items()
        if key.endswith("text encoder") and (config.t5 or not key.startswith("T5"))
    }
    ours = _count(hyper_encoder) + _count(quantizer)
    flow_trained = _count(flow, trained=True)
    parameters = {
        "flow transformer": base_parameters,
        "low-rank updates": _count(flow) - base_parameters,
        "hyper-encoder and quantizer": ours,
        "autoencoder": _count(autoencoder),
        **text,
    }
    trained = flow_trained + ours
    frozen = _count(flow) - flow_trained + _count(autoencoder) + sum(text.values())
    memory = {
        "frozen weights": frozen_bytes * frozen,
        "trained weights, float32": 4 * trained,
        "gradients": 4 * trained,
        "gradients being exchanged": 4 * trained if processes > 1 else 0,
        "AdamW": 8 * trained,
        "averages": 4 * trained,
    }
    memory.update(_activations(config, flow, hyper_encoder, autoencoder, per_pass))
    flops = _operations(config, flow, hyper_encoder, autoencoder)
    flops["text encoders"] = 2.0 * sum(
        count * (T5_TOKENS if key.startswith("T5") else _CLIP_TOKENS) for key, count in text.items()
    )
    return Budget(parameters, trained, memory, flops)


def _flow_inputs(config: SD3Config, flow: SD3Transformer2DModel) -> dict[str, Tensor]:
    side = config.crop // LATENT_SIDE
    sizes = flow.config
    return {
        "hidden_states": torch.empty(1, sizes["in_channels"], side, side, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(
            1, _CLIP_TOKENS + T5_TOKENS, sizes["joint_attention_dim"], device="meta"
        ),
        "pooled_projections": torch.empty(1, sizes["pooled_projection_dim"], device="meta"),
    }


def _operations(
    config: SD3Config,
    flow: SD3Transformer2DModel,
    hyper_encoder: HyperEncoder,
    autoencoder: AutoencoderKL,
) -> dict[str, float]:
    side = config.crop // LATENT_SIDE
    picture = torch.empty(1, 3, config.crop, config.crop, device="meta")
    latents = torch.empty(1, 16, side, side, device="meta")
    again = 1 if config.gradient_checkpointing else 0
    forward = _flops(lambda: flow(**_flow_inputs(config, flow)))
    # Backward: one pass for gradients of activations, one for those of weights that are trained.
    factor = (3 if config.trained == "full" else 2) + again
    decoder = _flops(lambda: autoencoder.decode(latents)) if config.lpips_weight else 0.0
    return {
        f"flow transformer: {factor} x forward": factor * forward,
        "hyper-encoder: 3 x forward": 3 * _flops(lambda: hyper_encoder(latents)),
        "autoencoder's encoder": _flops(lambda: autoencoder.encode(picture)),
        f"autoencoder's decoder for LPIPS: {2 + again} x forward": (2 + again) * decoder,
    }


def _activations(
    config: SD3Config,
    flow: SD3Transformer2DModel,
    hyper_encoder: HyperEncoder,
    autoencoder: AutoencoderKL,
    per_pass: int,
) -> dict[str, int]:
    """Bytes kept for the backward passes; 2 per number in flow and decoder, 4 elsewhere."""
    side = config.crop // LATENT_SIDE
    latents = torch.empty(1, 16, side, side, device="meta", requires_grad=True)
    ours = _saved_bytes(lambda: hyper_encoder(latents))
    width = flow.inner_dim
    tokens = (side // 2) ** 2
    words = _CLIP_TOKENS + T5_TOKENS

    def run(block: nn.Module) -> object:
        return block(
            torch.empty(1, tokens, width, device="meta", requires_grad=True),
            torch.empty(1, words, width, device="meta", requires_grad=True),
            torch.empty(1, width, device="meta", requires_grad=True),
        )

    # Counted as float32; fused attention never stores its tokens-by-tokens weights.
    blocks = [
        _saved_bytes(partial(run, block), tokens + words) // 2 for block in flow.transformer_blocks
    ]
    inputs = 2 * (tokens + words) * width
    kept_inputs = len(blocks) * inputs + max(blocks)
    in_flow = kept_inputs if config.gradient_checkpointing else sum(blocks)
    result = {
        "activations of hyper-encoder (estimate)": per_pass * ours,
        "activations of flow (estimate)": per_pass * in_flow,
    }
    if config.lpips_weight:
        result["activations of decoder for LPIPS (estimate)"] = per_pass * _in_decoder(
            config, autoencoder, latents
        )
    return result


def _in_decoder(config: SD3Config, autoencoder: AutoencoderKL, latents: Tensor) -> int:
    decoder = autoencoder.decoder
    x = decoder.conv_in(latents)
    kept: list[int] = []
    inputs = 0
    for block in (decoder.mid_block, *decoder.up_blocks):
        kept.append(_saved_bytes(partial(block, x)) // 2)
        inputs += 2 * x.numel()
        x = block(x).detach().requires_grad_()
    return inputs + max(kept) if config.gradient_checkpointing else sum(kept)


def report(
    found: Budget, config: SD3Config, loop: LoopConfig, processes: int, sustained: float
) -> str:
    """The budget of a configuration as text; ``sustained`` is one device's FLOP/s."""
    per_pass = config.batch // (processes * loop.accumulate)
    samples = config.batch * loop.steps
    lines = [
        f"{config.base}, rate {config.rate.name}, trained: {config.trained}; {processes} processes "
        f"x {loop.accumulate} forward passes x {per_pass} crops of {config.crop} x {config.crop}",
        "",
        "Parameters (counted)",
        *(f"  {name:50} {count / 1e6:12.1f} M" for name, count in found.parameters.items()),
        f"  {'trained':50} {found.trained / 1e6:12.1f} M",
        "",
        "Memory per device",
        *(f"  {name:50} {size / 2**30:12.2f} GiB" for name, size in found.memory.items()),
        f"  {'sum':50} {sum(found.memory.values()) / 2**30:12.2f} GiB",
        "",
        "Operations per sample (counted on forward passes, multiplied as named)",
        *(f"  {name:50} {count / 1e12:12.2f} TFLOP" for name, count in found.flops.items()),
        f"  {'sum':50} {sum(found.flops.values()) / 1e12:12.2f} TFLOP",
        "",
        f"Time (estimate): {samples} samples x {sum(found.flops.values()) / 1e12:.2f} TFLOP / "
        f"({processes} x {sustained / 1e12:.0f} TFLOP/s x 3600 s) = "
        f"{found.hours(samples, processes, sustained):.1f} hours",
    ]
    return "\n".join(lines)
