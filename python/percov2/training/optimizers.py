"""AdamW as every run uses it: its learning rate may change, and a GPU may record its steps.

A recorded step (``recording``) repeats kernels, so whatever changes from step to step must lie on
the device: the learning rate and the count of steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SETTINGS = ("lr", "capturable", "fused")


def adamw(
    parameters: Iterable[Any], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over parameters or groups of them (whose own settings win)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def make_recordable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let steps be recorded: the learning rate becomes a scalar on the device of the parameters."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = group["fused"] = True


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """For the steps from now on, recorded ones included."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a ``state_dict()``, but keep the learning rate and whether steps are recorded."""
    own = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if "step" in moments:
                place = parameter.device if group["capturable"] else "cpu"
                moments["step"] = moments["step"].to(place)
