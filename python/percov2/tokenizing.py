"""Pictures to token maps: the first half of compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.batching import by_group
from percov2.container.tokens_file import Tokens
from percov2.entropy.rans import as_array
from percov2.entropy.token_coder import TokenCoder
from percov2.images import pad
from percov2.models.backbone import Backbone
from percov2.models.config import Rate
from percov2.models.token_search import TokenSearch

__all__ = ["CaptionedSearch", "TokenChoice", "token_maps"]


_CANDIDATES = 16
"""Number of nearest codes that a position may choose from."""


@dataclass(frozen=True)
class TokenChoice:
    """Choice of the likeliest among the 16 nearest codes of a position.

    Attributes:
        coder: coder of the tokens.
        schedule: entropy schedule of the file.
        slack: largest loss of cosine similarity relative to the nearest code.
    """

    coder: TokenCoder
    schedule: str
    slack: float


@dataclass(frozen=True)
class CaptionedSearch:
    """Search for better directions than the hyper-encoder's.

    Attributes:
        run: the search, for one picture at a time.
        captions: captions that the decoder will see, one per picture; "" for none.
    """

    run: TokenSearch
    captions: Sequence[str]


def token_maps(
    model: Backbone,
    arrays: Sequence[NDArray[np.uint8]],
    rate: Rate,
    choice: TokenChoice | None = None,
    search: CaptionedSearch | None = None,
) -> list[Tokens]:
    """Return the tokens, int32 [h, w], of pictures uint8 [H, W, 3], padded to whole tokens.

    Without a choice, each position takes the code nearest to the direction of the hyper-encoder or
    the search.
    """
    padded = [pad(array, rate.token_side) for array in arrays]
    indices = range(len(arrays))

    def encode(group: list[int]) -> list[Tokens]:
        stacked = torch.from_numpy(np.stack([padded[i] for i in group]))
        pixels = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
        if choice is None and search is None:
            return list(model.encode_tokens(pixels, rate.name).cpu().numpy())
        if search is None:
            directions = model.directions(pixels, rate.name)
        else:
            images = zip(pixels.split(1), group, strict=True)
            directions = torch.cat([search.run(x, search.captions[i]) for x, i in images])
        quantizer = model.quantizer(rate.name)
        if choice is None:
            return list(quantizer.nearest(directions).cpu().numpy())
        tokens, similarities = quantizer.candidates(directions, _CANDIDATES)
        allowed = similarities >= similarities[..., :1] - choice.slack
        return list(as_array(choice.coder.choose(tokens, allowed, choice.schedule)))

    shapes = [array.shape for array in padded]
    sizes = [height * width // rate.token_side**2 for height, width, _ in shapes]
    return by_group(indices, shapes, sizes, encode)
