"""Iterables of pictures and files through a codec: read, convert, networks, coder, all at once.

``Codec.compress_many`` and ``Codec.decompress_many`` describe the arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.batching import Outcome, Pipeline
from percov2.container import bitstream
from percov2.entropy import rans
from percov2.entropy.ranges import whole_number
from percov2.inputs import as_files, rgb_array
from percov2.models.backbone import available_cores
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from percov2.codec import Codec

__all__ = ["CaptionSource", "compress_many", "decompress_many"]

CaptionSource: TypeAlias = "str | Iterable[str] | Callable[[list[Image.Image]], Sequence[str]]"
"""A caption for all pictures, one for each, or a function from pictures to one caption each."""
_BATCH_ON_GPU = 32
_PIXELS_AT_ONCE = 1 << 23
"""Pixels in work at the same time. A larger picture is in work alone."""
_MOST_JOBS = 1024

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")


def compress_many(
    codec: Codec,
    inputs: Iterable[Item],
    options: EncodeOptions,
    load: Callable[[Item], Any] | None,
    caption: CaptionSource,
    jobs: int | None,
    batch_size: int | None,
) -> Iterator[Outcome[bytes]]:
    """Yield the outcome of every picture, as ``Codec.compress_many``."""

    def read(pair: tuple[Item, str]) -> _Captioned:
        picture = pair[0] if load is None else load(pair[0])
        return _Captioned(rgb_array(picture, options.max_pixels), pair[1])

    def work(codec: Codec, pictures: list[_Captioned]) -> Sequence[bytes]:
        arrays = [one.array for one in pictures]
        texts = [one.caption for one in pictures]
        if callable(caption):
            texts = list(caption([Image.fromarray(array) for array in arrays]))
        return codec.compress(arrays, options, caption=texts)

    def pixels(picture: _Captioned) -> int:
        return picture.array.shape[0] * picture.array.shape[1]

    pairs: Iterable[tuple[Item, str]]
    if isinstance(caption, str) or callable(caption):
        pairs = zip(inputs, repeat(caption if isinstance(caption, str) else ""), strict=False)
    else:
        pairs = zip(inputs, caption, strict=True)
    outcomes = _pipeline(codec, read, work, pixels, jobs, batch_size).run(pairs)
    return (dataclasses.replace(one, input=one.input[0]) for one in outcomes)


class _Captioned(NamedTuple):
    """A picture uint8 [H, W, 3] and its caption."""

    array: NDArray[np.uint8]
    caption: str


def decompress_many(
    codec: Codec,
    inputs: Iterable[Item],
    options: DecodeOptions,
    load: Callable[[Item], Any] | None,
    jobs: int | None,
    batch_size: int | None,
) -> Iterator[Outcome[Image.Image]]:
    """Yield the outcome of every file, as ``Codec.decompress_many``."""

    def read(item: Item) -> tuple[bytes, int]:
        (data,) = as_files(item if load is None else load(item))[1]
        header = bitstream.read(data, options.max_pixels).header
        return data, header.height * header.width

    def work(codec: Codec, files: list[tuple[bytes, int]]) -> Sequence[Image.Image]:
        return codec.decompress([data for data, _ in files], options)

    def pixels(file: tuple[bytes, int]) -> int:
        return file[1]

    return _pipeline(codec, read, work, pixels, jobs, batch_size).run(inputs)


def _pipeline(
    codec: Codec,
    load: Callable[[Item], Loaded],
    work: Callable[[Codec, list[Loaded]], Sequence[Result]],
    pixels: Callable[[Loaded], int],
    jobs: int | None,
    batch_size: int | None,
) -> Pipeline[Item, Loaded, Result]:
    on_cpu = str(codec.model.device) == "cpu"
    size = 1 if on_cpu else _BATCH_ON_GPU
    loaders = whole_number("jobs", available_cores() if jobs is None else jobs, 1, _MOST_JOBS)
    batch = whole_number("batch_size", size if batch_size is None else batch_size, 1, _MOST_JOBS)
    workers = loaders if codec.model.parallel else 1
    # With several jobs, a thread for each is faster than all threads for one after the other.
    one = codec.with_threads(1) if workers > 1 else codec

    def run(some: list[Loaded]) -> Sequence[Result]:
        with rans.limited_threads(1 if workers > 1 else rans.default_threads()):
            return work(one, some)

    return Pipeline(load, run, pixels, batch, loaders, workers, _PIXELS_AT_ONCE)
