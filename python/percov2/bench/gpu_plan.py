"""What one run of ``percov2 bench gpu`` compiles, predicts and measures."""

from __future__ import annotations

from dataclasses import dataclass

from percov2.bench.gpu_cards import CARDS, Card
from percov2.bench.gpu_kernels import Size
from percov2.bench.timing import Effort
from percov2.entropy.transformer_config import TransformerConfig


@dataclass(frozen=True)
class GpuPlan:
    """What one run does.

    Attributes:
        cards: for which times are predicted where there is no card.
        sizes: of the coder's kernels and of whole encoding; the first also of the model's layers.
        effort: how long each call is repeated on a card; cpu_effort: on the CPU beside it.
    """

    cards: tuple[Card, ...]
    sizes: tuple[Size, ...]
    effort: Effort
    cpu_effort: Effort


SIZES = tuple(Size(256, 1024, TransformerConfig(codebook_size=size)) for size in (256, 1024))
FULL_PLAN = GpuPlan(CARDS, SIZES, Effort(1.0, 20, 1000), Effort(1.0, 3, 20))
QUICK_PLAN = GpuPlan(
    tuple(card for card in CARDS if card.name.startswith("H100")),
    SIZES,
    Effort(0.1, 5, 50),
    Effort(0.1, 1, 5),
)
