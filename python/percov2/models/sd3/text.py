"""Captions as Stable Diffusion 3 reads them: CLIP-L, CLIP-G and T5-XXL.

The sequence is [77 CLIP positions | 256 T5 positions]. The channels of the two CLIPs are
concatenated and padded with zeros to T5's width. The pooled vector joins both CLIPs' projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from percov2.caching import remembered
from percov2.models.torch.placement import Placement, load_part

__all__ = ["T5_TOKENS", "CaptionEmbedder", "TextNetworks", "load_text_networks"]

T5_TOKENS = 256
_REMEMBERED = 32
"""Number of cached caption embeddings; one takes 2.7 MB in bfloat16 with SD3's sizes."""


class TextNetworks(NamedTuple):
    """Tokenizers and encoders in SD3's order: CLIP-L, CLIP-G, T5; those of T5 may be None."""

    tokenizers: tuple[Any, Any, Any]
    encoders: tuple[Any, Any, Any]


def load_text_networks(location: str, place: Placement, t5: bool) -> TextNetworks:
    """Load the text encoders of a base model; ValueError if one cannot be loaded."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    def load(kind: Any, suffix: str) -> tuple[Any, Any]:
        tokenizer = load_part(
            AutoTokenizer, location, "tokenizer" + suffix, trust_remote_code=False
        )
        form = {"dtype": place.dtype, "use_safetensors": True}
        return tokenizer, place.settle(load_part(kind, location, "text_encoder" + suffix, **form))

    pairs = [load(CLIPTextModelWithProjection, suffix) for suffix in ("", "_2")]
    try:
        pairs.append(load(T5EncoderModel, "_3") if t5 else (None, None))
    except ValueError as error:
        raise ValueError(f"{error} (t5=False or --no-t5 omits it)") from error
    return TextNetworks(*zip(*pairs, strict=True))


class CaptionEmbedder:
    """A cached embedder of captions.

    ``networks`` returns the tokenizers and encoders; it is called on first use.
    """

    def __init__(self, networks: Callable[[], TextNetworks], place: Placement) -> None:
        self._networks, self._place = networks, place
        self._known = remembered(self._embed, _REMEMBERED)

    def __call__(self, captions: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
        """Return sequence [B, 77 + 256, width] and pooled [B, p] embeddings of captions.

        Texts are embedded one at a time, so that an embedding does not depend on its batch.
        ``width`` is the transformer's ``joint_attention_dim``.
        """
        found = [self._known(caption, width) for caption in captions]
        return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

    def _embed(self, caption: str, width: int) -> tuple[Tensor, Tensor]:
        networks = self._networks()
        length = networks.tokenizers[0].model_max_length
        *clips, t5_networks = zip(*networks, strict=True)
        outputs = [self._run(*clip, caption, length, output_hidden_states=True) for clip in clips]
        # SDXL and SD3 read CLIP's last but one layer.
        clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5 = clip.new_zeros(1, T5_TOKENS, width)
        if networks.encoders[2] is not None:
            t5 = self._run(*t5_networks, caption, T5_TOKENS)[0].to(clip)
        return torch.cat([clip, t5], -2), torch.cat([output[0] for output in outputs], -1)

    def _run(self, tokenizer: Any, encoder: Any, caption: str, length: int, **options: Any) -> Any:
        form = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer([caption], max_length=length, **form).input_ids.to(self._place.device)
        with self._place.at_work(encoder):
            return encoder(ids, **options)
