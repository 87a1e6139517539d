"""Captions as Stable Diffusion 3 reads them: CLIP-L, CLIP-G and T5-XXL.

The sequence is [77 CLIP positions | 256 T5 positions]. The channels of the two CLIPs are
concatenated and padded with zeros to T5's width. The pooled vector joins both CLIPs' projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from percov2.models.placement import Placement, load_part

__all__ = ["T5_TOKENS", "CaptionEmbedder", "TextNetworks", "load_text_networks"]


T5_TOKENS = 256
_REMEMBERED = 32
"""Number of cached caption embeddings; one takes 2.7 MB in bfloat16 with SD3's sizes."""


@dataclass
class TextNetworks:
    """Tokenizers and encoders in SD3's order: CLIP-L, CLIP-G, T5; those of T5 may be None."""

    tokenizers: tuple[Any, Any, Any]
    encoders: tuple[Any, Any, Any]


def load_text_networks(location: str, place: Placement, t5: bool) -> TextNetworks:
    """Load the text encoders of a base model.

    Raises:
        ValueError: one cannot be loaded; for T5 the message names the option that omits it.
    """
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    kinds = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
    tokenizers: list[Any] = [None] * 3
    encoders: list[Any] = [None] * 3
    for i, (kind, suffix) in enumerate(zip(kinds, ("", "_2", "_3"), strict=True)):
        if i == 2 and not t5:
            break
        try:
            tokenizers[i] = load_part(
                AutoTokenizer, location, "tokenizer" + suffix, trust_remote_code=False
            )
            encoder = load_part(
                kind, location, "text_encoder" + suffix, dtype=place.dtype, use_safetensors=True
            )
        except ValueError as error:
            if i == 2:
                raise ValueError(f"{error} (t5=False or --no-t5 omits it)") from error
            raise
        encoders[i] = place.settle(encoder)
    return TextNetworks(
        (tokenizers[0], tokenizers[1], tokenizers[2]), (encoders[0], encoders[1], encoders[2])
    )


class CaptionEmbedder:
    """A cached embedder of captions.

    Args:
        networks: returns the tokenizers and encoders; called on first use.
        at_work: context in which an encoder is on the device.
        device: device of the running encoders and of the embeddings.
    """

    def __init__(
        self,
        networks: Callable[[], TextNetworks],
        at_work: Callable[[nn.Module], AbstractContextManager[None]],
        device: torch.device | str,
    ) -> None:
        self._networks, self._at_work, self._device = networks, at_work, device
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, captions: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
        """Return sequence [B, 77 + 256, width] and pooled [B, p] embeddings of captions.

        Texts are embedded one at a time, so that an embedding does not depend on its batch.

        Args:
            captions: one per image, "" for none.
            width: channels of the sequence, ``joint_attention_dim`` of the transformer.
        """
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self._embed(caption, width)
        found = [self._known[caption] for caption in captions]
        for caption in list(self._known)[: max(0, len(self._known) - _REMEMBERED)]:
            del self._known[caption]
        return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

    def _embed(self, caption: str, width: int) -> tuple[Tensor, Tensor]:
        networks = self._networks()
        length = networks.tokenizers[0].model_max_length
        sequences, pooled = [], []
        for tokenizer, encoder in zip(networks.tokenizers[:2], networks.encoders[:2], strict=True):
            with self._at_work(encoder):
                output = encoder(self._ids(tokenizer, caption, length), output_hidden_states=True)
            pooled.append(output[0])
            # SDXL and SD3 read CLIP's last but one layer.
            sequences.append(output.hidden_states[-2])
        clip = torch.cat(sequences, -1)
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5 = clip.new_zeros(1, T5_TOKENS, width)
        tokenizer, encoder = networks.tokenizers[2], networks.encoders[2]
        if encoder is not None:
            with self._at_work(encoder):
                t5 = encoder(self._ids(tokenizer, caption, T5_TOKENS))[0].to(clip)
        return torch.cat([clip, t5], -2), torch.cat(pooled, -1)

    def _ids(self, tokenizer: Any, caption: str, length: int) -> Tensor:
        words = tokenizer(
            [caption],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return words.input_ids.to(self._device)
