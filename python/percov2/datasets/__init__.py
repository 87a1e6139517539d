"""Data sets: shards of pictures through a codec, on one machine or on a Ray cluster.

``CompressImages`` and ``DecompressImages`` are callables for ``ray.data.Dataset.map_batches``. They
need no Ray themselves. ``PictureDecoder`` restores pictures in data loaders.
"""

from percov2.datasets.loaders import PictureDecoder
from percov2.datasets.rows import CompressImages, DecompressImages

__all__ = ["CompressImages", "DecompressImages", "PictureDecoder"]
