"""Effect of captions: the right caption against another photo's, on the same crops and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from percov2.codec import Codec
from percov2.evaluation.gallery import Cell
from percov2.evaluation.modes import require_captioned
from percov2.images import from_unit_range, to_unit_range
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.torch.flow import estimate_clean
from percov2.models.torch.perceptual import LPIPS

__all__ = ["caption_effect", "caption_pictures", "other_captions", "paired_interval"]

TIMES = (0.25, 0.5, 0.75, 1.0)
"""Noise levels of the flow loss; 1 is pure noise."""
_BATCH = 8
_RESAMPLES = 10_000


def paired_interval(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % interval: (mean, low, high).

    The interval holds the percentiles of 10,000 bootstrap resamples. Raises ValueError for fewer
    than two numbers.

    >>> paired_interval(np.full(9, 0.5))
    (0.5, 0.5, 0.5)
    """
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError(f"differences have shape {differences.shape}; give two or more numbers")
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(differences), (_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[picks].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def other_captions(captions: Sequence[str]) -> list[str]:
    """Return, for each crop, the caption of the crop half the list away."""
    half = len(captions) // 2
    return [*captions[half:], *captions[:half]]


def caption_effect(
    codec: Codec,
    crops: NDArray[np.uint8],
    captions: Sequence[str],
    rate: str,
    steps: int | None = None,
    guidance: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure flow loss and LPIPS-VGG with the right captions and with captions of other crops.

    The flow loss is the mean square error of the estimated clean latents, averaged over ``TIMES``.
    Both captions use the same noise. Other captions come from ``other_captions``, so crops of one
    photo must not be N // 2 apart.

    Args:
        crops: crops of held-out photos, uint8 [N, S, S, 3]; S is a multiple of the token side.
        captions: one non-empty caption per crop.

    Returns:
        The settings, and one dict each under "flow_loss" and "lpips_vgg". Each dict has the means
        "right" and "shuffled", their difference "gain" (shuffled - right), and the 95 % "interval"
        [low, high] of the gain.

    Raises:
        ValueError: crops that do not match the captions, or a backbone other than "tiny".
        MetricWeightsMissing: the weights of LPIPS are not installed.
    """
    model = codec.model
    if not isinstance(model, TinyTorchModel):
        raise ValueError("the flow loss needs a small model on torch: open it with runtime='torch'")
    require_captioned(crops, captions)
    if len(crops) < 2 or not all(captions):
        raise ValueError("give at least two crops, each with a caption")
    shuffled = other_captions(captions)
    steps, guidance = _sampling(codec, rate, steps, guidance)
    network = LPIPS("vgg")
    found: dict[str, list[list[Tensor]]] = {"flow_loss": [[], []], "lpips_vgg": [[], []]}
    photos = torch.from_numpy(to_unit_range(crops))
    for begin in tqdm(range(0, len(crops), _BATCH), desc=rate, disable=not progress):
        part = slice(begin, begin + _BATCH)
        tokens = model.encode_tokens(photos[part], rate)
        with torch.inference_mode():
            target = network.features(photos[part])
            for i, texts in enumerate((captions[part], shuffled[part])):
                loss = _flow_loss(model, photos[part], tokens, rate, texts)
                found["flow_loss"][i].append(loss)
                pixels = model.reconstruct(tokens, rate, texts, steps, guidance, begin)
                distance = network.distance(network.features(pixels.cpu().float()), target)
                found["lpips_vgg"][i].append(distance)
    sizes = {"crops": len(crops), "side": crops.shape[1]}
    result: dict[str, Any] = {"rate": rate, **sizes, "steps": steps, "guidance": guidance}
    for name, parts in found.items():
        right, other = (torch.cat(kind).double().numpy() for kind in parts)
        mean, low, high = paired_interval(other - right)
        means = {"right": float(right.mean()), "shuffled": float(other.mean())}
        result[name] = {**means, "gain": mean, "interval": [low, high]}
    return result


def _sampling(
    codec: Codec, rate: str, steps: int | None, guidance: float | None
) -> tuple[int, float]:
    """Return steps and guidance, those of the rate and the model if None."""
    steps = codec.config.default_steps(rate) if steps is None else steps
    return steps, codec.config.guidance if guidance is None else guidance


def caption_pictures(
    codec: Codec,
    crops: NDArray[np.uint8],
    captions: Sequence[str],
    others: Sequence[str],
    rate: str,
    steps: int | None = None,
    guidance: float | None = None,
) -> list[list[Cell]]:
    """Return a row per crop: the crop, and its pictures restored with three captions (Fig. 9).

    The captions are none, the crop's own and one of ``others``. See ``caption_effect`` for the
    arguments; one crop is enough.
    """
    steps, guidance = _sampling(codec, rate, steps, guidance)
    rows = []
    for crop, right, other in zip(crops, captions, others, strict=True):
        tokens = codec.model.encode_tokens(to_unit_range(crop[None]), rate)
        row: list[Cell] = [("original", Image.fromarray(crop))]
        for text in ("", right, other):
            pixels = codec.model.reconstruct(tokens, rate, [text], steps, guidance, 0)
            picture = Image.fromarray(from_unit_range(pixels)[0].copy())
            row.append((text or "no caption", picture))
        rows.append(row)
    return rows


def _flow_loss(
    model: TinyTorchModel, photos: Tensor, tokens: Tensor, rate: str, captions: Sequence[str]
) -> Tensor:
    """Return the error of the estimated clean latents, [B], averaged over TIMES."""
    photos = photos.to(model.device).contiguous(memory_format=torch.channels_last)
    latents = model.autoencoder.encode(photos).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    z_hat = model.z_hat(tokens, rate)
    words = model.conditioning(captions, model.config.chosen_realism(rate, None))
    losses = []
    for t in TIMES:
        times = torch.full((len(latents),), t, device=latents.device)
        noisy = (1 - t) * latents + t * noise
        clean = estimate_clean(model.flow, noisy, z_hat, times, words, model.config.prediction)
        losses.append((clean.float() - latents).square().mean((1, 2, 3)))
    return torch.stack(losses).mean(0).cpu()
