"""Tokens chosen with the rate in mind: of nearly equally good codes the likeliest.

An encoder may write any token; the decoder cannot tell. Where several codes are about as near as
the nearest, the one that the entropy model expects costs fewer bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from percov2.entropy import schedule
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.stage_pass import StagedDecoder


def likeliest_tokens(
    model: IntTransformer, candidates: Tensor, allowed: Tensor, schedule_name: str
) -> Tensor:
    """The most probable allowed candidate at every place, given those chosen in earlier stages.

    Takes one pass per stage, as decoding does. Greedy: what a choice does to later stages is not
    looked at.

    Args:
        model: the integer transformer that will code the tokens.
        candidates: tokens int32 [B, h, w, K], the preferred one first: it wins a tie.
        allowed: bool, the same shape; the first of every place is.
        schedule_name: of the file.

    Returns:
        Tokens int32 [B, h, w] on the CPU.

    Raises:
        ValueError: shapes that differ, a place without an allowed candidate, tokens outside the
            codebook, or an unknown schedule.
    """
    if candidates.ndim != 4 or candidates.shape != allowed.shape:
        raise ValueError(
            f"candidates {tuple(candidates.shape)} and allowed {tuple(allowed.shape)} must both be "
            "[B, h, w, K]"
        )
    if not allowed[..., 0].all():
        raise ValueError("the first candidate of every place must be allowed")
    low, high = int(candidates.min()), int(candidates.max())
    if low < 0 or high >= model.config.codebook_size:
        raise ValueError(
            f"candidates range from {low} to {high}; the codebook has "
            f"{model.config.codebook_size} entries"
        )
    stages = schedule.stages(schedule_name, *candidates.shape[1:3])
    place_of = torch.from_numpy(stages.reshape(-1).copy())
    flat, may = candidates.flatten(1, 2).cpu(), allowed.flatten(1, 2).cpu()
    rank = torch.arange(candidates.shape[3], dtype=torch.int32)
    staged = StagedDecoder(model, stages, len(candidates))
    stage = 0
    while staged.remaining:
        stage += 1
        here = place_of == stage
        options = flat[:, here]
        logits = staged.logits().cpu().to(torch.int32).gather(2, options.long())
        # Distinct scores: argmax promises nothing about ties.
        scores = logits * len(rank) - rank
        scores[~may[:, here]] = torch.iinfo(torch.int32).min
        best = scores.argmax(2, keepdim=True)
        staged.accept(options.gather(2, best).squeeze(2).to(torch.int32))
    return staged.tokens().cpu()
