"""Training of low-rank updates of frozen linear maps (LoRA, arXiv 2106.09685).

``percov2.models.sd3.flow`` stores a trained update and adds it to the base model's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LowRankLinear", "add_low_rank", "low_rank_tensors"]


class LowRankLinear(nn.Module):
    """The linear map base(x) + scale · up(down(x)). ``base`` is frozen, and ``up`` starts at 0."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        update = nn.functional.linear(x.to(self.lora_down.dtype), self.lora_down)
        update = nn.functional.linear(update, self.lora_up)
        y = self.base(x)
        return y + self.scale * update.to(y.dtype)


def add_low_rank(model: nn.Module, layers: tuple[str, ...], rank: int, alpha: float) -> list[str]:
    """Add low-rank updates to linear maps in place. Return the names of these maps.

    Args:
        model: the network to change.
        layers: last parts of the maps' names, e.g. ("to_q", "to_out.0").
        rank: rank of the updates.
        alpha: the updates have the factor ``alpha`` / ``rank``.

    Raises:
        ValueError: the rank is below 1, or no linear map has such a name.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, not {rank}")
    ends = tuple(f".{layer}" for layer in layers)
    linear = (name for name, part in model.named_modules() if isinstance(part, nn.Linear))
    names = [name for name in linear if name.endswith(ends)]
    if not names:
        raise ValueError(f"no linear map is named {' or '.join(layers)}")
    for name in names:
        parent, _, own = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        setattr(model.get_submodule(parent), own, LowRankLinear(base, rank, alpha / rank))
    return names


def low_rank_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors, named ``<linear>.lora_down`` and ``<linear>.lora_up``."""
    return {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for part in ("lora_down", "lora_up")
    }
