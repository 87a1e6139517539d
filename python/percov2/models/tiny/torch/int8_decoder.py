"""The decoder of the small model as an ONNX graph with int8 convolutions.

The convolutions of residual blocks have int8 inputs and outputs, with scales measured on latents of
training photos. The other layers and the sums run in float32: together, they would cause five times
the error. Weights are the int8 rows of the safetensors file, unchanged.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
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

_BLOCK = re.compile(r"\.conv[12]\.weight")
"""The weights of residual blocks."""
_PERCENTILE = 99.99
"""Share of the inputs and outputs of a layer that the range of int8 holds, in percent."""
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
        latents: sampled latents of training photos, float32 [1, 16, h, w] each, of one shape.

    Raises:
        MissingExtra: onnx is not installed.
        ValueError: no latents or latents of several shapes, or weights that are not int8.
    """
    require("train", "writing graphs", "onnx")
    import onnx
    from onnxruntime import quantization

    if len({one.shape for one in latents}) != 1:
        raise ValueError("give latents of one shape, of at least one photo, to measure the scales")
    weights = folder / "model.safetensors"
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    tensors = read_tensors(weights, *(weight.name for weight in graph.graph.initializer))
    for weight in graph.graph.initializer:
        weight.CopyFrom(onnx.numpy_helper.from_array(tensors[weight.name], weight.name))
    for i, node in enumerate(graph.graph.node):
        node.name = f"n{i}"
    blocks = [node.name for node in graph.graph.node if _BLOCK.search(" ".join(node.input))]
    with tempfile.TemporaryDirectory() as place:
        whole, quantized = Path(place) / "whole.onnx", Path(place) / "quantized.onnx"
        onnx.save(graph, whole)
        with _silent():
            quantization.quantize_static(
                whole,
                quantized,
                _Latents(latents),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_quantize=blocks,
                calibrate_method=quantization.CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": _PERCENTILE},
            )
        graph = onnx.load(quantized)
    _share_weights(graph, weights)
    (folder / "decoder.int8.onnx").write_bytes(graph.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide the quantizer's prints, and its advice of a step that would rename the weights."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _share_weights(graph: Any, weights: Path) -> None:
    """Refer to the stored int8 rows and their factors instead of copies of them.

    Weights of layers in float32 become products of both.
    """
    import onnx

    stored, _ = read_weights(weights, "decoder.", int8=True)
    names: dict[str, str] = {}
    for tensor in graph.graph.initializer:
        name = tensor.name.removesuffix(_QUANTIZED)
        if name != tensor.name and name + SCALE in stored:
            if not np.array_equal(onnx.numpy_helper.to_array(tensor), stored[name]):
                raise ValueError(f"{weights}: {name} would be quantized to other integers")
            names |= {tensor.name: name, name + "_scale": name + SCALE}
        elif name + SCALE in stored:
            _dequantize(graph.graph, tensor, stored)
            names |= {name: name, name + SCALE: name + SCALE}
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


def _dequantize(graph: Any, tensor: Any, stored: dict[str, NDArray[Any]]) -> None:
    """Replace a float32 weight by its stored int8 rows and a node that multiplies them."""
    import onnx

    name, restored = tensor.name, f"{tensor.name}_restored"
    for node in graph.node:
        for i, wanted in enumerate(node.input):
            if wanted == name:
                node.input[i] = restored
    tensor.CopyFrom(onnx.numpy_helper.from_array(stored[name], name))
    graph.initializer.append(onnx.numpy_helper.from_array(stored[name + SCALE], name + SCALE))
    inputs = [name, name + SCALE]
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", inputs, [restored], axis=0))
