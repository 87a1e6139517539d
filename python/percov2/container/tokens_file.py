"""Token maps as ``.pcv2`` files: header, caption and tokens on one rANS stream, with a check.

A token map gives the same bytes alone, in a batch, on any device and with any number of threads.
The reader trusts nothing in a file and raises BitstreamError for every fault. The entropy model
draws the tokens that a file does not hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from percov2.batching import by_group
from percov2.container import bitstream
from percov2.container.bitstream import BitstreamError, Header, ParsedFile
from percov2.container.caption_model import CaptionModel
from percov2.entropy.rans import RansEncoder, as_array, default_threads
from percov2.entropy.schedule import SCHEDULES, stage_count, stages
from percov2.entropy.token_coder import CodedGrids, TokenCoder

__all__ = [
    "EncodedPicture",
    "OpenFile",
    "SparseFileWarning",
    "Tokens",
    "TooFewBytes",
    "checked_tokens",
    "encode",
    "headers",
    "pack",
    "token_grid",
    "unpack",
    "unpack_cut",
    "whole_only",
    "with_captions",
    "write",
    "write_within",
]


Tokens = NDArray[np.int32]

_SHRINKAGE = 4
"""Largest number of bytes by which a file can exceed a file with more stages."""

_Result = TypeVar("_Result")


class SparseFileWarning(UserWarning):
    """A file of a large plain picture, which a reader decodes only if it is asked to."""


class TooFewBytes(ValueError):
    """The error for a byte limit that is below the size of every valid file of a picture."""


def headers(
    common: Header,
    sizes: Sequence[tuple[int, int]],
    token_side: int,
    captions: Sequence[tuple[int, bytes]],
    stages_sent: int | None,
    seed: int = 0,
) -> list[Header]:
    """Return the headers of pictures.

    Args:
        common: a header with the model id, rate and schedule of all pictures.
        sizes: (height, width) of every picture in pixels.
        token_side: side of a token in pixels.
        captions: codec and coded bytes of every caption.
        stages_sent: number of stages that the files hold; None means all. A picture with fewer
            stages is stored with all its stages.
        seed: seed with which a decoder draws the missing stages.

    Raises:
        ValueError: ``stages_sent`` is below 1, or a reader would refuse that number of stages.
    """
    if stages_sent is not None and stages_sent < 1:
        raise ValueError(f"a file holds at least 1 stage, not {stages_sent}")
    grids = [token_grid(size, token_side) for size in sizes]
    result = []
    for (height, width), grid, (codec, caption) in zip(sizes, grids, captions, strict=True):
        sent = stages_sent or 0
        if sent >= stage_count(SCHEDULES[common.schedule], *grid):
            sent = 0
        result.append(
            replace(
                common,
                height=height,
                width=width,
                stages_sent=sent,
                seed=seed if sent else 0,
                caption_codec=codec,
                caption=caption,
            )
        )
    _refuse_parts(result, grids)
    return result


@dataclass(frozen=True)
class EncodedPicture:
    """A picture after the entropy model's pass, from which files of any number of stages are made.

    Attributes:
        header: the file's header. ``write`` sets its ``dense``.
        tokens: int32 [h, w].
    """

    header: Header
    tokens: Tokens
    _coded: CodedGrids
    _row: int
    _captions: CaptionModel | None

    @property
    def stage_count(self) -> int:
        """Return the number of stages of the tokens."""
        return self._coded.stage_count(self._row)

    def part(self, stages: int, seed: int = 0) -> EncodedPicture:
        """Return the same picture for a file that holds only its first ``stages`` stages."""
        sent = 0 if stages >= self.stage_count else stages
        header = replace(self.header, stages_sent=sent, seed=seed * bool(sent))
        return replace(self, header=header)


def encode(
    coder: TokenCoder,
    headers: Sequence[Header],
    tokens: Sequence[Tokens],
    captions: CaptionModel | None = None,
) -> list[EncodedPicture]:
    """Run the entropy model over token maps.

    Args:
        coder: the entropy model of the headers' rate.
        headers: one header per file.
        tokens: one token map per file, int32 [h, w], with values in the coder's codebook.
        captions: the caption model, needed for headers with ``CAPTION_MODEL``.

    Raises:
        ValueError: a reader would refuse the number of stages, or the caption model is missing.
    """
    return _by_form(coder, headers, tokens, captions, lambda group: group)


def pack(
    coder: TokenCoder,
    headers: Sequence[Header],
    tokens: Sequence[Tokens],
    captions: CaptionModel | None = None,
) -> list[bytes]:
    """Write token maps as files. The arguments and errors are those of ``encode`` and ``write``."""
    return _by_form(coder, headers, tokens, captions, write)


def _by_form(
    coder: TokenCoder,
    headers: Sequence[Header],
    tokens: Sequence[Tokens],
    captions: CaptionModel | None,
    finish: Callable[[list[EncodedPicture]], list[_Result]],
) -> list[_Result]:
    """Encode pictures together, and finish each group at once.

    A group has one schedule and grid, unless the coder joins unequal grids.
    """
    for header in headers:
        if header.caption_codec == bitstream.CAPTION_MODEL and captions is None:
            raise ValueError(f"the caption {header.caption!r} needs the caption model; give it")
    _refuse_parts(headers, [grid.shape for grid in tokens])

    def work(group: list[tuple[Header, Tokens]]) -> list[_Result]:
        grids = [grid for _, grid in group]
        names = [SCHEDULES[header.schedule] for header, _ in group]
        if len(set(zip(names, (grid.shape for grid in grids), strict=True))) == 1:
            coded = coder.code(np.stack(grids), names[0], default_threads())
        else:
            coded = coder.code_joined(grids, names)
        return finish(
            [EncodedPicture(h, grid, coded, i, captions) for i, (h, grid) in enumerate(group)]
        )

    files = list(zip(headers, tokens, strict=True))
    keys = [(header.schedule, grid.shape) for header, grid in files]
    joined = [True] * len(files) if coder.joins else []
    sizes = [grid.size for grid in tokens]
    return by_group(files, keys, sizes, work, coder.tokens_at_once, joined)


def write(pictures: Sequence[EncodedPicture]) -> list[bytes]:
    """Write pictures as files.

    Raises:
        ValueError: a file cannot keep the dense promise and has too many stages.

    Warns:
        SparseFileWarning: a reader decodes a file only if it is asked to.
    """
    dense = [replace(p, header=replace(p.header, dense=True)) for p in pictures]
    written = _written(dense)
    # The check covers the flag, so files that break the promise are written again without it.
    broken = [
        i
        for i, (picture, (file, tail)) in enumerate(zip(dense, written, strict=True))
        if not _is_dense(file, _sent_tokens(picture.header, picture.tokens.shape), tail)
    ]
    for i in broken:
        header, grid = dense[i].header, dense[i].tokens
        if _too_many_stages(header.schedule, grid.shape):
            raise ValueError(
                f"schedule {SCHEDULES[header.schedule]!r} would give this plain picture of "
                f"{header.width}x{header.height} {grid.size} stages, more than the "
                f"{bitstream.MAX_SPARSE_STAGES} that a reader accepts; choose another schedule"
            )
    sparse = [replace(dense[i], header=replace(dense[i].header, dense=False)) for i in broken]
    for i, file in zip(broken, _written(sparse), strict=True):
        written[i] = file
        if (count := dense[i].tokens.size) > bitstream.MAX_SPARSE_TOKENS:
            header = dense[i].header
            warnings.warn(
                f"the {count} tokens of this plain picture of {header.width}x{header.height} cost "
                "almost nothing, so that its file can only be restored with allow_sparse; a "
                "coarser rate avoids this",
                SparseFileWarning,
                stacklevel=4,
            )
    return [file for file, _ in written]


def write_within(
    pictures: Sequence[EncodedPicture],
    limit: int,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[bytes]:
    """Write files of at most ``limit`` bytes that hold as many stages as fit.

    Args:
        pictures: encoded pictures. This function chooses their ``stages_sent`` and ``seed``.
        limit: largest size of a file in bytes.
        seed: seed with which a decoder draws the missing stages.
        numbers: numbers of the pictures in messages. None means 0, 1, …

    Raises:
        TooFewBytes: a picture's first stage needs more bytes. Also raised if all its stages need
            more bytes and a reader would refuse a file of fewer stages.
        ValueError: as for ``write``.
    """
    files = write([picture.part(picture.stage_count) for picture in pictures])
    names = [
        f"picture {number} of {picture.header.width}x{picture.header.height}"
        for number, picture in zip(numbers or range(len(pictures)), pictures, strict=True)
    ]
    for name, picture, file in zip(names, pictures, files, strict=True):
        reason = whole_only(picture.header.schedule, picture.tokens.shape)
        if len(file) > limit and reason:
            raise TooFewBytes(
                f"{name} needs {len(file)} bytes, more than {limit}: {reason}; choose a lower rate "
                "or more bytes"
            )
    totals = [picture.stage_count for picture in pictures]

    def parts(counts: dict[int, int]) -> list[bytes]:
        """Return one file per entry of ``counts``: a picture's index and its number of stages."""
        return write([pictures[i].part(k, seed) for i, k in counts.items()])

    # Bisect between the most stages known to fit and the fewest known to fail, with their bytes.
    fits = [total if len(file) <= limit else 0 for total, file in zip(totals, files, strict=True)]
    fails, sizes = list(totals), [len(file) for file in files]
    while tried := {
        i: (a + b) // 2 for i, (a, b) in enumerate(zip(fits, fails, strict=True)) if b - a > 1
    }:
        for (i, k), file in zip(tried.items(), parts(tried), strict=True):
            if len(file) <= limit:
                fits[i], files[i] = k, file
            else:
                fails[i], sizes[i] = k, len(file)
    # More stages can cost fewer bytes, because the coder starts from another check and the number
    # of stages has another cost. So try a few more stages after a near miss.
    while tried := {
        i: k + 1
        for i, k in enumerate(fails)
        if k + 1 < totals[i] and sizes[i] <= limit + _SHRINKAGE
    }:
        for (i, k), file in zip(tried.items(), parts(tried), strict=True):
            fails[i], sizes[i] = k, len(file)
            if len(file) <= limit:
                files[i] = file
    for i, file in enumerate(files):
        if len(file) > limit:
            least = len(file) if totals[i] == 1 else len(parts({i: 1})[0])
            raise TooFewBytes(
                f"{names[i]} needs {least} bytes for its first stage, more than {limit}; choose a "
                "lower rate or more bytes"
            )
    return files


def _is_dense(file: bytes, tokens: int, tail: int) -> bool:
    return bitstream.keeps_dense_promise(tokens, len(file) - bitstream.PREFIX_BYTES, tail)


def _too_many_stages(schedule: int, grid: tuple[int, ...]) -> bool:
    """Return True if the grid has too many stages in a schedule for a file without the promise."""
    # The other schedules have a few dozen stages at most (docs/reference/schedules.md).
    raster = SCHEDULES[schedule] == "raster"
    return raster and grid[0] * grid[1] > bitstream.MAX_SPARSE_STAGES


def whole_only(schedule: int, grid: tuple[int, ...]) -> str:
    """Return the reason why a file must hold all stages, or "" if it may hold a part.

    ``schedule`` is an index into ``SCHEDULES``. Drawn tokens cost no bits, so the dense promise
    does not bound their number.
    """
    count = grid[0] * grid[1]
    if count > bitstream.MAX_DRAWN_TOKENS:
        return (
            f"a file of more than {bitstream.MAX_DRAWN_TOKENS} tokens must hold all stages, and "
            f"this one has {count} tokens"
        )
    if _too_many_stages(schedule, grid):
        return (
            f"a file of more than {bitstream.MAX_SPARSE_STAGES} stages must hold all, and schedule "
            f"{SCHEDULES[schedule]!r} has {count}"
        )
    return ""


def _refuse_parts(headers: Sequence[Header], grids: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError if a reader would refuse a header's number of stages."""
    for header, grid in zip(headers, grids, strict=True):
        if fault := _partial_fault(header, grid):
            raise ValueError(f"{fault}; send all stages, or choose a coarser rate")


def _partial_fault(header: Header, grid: tuple[int, ...]) -> str:
    """Return the fault in a file's number of stages, or ""."""
    if not header.stages_sent:
        return ""
    if reason := whole_only(header.schedule, grid):
        return (
            f"{header.stages_sent} stages of a picture of {header.width}x{header.height}: {reason}"
        )
    name = SCHEDULES[header.schedule]
    total = stage_count(name, grid[0], grid[1])
    if header.stages_sent >= total:
        return (
            f"a part of {header.stages_sent} stages, but schedule {name!r} has {total} on "
            f"{grid[0]}x{grid[1]} tokens"
        )
    return ""


def _sent_tokens(header: Header, grid: tuple[int, ...]) -> int:
    """Return the number of tokens in a file."""
    if not header.stages_sent:
        return grid[0] * grid[1]
    return int(np.count_nonzero(_sent_places(header, grid)))


def _sent_places(header: Header, grid: tuple[int, ...]) -> NDArray[np.bool_]:
    return stages(SCHEDULES[header.schedule], grid[0], grid[1]) <= header.stages_sent


def _check_of(header: Header, tokens: Tokens, captions: CaptionModel | None) -> int:
    """Return the check of a file. It covers only the tokens that the file holds."""
    model = b""
    if header.caption_codec == bitstream.CAPTION_MODEL and captions is not None:
        model = captions.fingerprint()
    if header.stages_sent:
        tokens = np.where(_sent_places(header, tokens.shape), tokens, -1)
    return bitstream.check(header, tokens.astype("<i4").tobytes(), model)


def _written(pictures: Sequence[EncodedPicture]) -> list[tuple[bytes, int]]:
    """Return files, each with the number of tokens that its reader decodes from exhausted data."""
    keys = [id(picture._coded) for picture in pictures]
    return by_group(pictures, keys, [1] * len(pictures), _written_together, len(pictures))


def _written_together(pictures: list[EncodedPicture]) -> list[tuple[bytes, int]]:
    """Write pictures of one pass: tokens, then caption and header."""
    coded, captions = pictures[0]._coded, pictures[0]._captions
    headers = [picture.header for picture in pictures]
    checks = [_check_of(picture.header, picture.tokens, captions) for picture in pictures]
    rows = [picture._row for picture in pictures]
    sent = [header.stages_sent for header in headers]
    encoder = coded.encode(checks, default_threads(), sent, rows)
    tails = encoder.symbols_before_output.tolist()
    if captions is not None:
        texts = [_coded_caption(header, captions) for header in headers]
        _push(encoder, texts, captions.prob_bits)
    fields = [np.array(bitstream.header_intervals(header), dtype=np.int32) for header in headers]
    _push(encoder, fields, bitstream.PROB_BITS)
    buffer, offsets = encoder.finish()
    payload = buffer.tobytes()
    return [
        (bitstream.prefix(header) + payload[begin:end], tail)
        for header, begin, end, tail in zip(headers, offsets[:-1], offsets[1:], tails, strict=True)
    ]


def _coded_caption(header: Header, captions: CaptionModel) -> NDArray[np.int32]:
    """Return the intervals of a modelled caption, int32 [n, 2], or an empty array."""
    if header.caption_codec != bitstream.CAPTION_MODEL:
        return np.empty((0, 2), dtype=np.int32)
    coded = captions.intervals(header.caption.decode("utf-8"))
    if coded is None:
        raise ValueError(f"the caption {header.caption!r} has too many pieces for the model")
    return coded


def _push(encoder: RansEncoder, symbols: Sequence[NDArray[np.int32]], prob_bits: int) -> None:
    """Push the intervals (start, freq), int32 [n, 2], of every stream."""
    joined = np.concatenate(symbols)
    counts = np.array([len(one) for one in symbols], dtype=np.int64)
    encoder.encode(joined[:, 0], joined[:, 1], counts, prob_bits, default_threads())


def token_grid(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (h, w) of the token map of an image.

    ``size`` is (height, width) in pixels, and ``side`` is the side of a token in pixels.
    """
    return -(-size[0] // side), -(-size[1] // side)


def checked_tokens(
    grid: Tokens, size: tuple[int, int], token_side: int, codebook_size: int
) -> Tokens:
    """Return a token map as int32.

    Raises:
        ValueError: the map does not fit the image's size or the codebook.
    """
    array = np.asarray(grid)
    expected = token_grid(size, token_side)
    if array.dtype.kind not in "iu" or array.shape != expected:
        raise ValueError(
            f"tokens are {array.dtype} {array.shape}; a picture of {size[1]}x{size[0]} pixels with "
            f"{token_side}-pixel tokens has integers {expected}"
        )
    if array.min() < 0 or array.max() >= codebook_size:
        raise ValueError(
            f"tokens range from {array.min()} to {array.max()}; they must lie in "
            f"0..{codebook_size - 1}"
        )
    return array.astype(np.int32)


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenFile:
    """A file whose header has been read and whose tokens have not been decoded.

    Attributes:
        data: the whole file.
        parsed: the result of ``bitstream.read``.
        grid: (h, w) of the token map.
        label: the start of error messages, such as "" or "file 3 of 5: ".
    """

    data: bytes
    parsed: ParsedFile
    grid: tuple[int, int]
    label: str = ""

    def check_plausible(self, prob_bits: int, allow_sparse: bool = False) -> None:
        """Raise BitstreamError if the data cannot hold the tokens of ``grid``, or holds more.

        Also raises for a file without the dense promise and with more than ``MAX_SPARSE_TOKENS``
        tokens, unless it is allowed. No token costs more than ``prob_bits`` bits.
        """
        header = self.parsed.header
        self.check_stages()
        count = _sent_tokens(header, self.grid)
        left = len(self.data) - self.parsed.position
        if 8 * left > prob_bits * count + 32:
            raise self.fault(
                f"the file is damaged: {len(self.data)} bytes are too many for the {count} tokens "
                f"of a picture of {header.width}x{header.height}"
            )
        if header.dense and not _is_dense(self.data, count, 0):
            raise self.fault(
                f"the file is damaged or cut: {len(self.data)} bytes cannot hold the {count} "
                f"tokens of a picture of {header.width}x{header.height}"
            )
        if not header.dense and count > bitstream.MAX_SPARSE_TOKENS and not allow_sparse:
            raise self.fault(
                f"{len(self.data)} bytes declare {count} tokens that cost almost nothing, more "
                f"than the {bitstream.MAX_SPARSE_TOKENS} that are decoded unasked; set "
                "allow_sparse if you trust the file"
            )
        if not header.dense and _too_many_stages(header.schedule, self.grid):
            raise self.fault(
                f"the file is damaged: {self.grid[0] * self.grid[1]} stages without the dense "
                f"promise, at most {bitstream.MAX_SPARSE_STAGES} are allowed"
            )

    @property
    def stages_held(self) -> int:
        """Return the number of stages that the complete file holds."""
        sent, schedule = self.parsed.header.stages_sent, self.parsed.header.schedule
        return sent or stage_count(SCHEDULES[schedule], *self.grid)

    def check_stages(self) -> None:
        """Raise BitstreamError if the file declares an impossible number of stages."""
        if fault := _partial_fault(self.parsed.header, self.grid):
            raise self.fault(f"impossible header field: {fault}")

    def fault(self, message: str) -> BitstreamError:
        """Return an error with a message about this file."""
        return BitstreamError(self.label + message)


def with_captions(files: Sequence[OpenFile], captions: CaptionModel | None) -> list[OpenFile]:
    """Read the modelled captions of files. Return the files with their states before the tokens.

    Args:
        files: opened files of any models.
        captions: the caption model, or None if there is none.

    Raises:
        BitstreamError: a caption is damaged, or the caption model is missing.
    """
    result = list(files)
    coded = [
        i for i, f in enumerate(files) if f.parsed.header.caption_codec == bitstream.CAPTION_MODEL
    ]
    if coded and captions is None:
        raise files[coded[0]].fault("its caption needs a caption model, and there is none")
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
    coder: TokenCoder,
    files: Sequence[OpenFile],
    captions: CaptionModel | None = None,
    allow_sparse: bool = False,
) -> list[Tokens]:
    """Decode and check the tokens of files, and draw missing tokens.

    Args:
        coder: the entropy model of the files' rate.
        files: files of any schedules and grids.
        captions: the caption model, whose fingerprint the check covers. None if no file needs it.
        allow_sparse: as for ``OpenFile.check_plausible``.

    Returns:
        One token map per file, int32 [h, w].

    Raises:
        BitstreamError: a file is damaged or truncated.
    """
    for file in files:
        file.check_plausible(coder.prob_bits, allow_sparse)
    return _by_file_form(coder, files, lambda group: _unpack_together(coder, group, captions), True)


def unpack_cut(
    coder: TokenCoder,
    files: Sequence[OpenFile],
    captions: CaptionModel | None = None,
    allow_sparse: bool = False,
) -> list[tuple[Tokens, int]]:
    """Decode the tokens of files that may be truncated.

    The tokens of a truncated file cannot be checked. The arguments are those of ``unpack``. A file
    of more than ``MAX_DRAWN_TOKENS`` tokens must be complete.

    Returns:
        For each file, the tokens, int32 [h, w], and the number of stages taken from the file. Later
        stages are drawn.

    Raises:
        BitstreamError: a file ends before its tokens or is damaged elsewhere.
    """
    for file in files:
        file.check_stages()
        if _is_large(file):
            file.check_plausible(coder.prob_bits, allow_sparse)
        if _too_many_stages(file.parsed.header.schedule, file.grid):
            raise file.fault(
                f"files of more than {bitstream.MAX_SPARSE_STAGES} stages must be complete"
            )
    complete = _by_file_form(
        coder, files, lambda group: _unpack_together(coder, group, captions, trusting=True), True
    )
    cut = [file for file, tokens in zip(files, complete, strict=True) if tokens is None]
    for file in cut:
        if not file.parsed.whole:
            raise file.fault("the file is cut: it ends inside its header or caption")
    parts = iter(_by_file_form(coder, cut, lambda group: _unpack_equal_cut(coder, group)))
    found: list[tuple[Tokens, int]] = []
    for file, tokens in zip(files, complete, strict=True):
        found.append(next(parts) if tokens is None else (tokens, file.stages_held))
    return found


def _is_large(file: OpenFile) -> bool:
    return file.grid[0] * file.grid[1] > bitstream.MAX_DRAWN_TOKENS


def _by_file_form(
    coder: TokenCoder,
    files: Sequence[OpenFile],
    work: Callable[[list[OpenFile]], list[_Result]],
    join: bool = False,
) -> list[_Result]:
    """Run ``work`` on groups of files of one form.

    With ``join`` and a coder that joins unequal grids, groups may hold files of any form.
    """
    keys = [
        (header.schedule, header.stages_sent, header.seed, file.grid)
        for file, header in ((file, file.parsed.header) for file in files)
    ]
    sizes = [file.grid[0] * file.grid[1] for file in files]
    joined = [True] * len(files) if join and coder.joins else []
    return by_group(files, keys, sizes, work, coder.tokens_at_once, joined)


def _decoder(coder: TokenCoder, files: Sequence[OpenFile]) -> Any:
    return coder.decoder(
        b"".join(file.data for file in files),
        np.cumsum([0, *(len(file.data) for file in files)]),
        np.array([file.parsed.state for file in files], dtype=np.uint32),
        np.array([file.parsed.position for file in files], dtype=np.int64),
    )


def _unpack_together(
    coder: TokenCoder,
    files: Sequence[OpenFile],
    captions: CaptionModel | None,
    trusting: bool = False,
) -> list[Any]:
    """Unpack a group of files. With ``trusting``, a faulty file that is not large gives None."""
    decoder = _decoder(coder, files)
    strict = np.array([not trusting or _is_large(file) for file in files])

    def hold_to_promise(remaining: Any) -> None:
        left = np.broadcast_to(remaining, len(files))
        watched = strict & (left > bitstream.DENSE_SLACK)
        if not watched.any():
            return
        for i in np.flatnonzero(watched & decoder.exhausted).tolist():
            if files[i].parsed.header.dense:
                raise files[i].fault(
                    f"the file is damaged or cut: its data end {left[i]} tokens early"
                )

    headers, threads = [file.parsed.header for file in files], default_threads()
    names, shapes = [SCHEDULES[header.schedule] for header in headers], [f.grid for f in files]
    sent, seeds = [header.stages_sent for header in headers], [header.seed for header in headers]
    forms = list(zip(names, shapes, sent, seeds, strict=True))
    if len(set(forms)) == 1:
        grids = coder.decode(
            decoder, names[0], *shapes[0], hold_to_promise, threads, sent[0], seeds[0]
        )
        tokens: list[Any] = list(as_array(grids))
    else:
        found = coder.decode_joined(decoder, names, shapes, hold_to_promise, threads, sent, seeds)
        tokens = [as_array(grid) for grid in found]
    checks = [_check_of(f.parsed.header, g, captions) for f, g in zip(files, tokens, strict=True)]
    for i, valid in enumerate(decoder.finished(checks)):
        if not valid and strict[i]:
            raise files[i].fault("the file is damaged or cut: its check does not match")
        tokens[i] = tokens[i] if valid else None
    return tokens


def _unpack_equal_cut(coder: TokenCoder, files: Sequence[OpenFile]) -> list[tuple[Tokens, int]]:
    """Unpack truncated files of one form together."""
    header = files[0].parsed.header
    decoder = _decoder(coder, files)
    grids, taken = coder.decode_cut(
        decoder,
        SCHEDULES[header.schedule],
        *files[0].grid,
        threads=default_threads(),
        sent=header.stages_sent,
        seed=header.seed,
    )
    for file, ended in zip(files, decoder.exhausted, strict=True):
        if not ended:
            raise file.fault("the file is damaged, not cut: bytes are left after its last token")
    return list(zip(as_array(grids), taken.tolist(), strict=True))
