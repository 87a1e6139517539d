"""The networks of the small model as ONNX graphs, written beside their weights.

Weights stay in the safetensors files; ``percov2.models.tiny.graphs`` says how a graph refers to
them.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from percov2.extras import require
from percov2.models.checksums import CHECKSUMS
from percov2.models.tiny.graphs import WEIGHTS_HASH
from percov2.models.tiny.torch.backbone import TinyTorchModel

__all__ = ["shrink", "write_graphs"]

_OPSET = 18


class _Flow(nn.Module):
    """The flow transformer with positional arguments."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, sequence: Tensor, pooled: Tensor) -> Tensor:
        """Return the network's output [B, 16, h, w]; see ``flow.estimate_clean``."""
        return self.transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def write_graphs(folder: Path) -> None:
    """Write the graphs of every network of a small model's folder, in float32.

    A graph of an int8 decoder, which belongs to other weights, and the folder's checksums are
    removed.

    Raises:
        MissingExtra: onnx is not installed.
        ValueError: the folder is no small model.
    """
    require("train", "writing graphs", "onnx")
    (folder / CHECKSUMS).unlink(missing_ok=True)
    model = TinyTorchModel(folder)  # of its own, because the weights are overwritten
    grid = {0: "batch", 2: "height", 3: "width"}
    image, latents = torch.zeros(1, 3, 64, 96), torch.zeros(1, 16, 8, 12)
    autoencoder = model.autoencoder.to(memory_format=torch.contiguous_format)
    home = folder / "autoencoder"
    (home / "decoder.int8.onnx").unlink(missing_ok=True)
    _write(home / "encoder.onnx", autoencoder.encoder, "encoder.", {"images": (image, grid)})
    _write(home / "decoder.onnx", autoencoder.decoder, "decoder.", {"latents": (latents, grid)})
    for rate in model.config.rates:
        path = folder / rate.name / "hyper_encoder" / "graph.onnx"
        network = model.hyper_encoder(rate.name).to(memory_format=torch.contiguous_format)
        _write(path, network, "", {"latents": (latents, grid)})
    channels = int(model.flow.config["in_channels"])
    sequence, pooled = model.text_encoder([""])
    inputs = {
        "x": (torch.zeros(1, channels, 8, 12), grid),
        "t": (torch.zeros(1), {0: "batch"}),
        "sequence": (sequence, {0: "batch"}),
        "pooled": (pooled, {0: "batch"}),
    }
    _write(folder / "flow" / "graph.onnx", _Flow(model.flow), "", inputs, "transformer.")


def _write(
    path: Path,
    network: nn.Module,
    prefix: str,
    inputs: dict[str, tuple[Tensor, dict[int, str]]],
    hidden: str = "",
) -> None:
    """Write the graph of a network.

    Its weights are named as in the safetensors file beside it: ``prefix`` and the module's own
    names, without ``hidden`` at their beginning.
    """
    import onnx

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for parameter in network.parameters():  # the exporter joins weights of equal values
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    buffer: Any = io.BytesIO()  # the exporter writes to streams, too
    examples = tuple(example for example, _ in inputs.values())
    axes = {name: axes for name, (_, axes) in inputs.items()}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the tracer warns of checks that it leaves out
        torch.onnx.export(
            network.eval(),
            examples,
            buffer,
            dynamo=False,
            opset_version=_OPSET,
            do_constant_folding=False,
            input_names=list(inputs),
            output_names=["output"],
            dynamic_axes=axes | {"output": {0: "batch", 2: "rows", 3: "columns"}},
        )
    graph = onnx.load_model_from_string(buffer.getvalue())
    names: dict[str, str] = {}
    for weight in graph.graph.initializer:
        names[weight.name] = prefix + weight.name.removeprefix(hidden)
        _refer(weight, names[weight.name])
    shrink(graph.graph, names)
    entry = graph.metadata_props.add()
    weights = path.with_name("model.safetensors").read_bytes()
    entry.key, entry.value = WEIGHTS_HASH, hashlib.sha256(weights).hexdigest()
    path.write_bytes(graph.SerializeToString(deterministic=True))


def shrink(graph: Any, names: dict[str, str]) -> None:
    """Join nodes that compute the same values, and give values short names.

    The tracer repeats constants and the arithmetic of shapes for every layer. ``names`` maps the
    names of all initializers to their new ones; inputs and outputs of the graph keep theirs.
    """
    names |= {value.name: value.name for value in [*graph.input, *graph.output]}
    outputs = {value.name for value in graph.output}
    known: dict[tuple[Any, ...], list[str]] = {}
    kept: list[Any] = []
    for node in graph.node:
        node.name = node.doc_string = ""
        node.input[:] = [names[name] if name else "" for name in node.input]
        attributes = sorted(entry.SerializeToString(deterministic=True) for entry in node.attribute)
        key = (node.domain, node.op_type, tuple(node.input), tuple(attributes), len(node.output))
        if key in known and not outputs & set(node.output):
            names.update(zip(node.output, known[key], strict=True))
            continue
        for i, name in enumerate(node.output):
            node.output[i] = names.setdefault(name, f"v{len(kept):x}.{i}")
        known.setdefault(key, list(node.output))
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]


def _refer(weight: Any, name: str) -> None:
    """Take the values from an initializer: the runtime gets them by name."""
    import onnx

    weight.ClearField("raw_data")
    weight.name = name
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "model.safetensors"
