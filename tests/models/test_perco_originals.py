"""Our hyper-encoder and quantizer against CompressAI's and vector-quantize-pytorch's layers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_perco_weights import PUBLISHED, ours

from oracles import reference_perco as reference

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PERCOV2_ORIGINALS", ROOT / ".originals")) / "bin" / "python"


@pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}; make it with: bash benchmarks/originals.sh"
)
@pytest.mark.parametrize("grid", reference.GRIDS)
def test_same_weights_give_the_same_outputs_and_indices(grid, tmp_path):
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
