"""Exponential moving averages of the trained weights, for the export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Moving averages of trained parameters, and copies of buffers.

    Args:
        module: module on the device of the averages.
        decay: decay of the averages, which is lower during the first steps.
        keys: keys of ``module.state_dict()`` to keep.
    """

    def __init__(self, module: nn.Module, decay: float, keys: set[str]) -> None:
        self.decay = decay
        self.keys = keys
        self.state = {k: v.clone() for k, v in self._values(module).items()}
        parameters = dict(module.named_parameters())
        self._averaged = [k for k in self.state if k in parameters and parameters[k].requires_grad]
        self._copied = [k for k in self.state if k not in parameters]

    def _values(self, module: nn.Module) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in module.state_dict().items() if k in self.keys}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages after step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = self._values(module)
        # On a GPU, a call per tensor would take longer than the arithmetic.
        if self._averaged:
            get_ema_multi_avg_fn(decay)(
                [self.state[k] for k in self._averaged], [values[k] for k in self._averaged], None
            )
        for key in self._copied:
            self.state[key].copy_(values[key])

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load stored averages without a change of device."""
        for key, value in self.state.items():
            value.copy_(state[key])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Put the averages into ``module`` temporarily."""
        live = {k: v.clone() for k, v in self._values(module).items()}
        module.load_state_dict(self.state, strict=False)
        try:
            yield
        finally:
            module.load_state_dict(live, strict=False)
