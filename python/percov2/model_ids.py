"""Which model a file needs: the id in its bytes 2-3."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from percov2.bitstream import BitstreamError, Header
from percov2.models.model_config import ModelConfig, Rate


def model_id(rate: Rate, fingerprint: bytes, codebook: bytes) -> int:
    """The id in a file's bytes 2-3: first 16 bits of a SHA-256 over what its tokens depend on.

    It belongs to one rate: a model may get further rates and still read its old files.

    Args:
        rate: its name does not matter.
        fingerprint: of the rate's entropy model, 32 bytes.
        codebook: as stored, float32 little-endian.

    The hashed bytes are: token side, codebook size, fingerprint, length of the codebook bytes,
    codebook bytes; numbers are uint32 big-endian.
    """
    digest = hashlib.sha256(struct.pack(">II", rate.token_side, rate.codebook_size))
    digest.update(fingerprint + struct.pack(">I", len(codebook)) + codebook)
    return int.from_bytes(digest.digest()[:2], "big")


def check_model(header: Header, config: ModelConfig, id_of: Callable[[str], int]) -> None:
    """Raise BitstreamError unless a file's tokens are those of a rate of a model.

    Args:
        header: of the file.
        config: of the model.
        id_of: name of a rate -> the id of its tokens.
    """
    name, rates = config.name, config.rates
    if header.rate < len(rates):
        rate = rates[header.rate].name
        if header.model_id != id_of(rate):
            raise BitstreamError(
                f"the file needs the model with id {header.model_id:04x}, but rate {rate} of "
                f"model {name!r} has id {id_of(rate):04x}; open it with the model "
                "that wrote it"
            )
        return
    ids = [id_of(rate.name) for rate in rates]
    if header.model_id in ids:
        raise BitstreamError(
            f"impossible header field: rate {header.rate}, but model {name!r} has rates 0 to "
            f"{len(rates) - 1}"
        )
    at_hand = ", ".join(f"{known:04x}" for known in ids)
    raise BitstreamError(
        f"the file was written by another model: it needs id {header.model_id:04x} and has "
        f"rate {header.rate}, but the rates of model {name!r} have the ids {at_hand}; open it "
        "with the model that wrote it"
    )
