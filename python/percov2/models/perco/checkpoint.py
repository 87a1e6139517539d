"""Conversion of the tensors of PerCo (SD v2.1)'s published checkpoints to our names and shapes.

docs/reference/perco.md has the sources of the published names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Tensors", "hyper_encoder_tensors", "quantizer_tensors", "unet_tensors"]

Tensors = dict[str, Tensor]

# Part of a published name -> ours; the order matters.
_HYPER_ENCODER = (
    (r"^backbone\.", "body."),
    (r"\.layers\.", ".body."),
    (r"\.conv_a\.", ".trunk."),
    (r"\.conv_b\.", ".mask."),
    (r"\.conv\.", ".body."),
)
_QUANTIZER = "quantizer."
# Training state.
_UNUSED = ("_codebook.initted", "_codebook.embed_avg")
_EXTENDED = "conv_in_extended."
_ORIGINAL = "conv_in."


def hyper_encoder_tensors(state: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of ``HyperEncoder`` from a ``hyper_enc`` state dict.

    Raises ValueError if it has no ``backbone``, as in the project's first release.
    """
    tensors = {}
    for name, value in state.items():
        if not name.startswith(_QUANTIZER):
            for pattern, replacement in _HYPER_ENCODER:
                name = re.sub(pattern, replacement, name)
            tensors[name] = value
    if not any(name.startswith("body.") for name in tensors):
        raise ValueError(
            "hyper_enc has no tensors backbone.*; only checkpoints of the release of June 2024 or "
            "later can be imported"
        )
    return tensors


def quantizer_tensors(state: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of ``VectorQuantizer`` from a ``hyper_enc`` state dict.

    Linear layers become 1×1 convolutions. Our quantizer multiplies a code by sqrt(D) before the
    projection and the original does not, so the projection is divided by sqrt(D). Raises ValueError
    for a missing or unknown tensor, a wrong shape, or codes without unit length, as in a codebook
    for Euclidean distances.
    """
    found = {n.removeprefix(_QUANTIZER): v for n, v in state.items() if n.startswith(_QUANTIZER)}
    wanted = [f"project_{way}.{part}" for way in ("in", "out") for part in ("weight", "bias")]
    wanted += ["_codebook.embed", "_codebook.cluster_size"]
    missing = [_QUANTIZER + name for name in wanted if name not in found]
    unknown = [_QUANTIZER + name for name in found if name not in (*wanted, *_UNUSED)]
    if missing or unknown:
        raise ValueError(f"hyper_enc: missing tensors {missing}, unexpected tensors {unknown}")
    codebook = found["_codebook.embed"]
    if codebook.ndim != 3 or codebook.shape[0] != 1:
        raise ValueError(
            f"hyper_enc: quantizer._codebook.embed has shape {tuple(codebook.shape)} instead of "
            "(1, codebook size, dimension): one codebook"
        )
    codebook = codebook[0].float()
    lengths = codebook.norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        raise ValueError(
            f"hyper_enc: the codes' lengths range from {lengths.min():.3g} to {lengths.max():.3g}, "
            "but a codebook for cosine similarity has unit vectors; checkpoints with a Euclidean "
            "codebook cannot be imported"
        )
    project_in, project_out = found["project_in.weight"], found["project_out.weight"]
    return {
        "codebook": codebook,
        "usage": found["_codebook.cluster_size"].flatten().float(),
        "project_in.weight": project_in[:, :, None, None],
        "project_in.bias": found["project_in.bias"],
        "project_out.weight": project_out[:, :, None, None].float() / codebook.shape[1] ** 0.5,
        "project_out.bias": found["project_out.bias"],
    }


def unet_tensors(state: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of ``UNet2DConditionModel`` with a widened ``conv_in`` from a ``unet``.

    The published network has two first convolutions: the unused frozen one of Stable Diffusion, and
    ``conv_in_extended``, which also reads z_hat; ValueError without it.
    """
    if _EXTENDED + "weight" not in state:
        raise ValueError(
            "unet has no tensor conv_in_extended.weight, so it is a plain Stable Diffusion "
            "network, not PerCo's"
        )
    return {
        _ORIGINAL + name.removeprefix(_EXTENDED) if name.startswith(_EXTENDED) else name: value
        for name, value in state.items()
        if not name.startswith(_ORIGINAL)
    }
