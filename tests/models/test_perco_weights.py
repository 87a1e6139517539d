"""PerCo's published tensors give the outputs of plain code and of the original libraries."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oracles import reference_perco as reference
from percov2.models.perco.checkpoint import hyper_encoder_tensors, quantizer_tensors, unet_tensors
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer

PUBLISHED = {"n": 192, "m": 320, "codes": 256, "dim": 32}
SMALL = {"n": 8, "m": 12, "codes": 16, "dim": 4}


def ours(state: dict[str, Tensor], grid: int, sizes: dict[str, int]) -> tuple:
    encoder = HyperEncoder(
        4, sizes["n"], sizes["m"], reference.GRIDS[grid], rectified_attention=True
    )
    quantizer = VectorQuantizer(sizes["m"], sizes["codes"], sizes["dim"], sizes["m"])
    encoder.load_state_dict(hyper_encoder_tensors(state))
    quantizer.load_state_dict(quantizer_tensors(state))
    return encoder.eval(), quantizer.eval()


@pytest.mark.parametrize("grid", reference.GRIDS)
@pytest.mark.parametrize(
    ("sizes", "positions"), [(PUBLISHED, (1, 16, 16)), (SMALL, (3, 16, 24))], ids=["full", "small"]
)
@torch.inference_mode()
def test_same_weights_give_the_same_outputs_and_indices(grid, sizes, positions):
    state = reference.random_state(grid, **sizes, seed=grid)
    encoder, quantizer = ours(state, grid, sizes)
    batch, height, width = positions
    latents = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))
    expected = reference.hyper_latents(state, latents, grid)
    found = encoder(latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    indices, z_hat = reference.quantize(state, expected)
    assert torch.equal(quantizer.tokens(found).long(), indices)
    torch.testing.assert_close(quantizer.lookup(indices), z_hat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [PUBLISHED, SMALL], ids=["full", "small"])
@torch.inference_mode()
def test_same_indices_for_hyper_latents_in_all_directions(sizes):
    state = reference.random_state(64, **sizes, seed=3)
    _, quantizer = ours(state, 64, sizes)
    z = torch.randn(2, sizes["m"], 24, 25, generator=torch.Generator().manual_seed(2))
    indices, z_hat = reference.quantize(state, z)
    assert len(indices.unique()) > 0.9 * sizes["codes"]
    assert torch.equal(quantizer.tokens(z).long(), indices)
    torch.testing.assert_close(quantizer.lookup(indices), z_hat, rtol=1e-5, atol=1e-6)


def test_sizes_are_those_that_the_original_states():
    # Parameters without the quantizer, as the original's source states them.
    for grid, count in {64: 4_080_128, 8: 5_868_032}.items():
        encoder = HyperEncoder(4, 192, 320, reference.GRIDS[grid], rectified_attention=True)
        assert sum(p.numel() for p in encoder.parameters()) == count
        shapes = reference.shapes(grid, **PUBLISHED)
        named = {n: s for n, s in shapes.items() if n.startswith("backbone.")}
        assert sum(torch.Size(s).numel() for s in named.values()) == count


def test_the_rectified_units_matter():
    state = reference.random_state(32, **SMALL, seed=0)
    encoder, _ = ours(state, 32, SMALL)
    plain = HyperEncoder(4, SMALL["n"], SMALL["m"], 2)
    plain.load_state_dict(encoder.state_dict())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (plain(latents) - encoder(latents)).abs().max() > 0.01


def test_first_release_has_no_backbone():
    with pytest.raises(ValueError, match="no tensors backbone"):
        hyper_encoder_tensors({"proj_in.1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer._codebook.embed": torch.ones(1, 16, 4)}, "lengths range from 2 to 2.*Euclid"),
        ({"quantizer._codebook.embed": torch.ones(16, 4)}, r"shape \(16, 4\)"),
        ({"quantizer._codebook.embed": None}, r"missing tensors \['quantizer._codebook.embed'\]"),
        ({"quantizer.project_in.bias": None}, r"missing.*project_in.bias"),
        ({"quantizer.layers.0": torch.ones(1)}, r"unexpected tensors \['quantizer.layers.0'\]"),
    ],
)
def test_other_quantizers_are_refused(change, message):
    state: dict[str, Tensor | None] = dict(reference.random_state(8, **SMALL, seed=0))
    state.update(change)
    with pytest.raises(ValueError, match=message):
        quantizer_tensors({name: value for name, value in state.items() if value is not None})


def test_the_extended_convolution_replaces_the_first_one():
    state = {
        "conv_in.weight": torch.zeros(2, 4, 3, 3),
        "conv_in.bias": torch.zeros(2),
        "conv_in_extended.weight": torch.ones(2, 16, 3, 3),
        "conv_in_extended.bias": torch.ones(2),
        "conv_out.bias": torch.full((4,), 2.0),
    }
    tensors = unet_tensors(state)
    assert set(tensors) == {"conv_in.weight", "conv_in.bias", "conv_out.bias"}
    assert tensors["conv_in.weight"].shape == (2, 16, 3, 3) and tensors["conv_in.bias"].sum() == 2
    with pytest.raises(ValueError, match="plain Stable Diffusion"):
        unet_tensors({"conv_in.weight": torch.zeros(2, 4, 3, 3)})


ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PERCOV2_ORIGINALS", ROOT / ".originals")) / "bin" / "python"


@pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}; make it with: bash benchmarks/originals.sh"
)
@pytest.mark.parametrize("grid", reference.GRIDS)
def test_same_weights_give_what_the_original_s_libraries_give(grid, tmp_path):
    state = reference.random_state(grid, **PUBLISHED, seed=grid)
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    sizes = {"grid": grid, **PUBLISHED}
    given, wanted = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({**state, "latents": latents}, given, {k: str(v) for k, v in sizes.items()})
    script = ROOT / "tests" / "tools" / "perco_originals.py"
    done = subprocess.run(
        [PYTHON, "-W", "ignore", script, given, wanted], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = load_file(wanted)
    encoder, quantizer = ours(state, grid, PUBLISHED)
    with torch.inference_mode():
        z = encoder(latents)
        z_hat = quantizer.lookup(expected["indices"])
        tokens = quantizer.tokens(z)
    scale = expected["z"].std().item()
    torch.testing.assert_close(z, expected["z"], rtol=1e-4, atol=1e-4 * scale)
    assert torch.equal(tokens.long(), expected["indices"])
    torch.testing.assert_close(z_hat, expected["z_hat"], rtol=1e-5, atol=1e-6)
    plain_z = reference.hyper_latents(state, latents, grid)
    torch.testing.assert_close(plain_z, expected["z"], rtol=1e-4, atol=1e-4 * scale)
    assert torch.equal(reference.quantize(state, plain_z)[0], expected["indices"])
