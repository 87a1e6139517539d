"""The model id in bytes 2-3 of a file."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from percov2.container.bitstream import BitstreamError, Header

__all__ = ["check_model", "model_id"]


def model_id(token_side: int, codebook_size: int, fingerprint: bytes, codebook: bytes) -> int:
    """Return the id of a rate's tokens: the first 16 bits of a SHA-256.

    The id covers one rate, so a model that gains rates still reads its old files.

    Args:
        token_side: side of a token in pixels.
        codebook_size: number of different tokens.
        fingerprint: fingerprint of the rate's entropy model, 32 bytes.
        codebook: the stored codebook, float32 little-endian.

    The hashed bytes are the token side, codebook size, fingerprint, number of codebook bytes, and
    codebook bytes. Numbers are uint32 big-endian.
    """
    digest = hashlib.sha256(struct.pack(">II", token_side, codebook_size))
    digest.update(fingerprint + struct.pack(">I", len(codebook)) + codebook)
    return int.from_bytes(digest.digest()[:2], "big")


def check_model(header: Header, model: str, rates: Sequence[str], ids: Sequence[int]) -> None:
    """Raise BitstreamError unless a file's tokens belong to a rate of a model.

    Args:
        header: header of the file.
        model: name of the model.
        rates: names of the model's rates.
        ids: the model id of each rate.
    """
    if header.rate < len(rates):
        rate, known = rates[header.rate], ids[header.rate]
        if header.model_id != known:
            raise BitstreamError(
                f"the file needs the model with id {header.model_id:04x}, but rate {rate} of "
                f"model {model!r} has id {known:04x}; open it with the model that wrote it"
            )
        return
    if header.model_id in ids:
        raise BitstreamError(
            f"impossible header field: rate {header.rate}, but model {model!r} has rates 0 to "
            f"{len(rates) - 1}"
        )
    known_ids = ", ".join(f"{known:04x}" for known in ids)
    raise BitstreamError(
        f"the file was written by another model: it needs id {header.model_id:04x} and has "
        f"rate {header.rate}, but the rates of model {model!r} have the ids {known_ids}; open it "
        "with the model that wrote it"
    )
