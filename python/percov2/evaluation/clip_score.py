"""CLIP score of pictures and captions, and the likeness of two pictures in CLIP's eyes.

The score is 100·max(cos, 0) of the embeddings of picture and caption, as torchmetrics defines it.
Hessel et al. 2021 (arXiv 2104.08718) define 2.5·max(cos, 0). The networks are those of
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from percov2.evaluation.setting import network_title
from percov2.extras import require

__all__ = ["CaptionScores", "Clip"]

Pixels = NDArray[np.uint8]
DEFAULT_MODEL = "openai/clip-vit-large-patch14"
"""Default model of torchmetrics."""


@dataclass(frozen=True)
class CaptionScores:
    """CLIP scores of pictures and captions.

    Attributes:
        values: 100·max(cos, 0) of each pair, float64 [N].
        truncated: True for each caption that was too long for the model, [N].
    """

    values: NDArray[np.float64]
    truncated: NDArray[np.bool_]

    @property
    def mean(self) -> float:
        """Return the mean score."""
        return float(self.values.mean())


class Clip:
    """A CLIP model of transformers.

    Args:
        location: a model's name on the hub or its folder, with its processor.
        device: device of the model.
        batch_size: number of pictures or captions per call of the model.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: the model cannot be loaded.
    """

    def __init__(
        self, location: str = DEFAULT_MODEL, device: str = "cpu", batch_size: int = 32
    ) -> None:
        require("eval", "the CLIP score", "torch", "transformers")
        from transformers import CLIPModel, CLIPProcessor

        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        try:
            network = CLIPModel.from_pretrained(location, dtype=torch.float32)
            self._processor: Any = CLIPProcessor.from_pretrained(location)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"cannot load the CLIP model {location}: {error}") from error
        self._network: Any = network.to(device).eval()
        self.title = network_title(str(location), network)
        self.device, self.batch_size = device, batch_size
        self.max_tokens = int(network.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def images(self, pictures: Pixels | Sequence[Pixels]) -> NDArray[np.float32]:
        """Return the embeddings of pictures, uint8 [H, W, 3] of any sizes: [N, D] of length 1."""
        found = []
        for start in range(0, len(pictures), self.batch_size):
            part = [Image.fromarray(x) for x in pictures[start : start + self.batch_size]]
            inputs = self._processor.image_processor(images=part, return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device)
            pooled = self._network.vision_model(pixel_values=pixels).pooler_output
            found.append(_unit(self._network.visual_projection(pooled)))
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the embeddings of captions, [N, D] of length 1, and which captions were cut.

        A caption with more tokens than the model takes loses the tokens before its end token, as in
        OpenAI's ``tokenize(truncate=True)``. torchmetrics also removes the end token.
        """
        found = []
        truncated = np.zeros(len(captions), dtype=np.bool_)
        tokenizer = self._processor.tokenizer
        for start in range(0, len(captions), self.batch_size):
            part = list(captions[start : start + self.batch_size])
            whole = tokenizer(part, verbose=False)["input_ids"]
            truncated[start : start + len(part)] = [len(ids) > self.max_tokens for ids in whole]
            inputs = tokenizer(
                part,
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            pooled = self._network.text_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
            found.append(_unit(self._network.text_projection(pooled)))
        return torch.cat(found).numpy(), truncated

    def scores(self, pictures: Pixels | Sequence[Pixels], captions: Sequence[str]) -> CaptionScores:
        """Return the CLIP score of each picture with its caption.

        Raises ValueError if their numbers differ or are 0.
        """
        _check_numbers(len(pictures), len(captions))
        words, truncated = self.captions(captions)
        cosines = _cosines(self.images(pictures), words)
        return CaptionScores(100 * cosines.clip(min=0), truncated)

    def likeness(
        self, originals: Pixels | Sequence[Pixels], restored: Pixels | Sequence[Pixels]
    ) -> NDArray[np.float64]:
        """Return the cosine of each original's and its restored picture's embedding, [N].

        Raises ValueError if their numbers differ or are 0.
        """
        _check_numbers(len(originals), len(restored))
        return _cosines(self.images(originals), self.images(restored))

    def describe(self) -> str:
        """Return the definition of the measures with the model and the versions, for reports."""
        import transformers

        return (
            "CLIP score of picture and caption: 100·max(cos, 0), the definition of torchmetrics, "
            "clipped per pair (Hessel et al. 2021 use the factor 2.5); captions cut to "
            f"{self.max_tokens} tokens. CLIP likeness: cosine of original and restored picture. "
            f"Model: {self.title}, float32, "
            f"{type(self._processor.image_processor).__name__}. "
            f"transformers {transformers.__version__}, torch {torch.__version__}."
        )


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1).cpu()


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    return (a.astype(np.float64) * b).sum(1)


def _check_numbers(one: int, other: int) -> None:
    if one != other or not one:
        raise ValueError(f"{one} and {other} inputs do not pair")
