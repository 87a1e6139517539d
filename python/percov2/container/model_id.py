"""Which model a file needs: the id in its bytes 2-3."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from percov2.container.bitstream import BitstreamError, Header


def model_id(token_side: int, codebook_size: int, fingerprint: bytes, codebook: bytes) -> int:
    """The id in a file's bytes 2-3: first 16 bits of a SHA-256 over what its tokens depend on.

    It belongs to one rate: a model may get further rates and still read its old files.

    Args:
        token_side: pixels that a token is wide and high.
        codebook_size: number of different tokens.
        fingerprint: of the rate's entropy model, 32 bytes.
        codebook: as stored, float32 little-endian.

    The hashed bytes are: token side, codebook size, fingerprint, length of the codebook bytes,
    codebook bytes; numbers are uint32 big-endian.
    """
    digest = hashlib.sha256(struct.pack(">II", token_side, codebook_size))
    digest.update(fingerprint + struct.pack(">I", len(codebook)) + codebook)
    return int.from_bytes(digest.digest()[:2], "big")


def check_model(header: Header, model: str, rates: Sequence[str], ids: Sequence[int]) -> None:
    """Raise BitstreamError unless a file's tokens are those of a rate of a model.

    Args:
        header: header of the file.
        model: name of the model.
        rates: names of its rates.
        ids: id of the tokens of each rate.
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
    at_hand = ", ".join(f"{known:04x}" for known in ids)
    raise BitstreamError(
        f"the file was written by another model: it needs id {header.model_id:04x} and has "
        f"rate {header.rate}, but the rates of model {model!r} have the ids {at_hand}; open it "
        "with the model that wrote it"
    )
