"""Coverage-guided fuzzing of the readers written in Python: containers, captions and colours.

``python tests/fuzz_readers.py TARGET CORPUS [-max_total_time=SECONDS]`` needs atheris
(``pip install atheris``) and goes on until it finds a fault. The first run fills the folder CORPUS.
A reader may only raise what its docstring says.
"""

from __future__ import annotations

import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["percov2"]):
    from percov2 import Codec
    from percov2.colour_spaces import SRGB, from_cicp, from_gamma, icc_profile
    from percov2.container import bitstream, captions
    from percov2.container.bitstream import BitstreamError
    from percov2.container.caption_model import CaptionModel
    from percov2.declared_colours import declared_space, read_declarations
    from percov2.images import ImageWarning, decode_image, to_rgb
    from percov2.picture_structure import StructureError, check_structure, tiff_pages

from PIL import Image

from tools import picture_files, random_model

MAX_PIXELS = 1 << 18
"""Pictures of more pixels are refused, so that a case takes milliseconds."""


def container() -> tuple[Callable[[bytes], None], list[bytes]]:
    folder = random_model.build(Path(tempfile.mkdtemp()) / "model")
    codec = Codec.from_pretrained(folder)
    seeds = [
        codec.compress(Image.new("RGB", (64, 48), "red"), caption=caption, rate=rate, **options)
        for caption in ("", "a red wall")
        for rate in ("fine", "coarse")
        for options in ({}, {"stages": 2}, {"schedule": "raster"})
    ]

    def target(data: bytes) -> None:
        with suppress(BitstreamError):
            bitstream.read(data, MAX_PIXELS)
            for lenient in (False, True):
                codec.decode([data], max_pixels=MAX_PIXELS, allow_truncated=lenient)

    return target, seeds


def caption() -> tuple[Callable[[bytes], None], list[bytes]]:
    codec = Codec.from_pretrained("tiny")
    model = CaptionModel.load(Path(codec.model.folder).parent / "captions")
    texts = ["a red wall", "zwei Türen", "犬", "x" * 200]
    seeds = [bytes([one]) + captions.encode_caption(text)[1] for text in texts for one in range(4)]

    def target(data: bytes) -> None:
        kind, coded = data[:1], data[1:]
        with suppress(BitstreamError):
            if kind and kind[0] % 8 < 6:
                captions.decode_caption(kind[0] % 8, coded)
            elif len(coded) >= 4:
                model.read([(coded, int.from_bytes(coded[:3], "big"), 3)])

    return target, seeds


def colours() -> tuple[Callable[[bytes], None], list[bytes]]:
    import numpy as np

    samples = np.arange(48).reshape(4, 4, 3)
    chunks = (picture_files.cicp(12, 13), picture_files.gama(1.0), picture_files.srgb())
    red = Image.new("RGB", (16, 16), "red")
    webp, pages, jpeg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    red.save(webp, "WEBP")
    red.save(pages, "TIFF", save_all=True, append_images=[red])
    red.save(jpeg, "JPEG", icc_profile=icc_profile(SRGB), progressive=True)
    seeds = [
        *(picture_files.png("rgb", 8, samples, chunk) for chunk in chunks),
        picture_files.png("rgb", 16, samples, picture_files.chunk(b"tRNS", bytes(6))),
        picture_files.avif(red, 12, 13),
        picture_files.jpeg2000(red, b"profile"),
        picture_files.bmp((1, 2, 3), b"MBED", b"", b"profile"),
        picture_files.tiff(samples[..., :1], 4, 0),
        *(stream.getvalue() for stream in (webp, pages, jpeg)),
        b"qoif" + bytes([0, 0, 0, 2, 0, 0, 0, 1, 3, 1, 0xFE, 9, 9, 9, 0xC0]) + bytes(7) + b"\1",
        b"P5 2 1\n# comment\n255\n\0\1",
    ]

    def target(data: bytes) -> None:
        tiff_pages(io.BytesIO(data))
        with suppress(StructureError):
            check_structure(io.BytesIO(data))
        for name in ("PNG", "AVIF", "JPEG2000", "QOI", "BMP"):
            image = Image.new("RGB", (2, 2))
            image.format = name
            read_declarations(image, io.BytesIO(data))
            with suppress(ValueError):
                declared_space(image)
        if len(data) >= 40:
            numbers = [int.from_bytes(data[i : i + 4], "big") / 100000 for i in range(0, 36, 4)]
            for make in (
                lambda: from_cicp(data[36], data[37]),
                lambda: from_gamma(numbers[8], tuple(numbers[:8])),
            ):
                with suppress(ValueError):
                    make()
        with suppress(ValueError):
            to_rgb(decode_image(io.BytesIO(data), MAX_PIXELS))

    return target, seeds


TARGETS = {"container": container, "caption": caption, "colours": colours}


def main() -> None:
    """Write the seeds into an empty corpus, and fuzz."""
    name, corpus = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore", ImageWarning)
    target, seeds = TARGETS[name]()
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        (corpus / f"seed{i}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
