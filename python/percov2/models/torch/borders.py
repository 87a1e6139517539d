"""Pictures of different sizes in one batch of a convolutional network.

The pictures are padded with zeros to a common size. Then the output of every convolution is
multiplied by a mask that is zero beyond each picture. That is the zero padding that the convolution
would do at the picture's own border, so a picture's result does not depend on the common size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["own_borders"]


@contextmanager
def own_borders(network: nn.Module, sizes: Sequence[tuple[int, int]], side: int) -> Iterator[None]:
    """Run a network as if every picture of a batch were alone.

    The layers may be convolutions and functions of single positions that map 0 to anything.

    Args:
        network: the network, whose input is [B, C, H, W].
        sizes: (height, width) of each picture in positions of the input. Beyond them, the input is
            zero.
        side: positions of the input per side of one position of the output; the largest factor by
            which the network shrinks its input. It divides all sizes, H and W.
    """
    masks: dict[tuple[int, int], Tensor] = {}
    shape: list[int] = []

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        shape[:] = given[0].shape[-2:]
        masks.clear()

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        height, width = output.shape[-2:]
        if (height, width) not in masks:
            masks[height, width] = _mask(sizes, shape, output)
        return output * masks[height, width]

    if any(length % side for size in sizes for length in size):
        raise ValueError(f"sizes must be multiples of {side}, not {list(sizes)}")
    with ExitStack() as stack:
        stack.enter_context(_removed(network.register_forward_pre_hook(note)))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                stack.enter_context(_removed(module.register_forward_hook(cut)))
        yield


def _mask(sizes: Sequence[tuple[int, int]], whole: Sequence[int], like: Tensor) -> Tensor:
    """Return [B, 1, h, w] with ones where a picture of the input is, at an output's resolution."""
    mask = like.new_zeros(len(sizes), 1, *like.shape[-2:])
    for one, (height, width) in zip(mask, sizes, strict=True):
        rows = height * like.shape[-2] // whole[0]
        columns = width * like.shape[-1] // whole[1]
        one[:, :rows, :columns] = 1
    return mask


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
