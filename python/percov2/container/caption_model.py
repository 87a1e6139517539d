"""Captions coded with a small integer transformer: about eight bytes instead of fifty.

A text is split into pieces: words, parts of words and single bytes, so that any UTF-8 text can be
coded. The pieces are the tokens of a grid with one row, in raster order. Each piece is coded given
the pieces before it, with the same integer program (docs/reference/entropy-model.md) and on the
same rANS stream as image tokens. docs/reference/bitstream.md, section 5, is normative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from percov2.batching import by_group
from percov2.caching import remembered
from percov2.container.bitstream import BitstreamError
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.rans import RansDecoder
from percov2.entropy.schedule import stages
from percov2.entropy.staging import StagedDecoder
from percov2.entropy.token_coder import TokenCoder
from percov2.stored_files import read_json

__all__ = [
    "END",
    "FIRST_BYTE",
    "FIRST_LEARNED",
    "MAX_PIECES",
    "Alphabet",
    "CaptionModel",
    "ReadCaption",
]


MAX_PIECES = 64
"""Largest number of pieces of a caption, including its end. This is the width of the grid."""
END = 0
"""The piece that ends a caption."""
FIRST_BYTE = 1
"""Pieces FIRST_BYTE … FIRST_BYTE + 255 are the single bytes."""
FIRST_LEARNED = FIRST_BYTE + 256
_MAX_PIECE_BYTES = 32
_REMEMBERED = 256
"""Number of captions whose intervals are cached."""


class Alphabet:
    """An alphabet of text pieces: the end, 256 single bytes and learned pieces.

    Args:
        learned: different pieces of 2 to 32 bytes, numbered from FIRST_LEARNED on. The piece of a
            word includes the space before the word.

    Raises:
        ValueError: a piece occurs twice or has another length.

    >>> alphabet = Alphabet([b" a", b" red"])
    >>> alphabet.split("a red ad")
    [257, 258, 257, 101]
    >>> alphabet.join([257, 258, 257, 101])
    b'a red ad'
    """

    def __init__(self, learned: Sequence[bytes]) -> None:
        lengths = {len(piece) for piece in learned}
        if len(set(learned)) != len(learned) or not lengths <= set(range(2, _MAX_PIECE_BYTES + 1)):
            raise ValueError(
                f"learned pieces must differ and have 2 to {_MAX_PIECE_BYTES} bytes; of "
                f"{len(learned)} pieces {len(set(learned))} differ, with {sorted(lengths)[:3]} … "
                "bytes"
            )
        self.learned = list(learned)
        self._ids = {piece: i for i, piece in enumerate(self.learned, FIRST_LEARNED)}
        self._longest = max(lengths, default=1)

    def __len__(self) -> int:
        """Return the number of pieces, including the end piece and the 256 single bytes."""
        return FIRST_LEARNED + len(self.learned)

    def split(self, text: str) -> list[int]:
        """Split a non-empty text into the fewest pieces. Ties prefer longer pieces first."""
        data = b" " + text.encode("utf-8")
        fewest = [0] * (len(data) + 1)  # pieces of data[i:]
        chosen = [0] * len(data)
        for i in range(len(data) - 1, -1, -1):
            fewest[i], chosen[i] = fewest[i + 1] + 1, 1
            for length in range(2, min(self._longest, len(data) - i) + 1):
                if fewest[i + length] + 1 <= fewest[i] and data[i : i + length] in self._ids:
                    fewest[i], chosen[i] = fewest[i + length] + 1, length
        pieces, i = [], 0
        while i < len(data):
            part = data[i : i + chosen[i]]
            pieces.append(self._ids[part] if len(part) > 1 else FIRST_BYTE + part[0])
            i += chosen[i]
        return pieces

    def join(self, pieces: Sequence[int]) -> bytes:
        """Return the text of pieces, as bytes. The end piece must not be among them.

        Raises:
            BitstreamError: the pieces do not begin with a space. The pieces of every text do.
        """
        data = b"".join(
            self.learned[piece - FIRST_LEARNED]
            if piece >= FIRST_LEARNED
            else bytes([piece - FIRST_BYTE])
            for piece in pieces
        )
        if not data.startswith(b" "):
            raise BitstreamError("damaged caption: its pieces do not begin with a space")
        return data[1:]


@dataclass(frozen=True)
class ReadCaption:
    """A caption that was read after a file's header, and the decoder's state after it.

    Attributes:
        text: the bytes of the caption, or the error of a damaged file.
        state: state of the decoder after the caption.
        position: index of the next byte in the file.
        whole: True if no symbol of the caption was read after the end of the data.
        bits: cost of the caption in bits.
    """

    text: bytes | BitstreamError
    state: int
    position: int
    whole: bool
    bits: float


class CaptionModel:
    """A coder of captions with one alphabet and one integer transformer, on the CPU.

    Raises:
        ValueError: the transformer is for another number of pieces.
    """

    def __init__(self, alphabet: Alphabet, transformer: IntTransformer) -> None:
        if transformer.config.codebook_size != len(alphabet):
            raise ValueError(
                f"the caption model codes {transformer.config.codebook_size} pieces, but its "
                f"alphabet has {len(alphabet)}"
            )
        self.alphabet, self._coder = alphabet, TokenCoder(transformer)
        # A caller needs a caption's cost first, then its intervals for every file.
        self._coded = remembered(self._code, _REMEMBERED)

    @property
    def prob_bits(self) -> int:
        """Return the precision of the intervals in bits."""
        return self._coder.prob_bits

    def fingerprint(self) -> bytes:
        """Return the SHA-256 of the transformer's fingerprint and of all pieces and lengths."""
        digest = hashlib.sha256(self._coder.model.fingerprint())
        for piece in self.alphabet.learned:
            digest.update(bytes([len(piece)]) + piece)
        return digest.digest()

    @classmethod
    def load(cls, folder: Path) -> CaptionModel:
        """Read a folder written by ``save``.

        Raises:
            OSError, ValueError: files are missing, or the folder holds no caption model.
        """
        stored = read_json(folder / "pieces.json")
        if not isinstance(stored, list) or not all(isinstance(piece, str) for piece in stored):
            raise ValueError(f"{folder / 'pieces.json'} must contain a list of texts")
        alphabet = Alphabet([piece.encode("utf-8") for piece in stored])
        return cls(alphabet, IntTransformer.load(folder))

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and pieces.json."""
        self._coder.model.save(folder)
        pieces = [piece.decode("utf-8") for piece in self.alphabet.learned]
        text = json.dumps(pieces, ensure_ascii=False, indent=0) + "\n"
        (folder / "pieces.json").write_text(text, encoding="utf-8")

    def intervals(self, text: str) -> NDArray[np.int32] | None:
        """Return the intervals (start, freq) of a non-empty text's pieces and end, int32 [n, 2].

        They are in units of 1 / 2^prob_bits. The result is None if the text has ``MAX_PIECES`` or
        more pieces.
        """
        return self._coded(text)

    def _code(self, text: str) -> NDArray[np.int32] | None:
        pieces = self.alphabet.split(text)
        return None if len(pieces) >= MAX_PIECES else self._intervals(pieces)

    def bits(self, text: str) -> float:
        """Return the cost of a text in bits. It is infinite if the text has too many pieces."""
        coded = self.intervals(text)
        return float("inf") if coded is None else self._cost(coded)

    def _intervals(self, pieces: Sequence[int]) -> NDArray[np.int32]:
        row = np.full((1, MAX_PIECES), END, dtype=np.int32)
        row[0, : len(pieces)] = pieces
        starts, freqs = self._coder.intervals(row[None], "raster")
        return np.stack([starts[0], freqs[0]], axis=1)[: len(pieces) + 1]

    def _cost(self, intervals: NDArray[np.int32]) -> float:
        return float((self.prob_bits - np.log2(intervals[:, 1])).sum())

    def read(self, files: Sequence[tuple[bytes, int, int]]) -> list[ReadCaption]:
        """Read the captions of files, given as (data, state, position) after each file's header.

        A group of them takes at most ``MAX_PIECES`` passes, even on damaged data.
        """
        one = [0] * len(files)
        return by_group(files, one, [MAX_PIECES] * len(files), self._read_group)

    def _read_group(self, files: Sequence[tuple[bytes, int, int]]) -> list[ReadCaption]:
        data, states, positions = zip(*files, strict=True)
        decoder = RansDecoder(
            b"".join(data),
            np.cumsum([0, *(len(one) for one in data)]),
            np.array(states, dtype=np.uint32),
            np.array(positions, dtype=np.int64),
        )
        count = len(files)
        staged = StagedDecoder(self._coder.model, stages("raster", 1, MAX_PIECES), count)
        pieces = np.full((count, MAX_PIECES), END, dtype=np.int32)
        open_, whole = np.arange(count, dtype=np.int64), np.ones(count, dtype=bool)
        for column in range(MAX_PIECES):
            logits = staged.logits()[open_]
            whole[open_] &= ~decoder.exhausted[open_]
            found = decoder.decode(logits, self.prob_bits, open_)[:, 0]
            pieces[open_, column] = found
            open_ = open_[found != END]
            if not len(open_):
                break
            staged.accept(pieces[:, column : column + 1])
        return [
            self._read_one(row, i in open_, (state, position, intact))
            for i, (row, state, position, intact) in enumerate(
                zip(
                    pieces,
                    decoder.states.tolist(),
                    decoder.positions.tolist(),
                    whole.tolist(),
                    strict=True,
                )
            )
        ]

    def _read_one(
        self, row: NDArray[np.int32], unended: bool, end: tuple[int, int, bool]
    ) -> ReadCaption:
        if unended:
            fault = BitstreamError(f"damaged caption: it has more than {MAX_PIECES - 1} pieces")
            return ReadCaption(fault, *end, 0.0)
        read = row[: row.tolist().index(END)].tolist()
        try:
            return ReadCaption(self.alphabet.join(read), *end, self._cost(self._intervals(read)))
        except BitstreamError as error:
            return ReadCaption(error, *end, 0.0)
