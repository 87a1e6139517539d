"""AdamW with a variable learning rate, for ordinary and for recorded steps.

A recorded step (``recording``) repeats kernels, so the learning rate and the step count must be on
the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["adamw", "make_recordable", "restore", "set_learning_rate"]


_SETTINGS = ("lr", "capturable", "fused")


def adamw(
    parameters: Iterable[Any], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW for parameters or groups of parameters.

    The settings of a group take precedence over the arguments.
    """
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def make_recordable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Allow recorded steps: move the learning rate to the device of the parameters."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = group["fused"] = True


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next steps, including recorded steps."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a ``state_dict()``, but keep the learning rate and the settings for recording."""
    own = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if "step" in moments:
                place = parameter.device if group["capturable"] else "cpu"
                moments["step"] = moments["step"].to(place)
