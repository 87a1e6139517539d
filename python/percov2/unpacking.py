"""``.pcv2`` files -> token maps, checked.

Reading trusts nothing: every fault is a BitstreamError that says what is wrong. What a file does
not hold, because its writer left stages out or because its end is missing, the entropy model draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from percov2 import bitstream
from percov2.bitstream import BitstreamError, Header, ParsedFile
from percov2.caption_model import CaptionModel
from percov2.entropy.rans import RansDecoder
from percov2.entropy.rans_cuda import CudaRansDecoder
from percov2.entropy.schedule import SCHEDULES, stage_count
from percov2.entropy.token_coder import TokenCoder
from percov2.models.model_config import Rate
from percov2.packing import (
    Tokens,
    by_group,
    check_of,
    is_dense,
    partial_fault,
    sent_tokens,
    threads,
    too_many_stages,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class DecodedFile:
    """What a valid file holds.

    Attributes:
        header: its fields.
        rate: the rate point that ``header.rate`` names.
        caption: its text, "" if there is none.
        tokens: int32 [h, w].
        stages: tokens of stages 1..stages are the file's, later ones were drawn.
        bits: cost of header, caption and check, as of ``bitstream.ParsedFile``.
    """

    header: Header
    rate: Rate
    caption: str
    tokens: Tokens
    stages: int
    bits: dict[str, float]

    @property
    def stage_count(self) -> int:
        """How many stages its tokens have."""
        return stage_count(SCHEDULES[self.header.schedule], *self.tokens.shape)


@dataclass(frozen=True)
class OpenFile:
    """A file whose header has been read; its tokens are still to be decoded.

    Attributes:
        data: the whole file.
        parsed: what ``bitstream.read`` returned.
        grid: (h, w) of the token map.
        label: what precedes a fault in messages, "" or "file 3 of 5: ".
    """

    data: bytes
    parsed: ParsedFile
    grid: tuple[int, int]
    label: str = ""

    def check_plausible(self) -> None:
        """Raise BitstreamError unless the data may hold the tokens of ``grid``."""
        header = self.parsed.header
        self.check_stages()
        count = sent_tokens(header, self.grid)
        if header.dense and not is_dense(self.data, count, 0):
            raise self.fault(
                f"the file is damaged or cut: {len(self.data)} bytes cannot hold the {count} "
                f"tokens of an image of {header.width}x{header.height}"
            )
        if not header.dense and too_many_stages(header.schedule, self.grid):
            raise self.fault(
                f"the file is damaged: {self.grid[0] * self.grid[1]} stages without the dense "
                f"promise, at most {bitstream.MAX_SPARSE_STAGES} are allowed"
            )

    @property
    def stages_held(self) -> int:
        """How many stages the complete file holds."""
        sent, schedule = self.parsed.header.stages_sent, self.parsed.header.schedule
        return sent or stage_count(SCHEDULES[schedule], *self.grid)

    def check_stages(self) -> None:
        """Raise BitstreamError if the file declares an impossible part of its stages."""
        if fault := partial_fault(self.parsed.header, self.grid):
            raise self.fault(f"impossible header field: {fault}")

    def fault(self, message: str) -> BitstreamError:
        """An error about this file."""
        return BitstreamError(self.label + message)


def with_captions(files: Sequence[OpenFile], captions: CaptionModel | None) -> list[OpenFile]:
    """Files behind their captions: those that a caption model coded are read.

    Args:
        files: as opened, of any models.
        captions: what reads the captions; None if there is none.

    Raises:
        BitstreamError: a caption that is damaged, or cannot be read without a model.
    """
    result = list(files)
    coded = [
        i for i, f in enumerate(files) if f.parsed.header.caption_codec == bitstream.CAPTION_MODEL
    ]
    if coded and captions is None:
        raise files[coded[0]].fault("its caption needs a caption model, and none is at hand")
    parts = [(files[i].data, files[i].parsed.state, files[i].parsed.position) for i in coded]
    for i, found in zip(coded, captions.read(parts) if captions else [], strict=True):
        parsed = files[i].parsed
        if isinstance(found.text, BitstreamError):
            raise files[i].fault(str(found.text)) from found.text
        try:
            header = replace(parsed.header, caption=found.text)
        except ValueError as error:
            raise files[i].fault(f"damaged caption: {error}") from error
        bits = {**parsed.bits, "caption": found.bits}
        parsed = ParsedFile(header, found.state, found.position, parsed.whole and found.whole, bits)
        result[i] = replace(files[i], parsed=parsed)
    return result


def unpack(
    coder: TokenCoder, files: Sequence[OpenFile], captions: CaptionModel | None = None
) -> list[Tokens]:
    """Decode and check the tokens of files: int32 [h, w] each.

    Args:
        coder: the entropy model of the files' rate.
        files: any schedules and grids. Tokens that a file does not hold are drawn.
        captions: what read their captions (``with_captions``); the check names it.

    Raises:
        BitstreamError: a file that is damaged or cut.
    """
    for file in files:
        file.check_plausible()
    return _by_form(coder, files, lambda group: _unpack_equal(coder, group, captions))


def unpack_cut(
    coder: TokenCoder, files: Sequence[OpenFile], captions: CaptionModel | None = None
) -> list[tuple[Tokens, int]]:
    """Decode the tokens of files that may lack their ends, which nothing checks.

    Arguments as for ``unpack``.

    Returns:
        Per file tokens int32 [h, w] and how many stages of them are the file's; the others, if any,
        are drawn.

    Raises:
        BitstreamError: a file that ends before its tokens begin, or that is damaged elsewhere.
    """
    for file in files:
        file.check_stages()
        if too_many_stages(file.parsed.header.schedule, file.grid):
            raise file.fault(
                f"more than {bitstream.MAX_SPARSE_STAGES} stages are restored from complete files "
                "only"
            )
    complete = _by_form(
        coder, files, lambda group: _unpack_equal(coder, group, captions, trusting=True)
    )
    cut = [file for file, tokens in zip(files, complete, strict=True) if tokens is None]
    for file in cut:
        if not file.parsed.whole:
            raise file.fault("the file is cut: it ends inside its header or caption")
    parts = iter(_by_form(coder, cut, lambda group: _unpack_equal_cut(coder, group)))
    found: list[tuple[Tokens, int]] = []
    for file, tokens in zip(files, complete, strict=True):
        found.append(next(parts) if tokens is None else (tokens, file.stages_held))
    return found


def _by_form(
    coder: TokenCoder, files: Sequence[OpenFile], work: Callable[[list[OpenFile]], list[Result]]
) -> list[Result]:
    """``by_group`` of files that are decoded together."""
    keys = [
        (header.schedule, header.stages_sent, header.seed, file.grid)
        for file, header in ((file, file.parsed.header) for file in files)
    ]
    sizes = [file.grid[0] * file.grid[1] for file in files]
    return by_group(files, keys, sizes, work, coder.tokens_at_once)


def _decoder(coder: TokenCoder, files: Sequence[OpenFile]) -> RansDecoder | CudaRansDecoder:
    """A decoder of the tokens of files, behind their headers."""
    return coder.decoder(
        b"".join(file.data for file in files),
        np.cumsum([0, *(len(file.data) for file in files)]),
        np.array([file.parsed.state for file in files], dtype=np.uint32),
        np.array([file.parsed.position for file in files], dtype=np.int64),
    )


def _unpack_equal(
    coder: TokenCoder,
    files: Sequence[OpenFile],
    captions: CaptionModel | None,
    trusting: bool = False,
) -> list[Any]:
    """``unpack`` for files of one form, together; trusting: None for a faulty one instead."""
    decoder = _decoder(coder, files)

    def hold_to_promise(remaining: int) -> None:
        if trusting or remaining <= bitstream.DENSE_SLACK:
            return
        for file, exhausted in zip(files, decoder.exhausted, strict=True):
            if exhausted and file.parsed.header.dense:
                raise file.fault(
                    f"the file is damaged or cut: its data end with {remaining} tokens to come"
                )

    header = files[0].parsed.header
    grids = coder.decode(
        decoder,
        SCHEDULES[header.schedule],
        *files[0].grid,
        on_stage=hold_to_promise,
        threads=threads(),
        sent=header.stages_sent,
        seed=header.seed,
    )
    tokens: list[Any] = list(grids.numpy())
    checks = [check_of(f.parsed.header, g, captions) for f, g in zip(files, tokens, strict=True)]
    for i, valid in enumerate(decoder.finished(checks)):
        if not valid and not trusting:
            raise files[i].fault("the file is damaged or cut: its check does not fit")
        tokens[i] = tokens[i] if valid else None
    return tokens


def _unpack_equal_cut(coder: TokenCoder, files: Sequence[OpenFile]) -> list[tuple[Tokens, int]]:
    """``unpack_cut`` for incomplete files of one form, together."""
    header = files[0].parsed.header
    decoder = _decoder(coder, files)
    grids, taken = coder.decode_cut(
        decoder,
        SCHEDULES[header.schedule],
        *files[0].grid,
        threads=threads(),
        sent=header.stages_sent,
        seed=header.seed,
    )
    for file, ended in zip(files, decoder.exhausted, strict=True):
        if not ended:
            raise file.fault("the file is damaged, not cut: bytes are left after its last token")
    return list(zip(grids.numpy(), taken.tolist(), strict=True))
