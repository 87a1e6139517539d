"""Pillow plugin: ``Image.open`` and ``Image.save`` for ``.pcv2`` files.

``import percov2.pillow`` registers the format "PCV2". Opening a picture reads its header only. The
codec, with its runtime and networks, is loaded when the first picture is loaded or saved.

>>> import io
>>> stream = io.BytesIO()
>>> Image.new("RGB", (64, 48), "grey").save(stream, "PCV2", rate="r002", caption="a grey wall")
>>> with Image.open(stream) as image:
...     image.size, image.info["rate"]
...     image.load() and image.info["caption"]
((64, 48), 'r002')
'a grey wall'
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from PIL import Image, ImageFile

from percov2.container import bitstream
from percov2.container.bitstream import BitstreamError
from percov2.container.captions import decode_caption
from percov2.models.config import EMBEDDED, embedded_rate
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from percov2.codec import Codec, DecodedFile
    from percov2.container.bitstream import Header
    from percov2.models.backbone import BackboneOptions

__all__ = ["EXTENSION", "FORMAT", "MIME_TYPE", "Pcv2ImageFile", "register"]

FORMAT, EXTENSION, MIME_TYPE = "PCV2", ".pcv2", "image/x-pcv2"
_HEAD_BYTES = 8192
"""Bytes that hold every header: a caption has at most 4,096."""
_MOST_BYTES = 1 << 26
"""Largest file, as of ``percov2 info``."""
_DEFAULT_MODEL = "tiny"


class _Chosen(NamedTuple):
    """The device and options of a registered model."""

    device: str = "cpu"
    options: BackboneOptions | None = None


class _Codecs:
    """The codecs of this process: one per model, made on first use.

    A forked child makes its own, because another thread of the parent may hold a lock of theirs.
    """

    def __init__(self) -> None:
        self._chosen: dict[str, _Chosen] = {}
        self._made: dict[str, Codec] = {}
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock, self._inherited, self._made = threading.Lock(), self._made, {}

    def choose(self, model: str, chosen: _Chosen) -> None:
        with self._lock:
            if chosen != _Chosen() and chosen != self._chosen.get(model):
                self._made.pop(model, None)
                self._chosen[model] = chosen
            self._chosen.setdefault(model, chosen)

    def get(self, model: str) -> Codec:
        """Return the codec of a model.

        Raises:
            ValueError: no such model or device, or an option that does not fit.
            MissingExtra: the model needs torch.
        """
        with self._lock:
            if model not in self._made:
                self._made[model] = self._opened(model)
            return self._made[model]

    def _opened(self, model: str) -> Codec:
        from percov2.codec import Codec

        device, options = self._chosen.get(model, _Chosen())
        codec = Codec.from_pretrained(_place(model), device, options)
        if _is_worker() and (options is None or options.threads is None):
            return codec.with_threads(1)  # the workers of a loader keep all cores busy together
        return codec

    def of_file(self, header: Header) -> Codec:
        """Return the codec of the model that wrote a file.

        Raises:
            BitstreamError: neither an embedded model nor a registered one did.
            ValueError, MissingExtra: as for ``get``.
        """
        if known := embedded_rate(header.model_id):
            return self.get(known[0])
        for model in self._chosen.keys() - {_DEFAULT_MODEL}:
            codec = self.get(model)
            if header.model_id in [codec.model_id(rate.name) for rate in codec.config.rates]:
                return codec
        names = ", ".join(dict.fromkeys([_DEFAULT_MODEL, *self._chosen]))
        raise BitstreamError(
            f"it needs the model with id {header.model_id:04x}, which is not among {names}; call "
            "percov2.pillow.register(MODEL) with the model that wrote the file"
        )


def _is_worker() -> bool:
    """Return True in a child process of multiprocessing, such as a worker of a data loader."""
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


_CODECS = _Codecs()


class Pcv2ImageFile(ImageFile.ImageFile):
    """A ``.pcv2`` file that Pillow has opened.

    Attributes:
        options: the decoding options. Set them before the picture is loaded. ``allow_truncated``
            is also on while ``ImageFile.LOAD_TRUNCATED_IMAGES`` is. Pillow's limit on pixels
            replaces ``max_pixels``.
        info: "bytes" (size of the file), "bpp", "model_id", "model" and "rate" (None for a model
            that is not embedded), and "caption" (None if a caption model must read it). Loading
            adds the name of the rate, the caption, and "stages" and "stage_count": the file holds
            so many stages of so many, and the decoder draws the others.
    """

    format, format_description = FORMAT, "percov2 compressed photo"

    def _open(self) -> None:
        assert self.fp is not None
        self.options = DecodeOptions()
        self._start = self.fp.tell()
        head = self.fp.read(_HEAD_BYTES)
        size = len(head)
        if size == _HEAD_BYTES:
            size = self.fp.seek(0, os.SEEK_END) - self._start
        try:
            # Image.open applies Pillow's limit on pixels to the size.
            self._header = bitstream.read(head, bitstream.MAX_SIDE**2).header
            caption = self._stored_caption()
        except BitstreamError as error:
            raise SyntaxError(str(error)) from error
        self._size, self._mode = (self._header.width, self._header.height), "RGB"
        self.tile = [("pcv2", (0, 0, *self._size), self._start, self._mode)]  # type: ignore[list-item]
        model, rate = embedded_rate(self._header.model_id) or (None, None)
        self.info |= {
            "bytes": size,
            "bpp": 8 * size / (self._header.width * self._header.height),
            "model_id": f"{self._header.model_id:04x}",
            "model": model,
            "rate": rate,
            "caption": caption,
        }

    def _stored_caption(self) -> str | None:
        codec, coded = self._header.caption_codec, self._header.caption
        return None if codec == bitstream.CAPTION_MODEL else decode_caption(codec, coded)

    def load(self) -> Image.core.PixelAccess | None:
        """Decode the file and paint the picture; return the pixels.

        Raises:
            OSError: the file is truncated or damaged, or its model is not known or cannot be
                opened.
            ValueError: the file is closed, or the model rejects an option.
        """
        if self.tile and self.tile[0][0] == "pcv2":
            codec, decoded, options = self._decoded()
            (picture,) = codec.paint([decoded], options)
            self.info |= {
                "model": codec.config.name,
                "rate": decoded.rate.name,
                "caption": decoded.caption,
                "stages": decoded.stages,
                "stage_count": decoded.stage_count,
            }
            if self.fp and self._exclusive_fp:
                self.fp.close()
            self.fp = io.BytesIO(picture.tobytes())
            self.tile = [("raw", (0, 0, *self.size), 0, self.mode)]  # type: ignore[list-item]
        return super().load()

    def load_seek(self, pos: int) -> None:
        """Stay: the pixels are at the start of their stream."""

    def verify(self) -> None:
        """Decode and check the tokens, without painting; close the file.

        Errors are those of ``load``.
        """
        if self.tile and self.tile[0][0] == "pcv2":
            self._decoded()
        super().verify()

    def _decoded(self) -> tuple[Codec, DecodedFile, DecodeOptions]:
        data = self._data()
        options = dataclasses.replace(
            self.options,
            max_pixels=bitstream.MAX_SIDE**2,
            allow_truncated=self.options.allow_truncated or bool(ImageFile.LOAD_TRUNCATED_IMAGES),
        )
        try:
            codec = _CODECS.of_file(self._header)
        except (ImportError, ValueError) as error:
            raise OSError(f"cannot load this image: {error}") from error
        try:
            (decoded,) = codec.decode([data], options)
        except BitstreamError as error:
            raise OSError(_reason(codec, data, options, error)) from error
        return codec, decoded, options

    def _data(self) -> bytes:
        """Return the whole file, which must still be open."""
        if self.fp is None or self.fp.closed:
            raise ValueError("the file was closed before the image was loaded")
        self.fp.seek(self._start)
        data = self.fp.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise OSError(f"not a .pcv2 file: it is longer than {_MOST_BYTES} bytes")
        return data


def _reason(codec: Codec, data: bytes, options: DecodeOptions, error: BitstreamError) -> str:
    """Return the message for a file that was refused. The part of a truncated file has a use."""
    reason = f"cannot load this image: {error}"
    if options.allow_truncated:
        return reason
    try:
        (part,) = codec.decode([data], options, allow_truncated=True)
    except BitstreamError:
        return reason
    return (
        f"image file is truncated ({error}); set ImageFile.LOAD_TRUNCATED_IMAGES = True to restore "
        f"{part.stages} of its {part.stage_count} stages and draw the others"
    )


def _accept(prefix: bytes) -> bool | str:
    """Return True for a ``.pcv2`` file, and the reason for one of another version."""
    if not bitstream.is_file(prefix):
        return False
    if fault := bitstream.version_fault(prefix):
        return f"image file could not be identified: {fault}"
    return True


def _save(image: Image.Image, stream: IO[bytes], _: str | bytes) -> None:
    """Write a picture with the options that were given to ``Image.save``."""
    given = image.encoderinfo
    names = [field.name for field in dataclasses.fields(EncodeOptions) if field.name in given]
    codec = _CODECS.get(_name(given.get("model", _DEFAULT_MODEL)))
    data = codec.compress(
        image,
        given.get("options"),
        caption=given.get("caption") or "",
        **{name: given[name] for name in names},
    )
    stream.write(data)


def _name(model: str | os.PathLike[str]) -> str:
    """Return a name of a model that stays true if the process changes its folder."""
    name = os.fspath(model)
    return os.path.abspath(name) if name != _DEFAULT_MODEL and os.path.isdir(name) else name


def _place(model: str) -> str | Path:
    """Return what to open for a name. Files of the embedded model never need another folder."""
    return EMBEDDED / model if model == _DEFAULT_MODEL else model


def register(
    model: str | os.PathLike[str] = _DEFAULT_MODEL,
    device: str = "cpu",
    options: BackboneOptions | None = None,
) -> None:
    """Make Pillow open and save ``.pcv2`` files. Importing this module does so for "tiny".

    A call is needed for other models, and to choose a device or a number of threads. Further calls
    without options change nothing.

    Args:
        model: a model whose files are read, as for ``Codec.from_pretrained``. ``Image.save`` uses
            it if its argument ``model`` is the same.
        device: device of its networks.
        options: backbone options, such as ``BackboneOptions(threads=1)``. None for the defaults,
            but worker processes of ``multiprocessing`` then use one thread.

    Raises:
        ValueError: no such model or device, or an option that does not fit.
        MissingExtra: the model needs torch.
    """
    name, chosen = _name(model), _Chosen(device, options)
    if name != _DEFAULT_MODEL or chosen != _Chosen():
        from percov2.codec import Codec

        Codec.from_pretrained(_place(name), *chosen)  # a wrong choice fails here
    _CODECS.choose(name, chosen)
    Image.register_open(FORMAT, Pcv2ImageFile, _accept)
    Image.register_save(FORMAT, _save)
    Image.register_extension(FORMAT, EXTENSION)
    Image.register_mime(FORMAT, MIME_TYPE)


register()
