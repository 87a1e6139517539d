"""The widened flow transformer of SD3 and its stored forms."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from percov2.models.sd3.flow import DELTA_FILE, apply_delta, load_delta, open_flow, save_delta
from percov2.models.torch.flow import widen_patch_embedding
from tools import random_sd3

LAYER = "transformer_blocks.1.attn.to_q"


def evaluate(model: SD3Transformer2DModel, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 64, 8, 12, generator=generator)[:, :channels]
    with torch.inference_mode():
        return model(
            inputs,
            encoder_hidden_states=torch.randn(2, 9, 32, generator=generator),
            pooled_projections=torch.randn(2, 20, generator=generator),
            timestep=torch.tensor([500.0, 900.0]),
            return_dict=False,
        )[0]


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    random_sd3.transformer().save_pretrained(tmp_path / "base" / "transformer")
    return tmp_path / "base"


def plain(base: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(base / "transformer")


def delta(base: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    embedding = plain(base).pos_embed.proj
    tensors = {
        "pos_embed.proj.weight": torch.randn(16, 16 + 5, 2, 2),
        "pos_embed.proj.bias": embedding.bias.detach() + 1,
    }
    if rank:
        tensors[f"{LAYER}.lora_down"] = torch.randn(rank, 16)
        tensors[f"{LAYER}.lora_up"] = torch.randn(16, rank)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_equals_the_base_bit_for_bit_until_it_is_trained(base, dtype):
    model, wide = plain(base).to(dtype), plain(base).to(dtype)
    widen_patch_embedding(wide, 48)
    assert wide.config["in_channels"] == 64 and wide.config["out_channels"] == 16
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = evaluate(model)
        assert torch.equal(evaluate(wide, 64), expected)
        with torch.no_grad():
            wide.pos_embed.proj.weight[:, 16:].fill_(0.1)
        assert not torch.equal(evaluate(wide, 64), expected)
    with pytest.raises(ValueError, match="at least 1"):
        widen_patch_embedding(plain(base), 0)


def test_whole_transformers_survive_a_folder(base, tmp_path):
    wide = plain(base)
    widen_patch_embedding(wide, 48)
    wide.save_pretrained(tmp_path / "flow")
    again = open_flow(tmp_path / "flow", "not/needed", torch.float32)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in wide.state_dict().items())
    assert torch.equal(evaluate(again, 64), evaluate(plain(base)))
    assert open_flow(tmp_path / "flow", "not/needed", torch.bfloat16).dtype == torch.bfloat16


def test_deltas_survive_a_folder_and_change_only_what_they_name(base, tmp_path):
    tensors = delta(base, rank=3)
    save_delta(tensors, 0.25, tmp_path / "flow")
    stored, scale = load_delta(tmp_path / "flow")
    assert scale == 0.25 and stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    state = open_flow(tmp_path / "flow", str(base), torch.float32).state_dict()
    for name, before in plain(base).state_dict().items():
        if name == f"{LAYER}.weight":
            down, up = tensors[f"{LAYER}.lora_down"], tensors[f"{LAYER}.lora_up"]
            for row, column in product(range(16), repeat=2):
                before[row, column] += 0.25 * up[row] @ down[:, column]
            assert torch.allclose(state[name], before, atol=1e-5)
        else:
            assert torch.equal(state[name], tensors.get(name, before)), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"pos_embed.proj.weight": torch.zeros(8, 21, 2, 2)},
        {"pos_embed.proj.weight": torch.zeros(16, 16, 2, 2)},
        {f"{LAYER}.lora_up": torch.zeros(7, 3)},
        {"layer": "nowhere"},
        {"layer": "pos_embed.proj"},  # a convolution
    ],
)
def test_deltas_of_another_base_are_refused(wrong, base):
    layer = wrong.get("layer", LAYER)
    tensors = {k.replace(LAYER, layer): v for k, v in {**delta(base, rank=3), **wrong}.items()}
    tensors.pop("layer", None)
    with pytest.raises(ValueError, match="the delta's"):
        apply_delta(plain(base), tensors, 1.0)


def test_incomplete_and_damaged_deltas_are_refused(base, tmp_path):
    tensors = delta(base, rank=3)
    for name in tensors:
        with pytest.raises(ValueError, match="missing tensors"):
            save_delta({k: v for k, v in tensors.items() if k != name}, 1.0, tmp_path)
    with pytest.raises(ValueError, match="unexpected tensors"):
        save_delta({**tensors, "extra": torch.zeros(1)}, 1.0, tmp_path)
    save_delta(tensors, 1.0, tmp_path)
    path = tmp_path / DELTA_FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is no flow delta"):
        load_delta(tmp_path)
