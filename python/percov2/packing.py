"""Token maps <-> ``.pcv2`` files: header, caption and tokens on one rANS stream, checked.

Given tokens, the bytes are the same alone, in a batch, on any device and with any thread count.
Reading trusts nothing: every fault is a BitstreamError that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from percov2 import bitstream
from percov2.bitstream import BitstreamError, Header, ParsedFile
from percov2.entropy.schedule import SCHEDULES
from percov2.entropy.token_coder import TokenCoder

Tokens = NDArray[np.int32]

TOKENS_AT_ONCE = 16384
"""Tokens whose pictures go through a network together (bounds memory)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_group(
    items: Sequence[Item],
    keys: Sequence[Hashable],
    sizes: Sequence[int],
    work: Callable[[list[Item]], Sequence[Result]],
    at_once: int = TOKENS_AT_ONCE,
) -> list[Result]:
    """Run ``work`` on lists of items with equal keys and return its results in the items' order.

    Args:
        items: what ``work`` takes; it returns one result per item.
        keys: only items with equal keys share a call.
        sizes: tokens per item.
        work: the function.
        at_once: tokens that one call takes at most, but it takes one item at least.
    """
    results: dict[int, Result] = {}
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        step = max(1, at_once // max(1, sizes[members[0]]))
        for begin in range(0, len(members), step):
            chosen = members[begin : begin + step]
            results.update(zip(chosen, work([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]


def pack(coder: TokenCoder, headers: Sequence[Header], tokens: Sequence[Tokens]) -> list[bytes]:
    """Write token maps as files.

    Args:
        coder: the entropy model of the headers' rate.
        headers: one per file; ``dense`` is set here, whatever it says.
        tokens: int32 [h, w] per file, values in the coder's codebook.

    Raises:
        ValueError: a file that cannot keep the dense promise and has too many stages.
    """
    headers = [replace(header, dense=True) for header in headers]
    written = _write(coder, headers, tokens)
    # The check covers the flag, so a file that breaks the promise is written again without it.
    broken = [i for i, (f, tail) in enumerate(written) if not _is_dense(f, tokens[i].size, tail)]
    for i in broken:
        if too_many_stages(headers[i].schedule, tokens[i].shape):
            raise ValueError(
                f"schedule {SCHEDULES[headers[i].schedule]!r} would give this plain picture of "
                f"{headers[i].width}x{headers[i].height} {tokens[i].size} stages, more than the "
                f"{bitstream.MAX_SPARSE_STAGES} that a reader accepts; choose another schedule"
            )
    sparse = [replace(headers[i], dense=False) for i in broken]
    again = _write(coder, sparse, [tokens[i] for i in broken])
    for i, file in zip(broken, again, strict=True):
        written[i] = file
    return [file for file, _ in written]


def _is_dense(file: bytes, tokens: int, tail: int) -> bool:
    return bitstream.keeps_dense_promise(tokens, len(file) - bitstream.PREFIX_BYTES, tail)


def too_many_stages(schedule: int, grid: tuple[int, ...]) -> bool:
    """Whether a file without the dense promise may not have this schedule, by index, and grid."""
    # The other schedules have a few dozen stages at most (docs/schedules.md).
    raster = SCHEDULES[schedule] == "raster"
    return raster and grid[0] * grid[1] > bitstream.MAX_SPARSE_STAGES


def _threads() -> int:
    return torch.get_num_threads()


def _check(header: Header, tokens: Tokens) -> int:
    return bitstream.check(header, tokens.astype("<i4").tobytes())


def _write(
    coder: TokenCoder, headers: Sequence[Header], tokens: Sequence[Tokens]
) -> list[tuple[bytes, int]]:
    """Files, each with the number of tokens that its reader meets in exhausted data."""
    keys = [(h.schedule, grid.shape) for h, grid in zip(headers, tokens, strict=True)]
    return by_group(
        list(zip(headers, tokens, strict=True)),
        keys,
        [grid.size for grid in tokens],
        lambda group: _write_equal(coder, group),
        coder.tokens_at_once,
    )


def _write_equal(
    coder: TokenCoder, files: Sequence[tuple[Header, Tokens]]
) -> list[tuple[bytes, int]]:
    """``_write`` for files of one schedule and grid: tokens, then caption and header on them."""
    headers = [header for header, _ in files]
    grids = torch.from_numpy(np.stack([grid for _, grid in files]))
    checks = [_check(header, grid) for header, grid in files]
    encoder = coder.encoder(grids, SCHEDULES[headers[0].schedule], checks, _threads())
    tails = encoder.symbols_before_output.tolist()
    fields = [np.array(bitstream.header_intervals(header), dtype=np.int32) for header in headers]
    joined = np.concatenate(fields)
    counts = np.array([len(field) for field in fields], dtype=np.int64)
    encoder.push(joined[:, 0], joined[:, 1], counts, bitstream.PROB_BITS, _threads())
    buffer, offsets = encoder.finish()
    payload = buffer.tobytes()
    return [
        (bitstream.prefix(header) + payload[begin:end], tail)
        for header, begin, end, tail in zip(headers, offsets[:-1], offsets[1:], tails, strict=True)
    ]


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
        header, count = self.parsed.header, self.grid[0] * self.grid[1]
        if header.dense and not _is_dense(self.data, count, 0):
            raise self.fault(
                f"the file is damaged or cut: {len(self.data)} bytes cannot hold the {count} "
                f"tokens of an image of {header.width}x{header.height}"
            )
        if not header.dense and too_many_stages(header.schedule, self.grid):
            raise self.fault(
                f"the file is damaged: {count} stages without the dense promise, at most "
                f"{bitstream.MAX_SPARSE_STAGES} are allowed"
            )

    def fault(self, message: str) -> BitstreamError:
        """An error about this file."""
        return BitstreamError(self.label + message)


def unpack(coder: TokenCoder, files: Sequence[OpenFile]) -> list[Tokens]:
    """Decode and check the tokens of files: int32 [h, w] each.

    Args:
        coder: the entropy model of the files' rate.
        files: any schedules and grids.

    Raises:
        BitstreamError: a file that is damaged or cut.
    """
    for file in files:
        file.check_plausible()
    keys = [(file.parsed.header.schedule, file.grid) for file in files]
    sizes = [file.grid[0] * file.grid[1] for file in files]
    return by_group(
        files, keys, sizes, lambda group: _unpack_equal(coder, group), coder.tokens_at_once
    )


def _unpack_equal(coder: TokenCoder, files: Sequence[OpenFile]) -> list[Tokens]:
    """``unpack`` for files of one schedule and grid, together."""
    decoder = coder.decoder(
        b"".join(file.data for file in files),
        np.cumsum([0, *(len(file.data) for file in files)]),
        np.array([file.parsed.state for file in files], dtype=np.uint32),
        np.array([file.parsed.position for file in files], dtype=np.int64),
    )

    def hold_to_promise(remaining: int) -> None:
        if remaining <= bitstream.DENSE_SLACK:
            return
        for file, exhausted in zip(files, decoder.exhausted, strict=True):
            if exhausted and file.parsed.header.dense:
                raise file.fault(
                    f"the file is damaged or cut: its data end with {remaining} tokens to come"
                )

    schedule = SCHEDULES[files[0].parsed.header.schedule]
    grids = coder.decode(
        decoder, schedule, *files[0].grid, on_stage=hold_to_promise, threads=_threads()
    )
    tokens = list(grids.numpy())
    checks = [_check(f.parsed.header, grid) for f, grid in zip(files, tokens, strict=True)]
    for file, valid in zip(files, decoder.finished(checks), strict=True):
        if not valid:
            raise file.fault("the file is damaged or cut: its check does not fit")
    return tokens


def token_grid(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(h, w) of the token map of an image of (height, width) pixels, ``side`` pixels per token."""
    return -(-size[0] // side), -(-size[1] // side)


def checked_tokens(
    grid: Tokens, size: tuple[int, int], token_side: int, codebook_size: int
) -> Tokens:
    """A token map as int32; ValueError unless it fits its image's size and its codebook."""
    array = np.asarray(grid)
    expected = token_grid(size, token_side)
    if array.dtype.kind not in "iu" or array.shape != expected:
        raise ValueError(
            f"tokens are {array.dtype} {array.shape}; an image of {size[1]}x{size[0]} pixels with "
            f"{token_side}-pixel tokens has integers {expected}"
        )
    if array.min() < 0 or array.max() >= codebook_size:
        raise ValueError(
            f"tokens range from {array.min()} to {array.max()}; they must lie in "
            f"0..{codebook_size - 1}"
        )
    return array.astype(np.int32)
