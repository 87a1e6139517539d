"""percov2: photographs in a few hundred bytes.

``Codec.from_pretrained("tiny")`` compresses and restores; ``percov2.entropy`` is the entropy engine
alone. Importing this package is cheap: each name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from percov2.codec import Codec
    from percov2.container.bitstream import BitstreamError
    from percov2.models.backbone import BackboneOptions
    from percov2.options import DecodeOptions, EncodeOptions
    from percov2.pipeline import PerCoV2Pipeline

__version__ = "0.2.0"

_HOME = {
    "BackboneOptions": "models.backbone",
    "BitstreamError": "container.bitstream",
    "Codec": "codec",
    "DecodeOptions": "options",
    "EncodeOptions": "options",
    "PerCoV2Pipeline": "pipeline",
}

__all__ = [
    "BackboneOptions",
    "BitstreamError",
    "Codec",
    "DecodeOptions",
    "EncodeOptions",
    "PerCoV2Pipeline",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "PerCoV2Pipeline":
        from percov2.extras import require

        require("torch", name, "torch", "diffusers", "transformers")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
