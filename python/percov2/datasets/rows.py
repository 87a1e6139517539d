"""Rows of a data set through a codec: callables from batches of columns to batches of columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.batching import Outcome, in_order
from percov2.codec import Codec
from percov2.container import bitstream
from percov2.models.backbone import BackboneOptions, available_cores
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["CompressImages", "DecompressImages", "picture_of"]

Columns: TypeAlias = dict[str, NDArray[Any]]
"""Arrays of equal length by name; values that are no numbers are objects."""


class _Rows:
    """What the two classes share: a codec on the resources of this process."""

    def __init__(
        self,
        model: str | Path,
        device: str | None,
        backbone: BackboneOptions | None,
        jobs: int | None,
        batch_size: int | None,
    ) -> None:
        gpus, cpus = _assigned()
        self._jobs = jobs or cpus or available_cores()
        self._batch_size = batch_size
        chosen = device or ("cuda" if gpus else "cpu")
        self.codec = Codec.from_pretrained(model, chosen, backbone)


def _assigned() -> tuple[float, int]:
    """Return the numbers of GPUs and of whole CPUs that Ray gave this process, 0 without Ray."""
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0, 0
    context = ray.get_runtime_context()
    if context.get_actor_id() is None and context.get_task_id() is None:  # the driver
        return 0, 0
    resources = context.get_assigned_resources()
    return resources.get("GPU", 0), int(resources.get("CPU", 0))


class CompressImages(_Rows):
    """Compress a column of pictures, for ``map_batches``; one codec per object.

    A row that cannot be compressed has no file but an error. Other columns are kept.

    Args:
        model, device, backbone: as for ``Codec.from_pretrained``. Without a device, it is "cuda" if
            Ray assigned a GPU to this process, else "cpu".
        options: encoding options; None for the defaults.
        column: name of the column of pictures: bytes of image files, paths, arrays uint8
            [H, W] or [H, W, 3], or ``{"bytes": …, "path": …}`` as Hugging Face's data sets have.
        caption: name of a column of captions; None for no captions.
        keep: True to keep the column of pictures in the result.
        jobs: pictures in work at the same time; None for the CPUs that Ray assigned, or all cores.
        batch_size: as for ``Codec.compress_many``.

    Raises:
        ValueError: the model, the device or an option does not exist.

    >>> compress = CompressImages(options=EncodeOptions(rate="r002"))
    >>> grey = np.full((1, 48, 64, 3), 128, np.uint8)
    >>> rows = compress({"image": grey, "label": np.array([7])})
    >>> sorted(rows), rows["label"].tolist(), rows["error"].tolist()
    (['bpp', 'error', 'height', 'label', 'pcv2', 'width'], [7], [''])
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        device: str | None = None,
        backbone: BackboneOptions | None = None,
        *,
        options: EncodeOptions | None = None,
        column: str = "image",
        caption: str | None = None,
        keep: bool = False,
        jobs: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, device, backbone, jobs, batch_size)
        self._options = options or EncodeOptions()
        self._column, self._caption, self._keep = column, caption, keep

    def __call__(self, batch: Columns) -> Columns:
        """Return the batch with the columns pcv2, width, height, bpp and error.

        ``pcv2`` has bytes, or None beside an error. ``error`` is "" without one. Raises ValueError
        for a missing column.
        """
        pictures = _column(batch, self._column)
        captions: Any = ""
        if self._caption is not None:
            captions = ["" if one is None else str(one) for one in _column(batch, self._caption)]
        outcomes = list(self.files_of(pictures, picture_of, captions))
        files = [outcome.value for outcome in outcomes]
        headers = [None if data is None else bitstream.read(data).header for data in files]
        bpp = [
            np.nan if header is None or data is None else 8 * len(data) / _pixels(header)
            for data, header in zip(files, headers, strict=True)
        ]
        made = {
            "pcv2": _objects(files),
            "width": np.array([header.width if header else 0 for header in headers]),
            "height": np.array([header.height if header else 0 for header in headers]),
            "bpp": np.array(bpp),
            "error": _errors(outcomes),
        }
        return _rest(batch, None if self._keep else self._column) | made

    def files_of(
        self,
        inputs: Iterable[Any],
        load: Callable[[Any], Any],
        caption: str | Iterable[str] = "",
    ) -> Iterator[Outcome[bytes]]:
        """Yield the ``.pcv2`` file of every input, as ``Codec.compress_many``."""
        numbers: dict[str, Any] = {"jobs": self._jobs, "batch_size": self._batch_size}
        return self.codec.compress_many(
            inputs, self._options, load=load, caption=caption, **numbers
        )


class DecompressImages(_Rows):
    """Restore a column of ``.pcv2`` files, for ``map_batches``; one codec per object.

    A row that cannot be restored has no picture but an error. Other columns are kept.

    Args:
        model, device, backbone, jobs, batch_size: as for ``CompressImages``.
        options: decoding options; None for the defaults.
        column: name of the column of files: bytes or paths.
        form: "array" for pictures uint8 [H, W, 3], or a Pillow format such as "PNG" for bytes.
        keep: True to keep the column of files in the result.

    Raises:
        ValueError: the model, the device or an option does not exist.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        device: str | None = None,
        backbone: BackboneOptions | None = None,
        *,
        options: DecodeOptions | None = None,
        column: str = "pcv2",
        form: str = "array",
        keep: bool = False,
        jobs: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, device, backbone, jobs, batch_size)
        if form != "array" and form not in Image.registered_extensions().values():
            raise ValueError(f"form must be 'array' or a format of Pillow, not {form!r}")
        self._options, self._form = options or DecodeOptions(), form
        self._column, self._keep = column, keep

    def __call__(self, batch: Columns) -> Columns:
        """Return the batch with the columns image and error.

        ``image`` has a picture, or None beside an error. ``error`` is "" without one. Raises
        ValueError for a missing column.
        """
        files = _column(batch, self._column)
        outcomes = list(self._pictures_of(files, None))
        form = np.asarray if self._form == "array" else self._encoded
        pictures = [None if one.value is None else form(one.value) for one in outcomes]
        made = {"image": _objects(pictures), "error": _errors(outcomes)}
        return _rest(batch, None if self._keep else self._column) | made

    def files_of(
        self, inputs: Iterable[Any], load: Callable[[Any], Any]
    ) -> Iterator[Outcome[bytes]]:
        """Yield the picture file of every input, in the format of this object."""

        def encoded(outcome: Outcome[Image.Image]) -> Outcome[bytes]:
            if outcome.value is None:
                return Outcome(outcome.input, error=outcome.error)
            return Outcome(outcome.input, self._encoded(outcome.value))

        return in_order(encoded, self._pictures_of(inputs, load), self._jobs, 2 * self._jobs)

    def _pictures_of(
        self, inputs: Iterable[Any], load: Callable[[Any], Any] | None
    ) -> Iterator[Outcome[Image.Image]]:
        numbers: dict[str, Any] = {"jobs": self._jobs, "batch_size": self._batch_size}
        return self.codec.decompress_many(inputs, self._options, load=load, **numbers)

    def _encoded(self, image: Image.Image) -> bytes:
        stream = io.BytesIO()
        fast = {"compress_level": 1} if self._form == "PNG" else {}
        image.save(stream, self._form, **fast)
        return stream.getvalue()


def picture_of(value: Any) -> Any:
    """Return what ``Codec.compress`` takes for a picture of a data set.

    Raises:
        ValueError: None, or a dictionary without a picture.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError("the row has no picture")
    return value


def _column(batch: Columns, name: str) -> NDArray[Any]:
    if name not in batch:
        raise ValueError(f"there is no column {name!r}; there are {', '.join(sorted(batch))}")
    return batch[name]


def _rest(batch: Columns, dropped: str | None) -> Columns:
    return {name: values for name, values in batch.items() if name != dropped}


def _objects(values: list[Any]) -> NDArray[Any]:
    """Return values as a column of objects, which NumPy does not take apart."""
    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def _errors(outcomes: list[Any]) -> NDArray[Any]:
    return np.array([str(one.error) if one.error else "" for one in outcomes], object)


def _pixels(header: Any) -> int:
    return int(header.height * header.width)
