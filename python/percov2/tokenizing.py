"""Pictures to token maps: the first half of compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from percov2.batching import by_group
from percov2.container.tokens_file import Tokens
from percov2.entropy.rans import as_array
from percov2.entropy.token_coder import TokenCoder
from percov2.images import pad, to_unit_range
from percov2.models.backbone import Backbone
from percov2.models.config import Rate

__all__ = ["ArraySearch", "CaptionedSearch", "TokenChoice", "token_maps"]


ArraySearch: TypeAlias = Callable[[NDArray[np.float32], str], NDArray[np.float32]]
"""A search: an image [1, 3, H, W] in [-1, 1] and its caption -> directions [1, h, w, D]."""
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

    run: ArraySearch
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
    if choice is None and search is None:
        return model.encode_pictures(padded, rate.name)
    indices = range(len(arrays))

    def encode(group: list[int]) -> list[Tokens]:
        pixels = to_unit_range(np.stack([padded[i] for i in group]))
        if search is None:
            directions = model.directions(pixels, rate.name)
        else:
            images = zip(pixels, group, strict=True)
            found = [search.run(x[None], search.captions[i]) for x, i in images]
            directions = np.concatenate(found)
        if choice is None:
            return list(model.nearest(directions, rate.name))
        tokens, similarities = model.candidates(directions, rate.name, _CANDIDATES)
        allowed = similarities >= similarities[..., :1] - choice.slack
        return list(as_array(choice.coder.choose(tokens, allowed, choice.schedule)))

    shapes = [array.shape for array in padded]
    sizes = [height * width // rate.token_side**2 for height, width, _ in shapes]
    return by_group(indices, shapes, sizes, encode)
