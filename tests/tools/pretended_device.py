"""A pretended device that counts the operations and waits of a program on a GPU.

Inside ``PretendedDevice()`` tensors on ``DEVICE`` wrap CPU tensors. These run every operator that
torch dispatches, so all values are real. Every operation that would make the host of a real device
wait is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""Its name. "meta" is the one device besides the CPU to which torch sends calls everywhere."""

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


_real_autocast = torch.autocast


def _autocast(kind: str, **how: Any) -> torch.autocast:
    """torch.autocast; torch knows none for this device, so there is none to be switched off."""
    return _real_autocast("cpu" if kind == DEVICE.type else kind, **how)


class Held(torch.Tensor):
    """A tensor on the pretended device; ``held`` is the CPU tensor with its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Held:
        # A wrapper that is an inference tensor cannot be the base of a view.
        with torch.inference_mode(False):
            wrapper = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} reached the pretended device outside of PretendedDevice()")


class PretendedDevice(TorchDispatchMode):
    """Runs ``DEVICE`` and keeps its books.

    Attributes:
        uploads: one entry for each copy from the CPU: its shape.
        downloads: one entry for each copy to the CPU: its shape.
        waits: every other event for which the host waits: operators whose result or whose result's
            shape it must know (``.item()``, ``nonzero``, a mask as index, ...) and uploads that
            do not say non_blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[tuple[int, ...]] = []
        self.downloads: list[tuple[int, ...]] = []
        self.waits: list[str] = []
        self._autocast = mock.patch.object(torch, "autocast", _autocast)
        self._depth = 0

    def __enter__(self) -> PretendedDevice:
        if not self._depth:
            self._autocast.start()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._depth -= 1
        if not self._depth:
            self._autocast.stop()

    def forget(self) -> None:
        """Empty the books."""
        for book in (self.uploads, self.downloads, self.waits):
            book.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # In inference mode composite operators arrive whole: take them apart as autograd would.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, Held)]
        for tensor in tensors:
            if tensor.device == DEVICE and not isinstance(tensor, Held):
                raise RuntimeError(
                    f"{func} got a tensor that reached the device unseen: torch.tensor(..., "
                    "device=...) is an upload that waits; make it on the CPU and use to()"
                )
        target = kwargs.get("device")
        if func in _COPIES:
            self._copied(func, args, kwargs)
        else:
            if here and any(x.dim() > 0 for x in tensors if not isinstance(x, Held)):
                raise RuntimeError(f"{func} mixes tensors on the CPU and on the device")
            if here and _waits(func, args):
                self.waits.append(str(func))
        stays = bool(here) if target is None else torch.device(target) == DEVICE
        if func is torch.ops.aten.copy_.default:
            stays = isinstance(args[0], Held)
        if target is not None and stays:
            kwargs["device"] = torch.device("cpu")
        return _carried_out(func, args, kwargs, here, stays)

    def _copied(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if func is torch.ops.aten.copy_.default:
            source, goal = args[1], args[0].device
            patient = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source, goal = args[0], torch.device(kwargs.get("device") or args[0].device)
            patient = not kwargs.get("non_blocking")
        shape = tuple(source.shape)
        if goal == DEVICE != source.device:
            self.uploads.append(shape)
            if patient:
                self.waits.append(f"an upload of {shape} without non_blocking")
        elif source.device == DEVICE != goal:
            self.downloads.append(shape)


def _waits(func: Any, args: tuple) -> bool:
    """Whether the host must wait for the device to know what ``func`` returns."""
    name = func._schema.name.removeprefix("aten::")
    if name in _MASKED:  # only a mask has to be counted
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) for x in indices)
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags) or not all(
        "Tensor" in str(part.type) for part in func._schema.returns
    )


def _carried_out(
    func: Callable[..., Any], args: Any, kwargs: Any, here: list[Held], stays: bool
) -> Any:
    """``func`` on the held tensors; what stays on the device is wrapped again."""
    known = {id(x.held): x for x in here}
    plain = tree_map(lambda x: x.held if isinstance(x, Held) else x, (args, kwargs))
    result = func(*plain[0], **plain[1])

    def wrapped(x: Any) -> Any:
        if not stays or not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Held(x)

    return tree_map(wrapped, result)
