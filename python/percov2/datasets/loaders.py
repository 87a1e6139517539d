"""Restoration of ``.pcv2`` files in data loaders."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from percov2.codec import Codec
from percov2.options import DecodeOptions

__all__ = ["PictureDecoder"]


class PictureDecoder:
    """A decoder for ``webdataset.WebDataset(...).decode``: ``.pcv2`` members become pictures.

    It can be sent to workers of any start method. Each worker uses one thread.

    Args:
        model: as for ``Codec.from_pretrained``.
        options: decoding options; None for the defaults.

    Raises:
        ValueError: the model does not exist.

    >>> from percov2 import Codec
    >>> data = Codec.from_pretrained("tiny").compress(Image.new("RGB", (64, 48)), rate="r002")
    >>> decode = PictureDecoder()
    >>> decode(".pcv2", data).size, decode(".txt", b"words")
    ((64, 48), None)
    """

    def __init__(self, model: str | Path = "tiny", options: DecodeOptions | None = None) -> None:
        self._codec = Codec.from_pretrained(model).with_threads(1)
        self._options = options or DecodeOptions()

    def __call__(self, key: str, data: bytes) -> Image.Image | None:
        """Return the picture of a member whose ``key`` ends in ".pcv2"; None for others.

        Raises BitstreamError for an invalid file.
        """
        if not key.lower().endswith(".pcv2"):
            return None
        return self._codec.decompress(data, self._options)
