"""Token coders opened from the folder of an entropy model."""

from __future__ import annotations

from pathlib import Path

from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.token_coder import TokenCoder
from percov2.extras import require

__all__ = ["open_coder"]


def open_coder(folder: Path | str, device: str = "cpu") -> TokenCoder:
    """Open the entropy model of a folder on a device. Devices other than the CPU need torch.

    Raises:
        ValueError: as for ``IntTransformer.load``.
        MissingExtra: the device needs torch, which is not installed.
        RuntimeError: the device is missing or does not compute exactly.

    >>> from tempfile import TemporaryDirectory
    >>> from percov2.entropy import uniform
    >>> with TemporaryDirectory() as folder:
    ...     uniform.uniform_model(256).save(folder)
    ...     open_coder(folder).prob_bits
    16
    """
    if str(device) == "cpu":
        return TokenCoder(IntTransformer.load(folder))
    require("torch", f"an entropy model on {device}", "torch")
    from percov2.entropy.torch.int_transformer import IntTransformer as Placed
    from percov2.entropy.torch.token_coder import TokenCoder as PlacedCoder

    return PlacedCoder(Placed.load(folder, device=device))
