"""The decoder of the small model as an ONNX graph with int8 convolutions.

The graph quantizes each layer's input with a scale measured on latents of training photos. Its
weights are the int8 rows of the safetensors file, unchanged.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.extras import require
from percov2.models.stored_tensors import SCALE, read_tensors, read_weights
from percov2.models.tiny.torch.graphs import shrink

__all__ = ["write_int8_decoder"]

_QUANTIZED = "_quantized"
"""Suffix that the quantizer gives to an int8 weight; its factors end in ``_scale``."""


class _Latents:
    """The latents one by one, as the quantizer asks for them."""

    def __init__(self, latents: Sequence[NDArray[np.float32]]) -> None:
        self._left: Iterator[NDArray[np.float32]] = iter(latents)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next input of the graph; None at the end."""
        found = next(self._left, None)
        return None if found is None else {"latents": found}


def write_int8_decoder(folder: Path, latents: Sequence[NDArray[np.float32]]) -> None:
    """Write ``decoder.int8.onnx`` beside ``decoder.onnx`` in the autoencoder's folder.

    Args:
        folder: the folder ``autoencoder`` of a small model, with int8 weights.
        latents: sampled latents of training photos, float32 [1, 16, h, w] each.

    Raises:
        MissingExtra: onnx is not installed.
        ValueError: no latents, or weights that are not int8.
    """
    require("train", "writing graphs", "onnx")
    import onnx
    from onnxruntime import quantization

    if not latents:
        raise ValueError("give latents of at least one photo to measure the scales")
    weights = folder / "model.safetensors"
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    tensors = read_tensors(weights, *(weight.name for weight in graph.graph.initializer))
    for weight in graph.graph.initializer:
        weight.CopyFrom(onnx.numpy_helper.from_array(tensors[weight.name], weight.name))
    with tempfile.TemporaryDirectory() as place:
        whole, quantized = Path(place) / "whole.onnx", Path(place) / "quantized.onnx"
        onnx.save(graph, whole)
        logging.disable(logging.WARNING)  # it advises a step that would rename the weights
        try:
            quantization.quantize_static(
                whole,
                quantized,
                _Latents(latents),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        graph = onnx.load(quantized)
    _share_weights(graph, weights)
    (folder / "decoder.int8.onnx").write_bytes(graph.SerializeToString(deterministic=True))


def _share_weights(graph: Any, weights: Path) -> None:
    """Refer to the stored int8 rows and their factors instead of copies of them."""
    import onnx

    stored, _ = read_weights(weights, "decoder.", int8=True)
    names: dict[str, str] = {}
    for tensor in graph.graph.initializer:
        name = tensor.name.removesuffix(_QUANTIZED)
        if name != tensor.name and name + SCALE in stored:
            if not np.array_equal(onnx.numpy_helper.to_array(tensor), stored[name]):
                raise ValueError(f"{weights}: {name} would be quantized to other integers")
            names |= {tensor.name: name, name + "_scale": name + SCALE}
    if not names:
        raise ValueError(f"{weights} has no int8 weights; export the model with int8 weights")
    for i, tensor in enumerate(graph.graph.initializer):
        inline = tensor.name not in names
        tensor.name = names.setdefault(tensor.name, f"c{i:x}")
        if not inline:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", weights.name
    shrink(graph.graph, names)
