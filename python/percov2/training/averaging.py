"""Exponential moving averages of the trained weights, for the export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from percov2.training.checkpoint import kept

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Moving averages of the parameters, and copies of the buffers, among ``keys`` of a module.

    The averages are on the module's device. Their decay is lower during the first steps.
    """

    def __init__(self, module: nn.Module, decay: float, keys: set[str]) -> None:
        self.decay, self.keys = decay, keys
        self.state = {k: v.clone() for k, v in kept(module, keys).items()}
        parameters = dict(module.named_parameters())
        self._averaged = [k for k in self.state if k in parameters and parameters[k].requires_grad]
        self._copied = [k for k in self.state if k not in parameters]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages after step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = kept(module, self.keys)
        # On a GPU, a call per tensor would take longer than the arithmetic.
        if self._averaged:
            averages = [self.state[k] for k in self._averaged]
            get_ema_multi_avg_fn(decay)(averages, [values[k] for k in self._averaged], None)
        for key in self._copied:
            self.state[key].copy_(values[key])

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load stored averages without a change of device."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Put the averages into ``module`` within a ``with`` block."""
        live = {k: v.clone() for k, v in kept(module, self.keys).items()}
        module.load_state_dict(self.state, strict=False)
        try:
            yield
        finally:
            module.load_state_dict(live, strict=False)
