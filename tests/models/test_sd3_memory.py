"""Full-size networks on the meta device: their counts and the documented tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2.models.sd3 import memory


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    found = memory.networks("stable-diffusion-3-medium")
    assert all(p.device.type == "meta" for network in found.values() for p in network.parameters())
    return {name: memory.parameters(network) for name, network in found.items()}


def test_networks_have_the_published_sizes_and_widening_adds_the_columns_of_z_hat(counts):
    assert counts["autoencoder"] == 83_819_683
    assert counts["CLIP-L text encoder"] == 123_650_304
    assert counts["CLIP-G text encoder"] == 694_659_840
    assert counts["T5-XXL text encoder"] == 4_762_310_656
    plain = memory.parameters(memory.transformer("stable-diffusion-3-medium"))
    assert plain == 2_028_328_000
    assert counts["flow transformer, widened"] - plain == 320 * 1536 * 2 * 2


def test_full_size_transformers_run_without_memory():
    """Shapes fit: 1024x1024 pixels, 77 + 256 text positions."""
    flow = memory.networks("stable-diffusion-3.5-medium")["flow transformer, widened"]
    with torch.device("meta"):
        output = flow(
            torch.empty(1, 336, 128, 128),
            encoder_hidden_states=torch.empty(1, 333, 4096),
            pooled_projections=torch.empty(1, 2048),
            timestep=torch.empty(1),
            return_dict=False,
        )[0]
    assert output.shape == (1, 16, 128, 128)


def test_the_documented_tables_are_the_commands():
    page = Path(__file__).parents[2] / "docs" / "reference" / "sd3.md"
    assert memory.tables() in page.read_text(encoding="utf-8")
