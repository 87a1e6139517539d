"""The entropy engine, usable on its own: schedules, integer models, intervals and rANS.

Importing this package is cheap: each name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from percov2.entropy.cdf import default_prob_bits
    from percov2.entropy.int_transformer import IntTransformer
    from percov2.entropy.opening import open_coder
    from percov2.entropy.rans import RansDecoder, RansEncoder
    from percov2.entropy.schedule import SCHEDULES, order, stages
    from percov2.entropy.staging import StagedDecoder
    from percov2.entropy.streams import SymbolDecoder, SymbolEncoder, decode, encode
    from percov2.entropy.token_coder import TokenCoder
    from percov2.entropy.transformer_config import TransformerConfig

_HOME = {
    "IntTransformer": "int_transformer",
    "RansDecoder": "rans",
    "RansEncoder": "rans",
    "SCHEDULES": "schedule",
    "StagedDecoder": "staging",
    "SymbolDecoder": "streams",
    "SymbolEncoder": "streams",
    "TokenCoder": "token_coder",
    "TransformerConfig": "transformer_config",
    "decode": "streams",
    "default_prob_bits": "cdf",
    "encode": "streams",
    "open_coder": "opening",
    "order": "schedule",
    "stages": "schedule",
}

__all__ = [
    "SCHEDULES",
    "IntTransformer",
    "RansDecoder",
    "RansEncoder",
    "StagedDecoder",
    "SymbolDecoder",
    "SymbolEncoder",
    "TokenCoder",
    "TransformerConfig",
    "decode",
    "default_prob_bits",
    "encode",
    "open_coder",
    "order",
    "stages",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
