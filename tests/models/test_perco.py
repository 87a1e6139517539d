"""Published checkpoints become a folder that the codec runs; its pictures are the original's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from oracles import reference_perco as reference
from percov2 import BackboneOptions, Codec
from percov2.container import bitstream
from percov2.models.perco.backbone import PerCoModel
from percov2.training.import_perco import import_perco
from tools import random_perco
from tools.command_line import run

PIXELS = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A download: a pipeline per rate."""
    folder = tmp_path_factory.mktemp("published")
    for seed, grid in enumerate(random_perco.GRIDS):
        random_perco.save_pipeline(folder / f"grid{grid}", grid, seed)
    return folder


@pytest.fixture(scope="module")
def model(published, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "perco"
    import_perco(published, out)
    return out


@pytest.fixture(scope="module")
def imported(model) -> Codec:
    return Codec.from_pretrained(f"perco:{model}")


def test_command_line_from_checkpoints_to_picture(published, tmp_path, picture, capsys):
    out, file, restored = tmp_path / "model", tmp_path / "photo.pcv2", tmp_path / "restored.png"
    assert run("import-perco", published, out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["r1250", "r0313", "r0020"]
    assert lines[3].endswith(f"--model perco:{out}")
    given = ["--model", f"perco:{out}"]
    assert run("compress", picture, file, *given, "--rate", "r0313", "--caption", "a red door") == 0
    assert run("info", file, *given, "--verify", "--json") == 0
    assert run("decompress", file, restored, *given, "--steps", "3") == 0
    with Image.open(restored) as image:
        assert image.size == (70, 50) and image.mode == "RGB"


@pytest.mark.parametrize(
    ("rate", "grid", "payload"), [("r1250", 64, 4096), ("r0313", 32, 1024), ("r0020", 8, 64)]
)
def test_tokens_are_the_originals_and_cost_a_byte_each(imported, published, rate, grid, payload):
    image = Image.fromarray(PIXELS)
    (data,) = imported.compress([image], rate=rate)
    # Beside the tokens: header, 16-bit check, and the rounding to whole bytes.
    overhead = sum(bits / 8 for bits in bitstream.read(data).bits.values())
    assert abs(len(data) - overhead - payload) < 1
    (tokens,) = imported.decode_tokens([data])
    assert tokens.shape == (grid, grid) and tokens.size == payload
    home = published / f"grid{grid}"
    state = load_file(home / "hyper_enc" / "diffusion_pytorch_model.safetensors")
    vae = AutoencoderKL.from_pretrained(home / "vae").eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mean * 0.18215
        indices, _ = reference.quantize(state, reference.hyper_latents(state, latents, grid))
    assert np.array_equal(tokens, indices[0].numpy())


class ExtendedConvolution(nn.Module):
    """Stands at ``conv_in`` and reads z_hat as the original's network does."""

    def __init__(self, extended: nn.Conv2d, z_hat: Tensor) -> None:
        super().__init__()
        self.extended, self.z_hat = extended, z_hat

    def forward(self, sample: Tensor) -> Tensor:
        z_hat = F.interpolate(self.z_hat, size=sample.shape[2:], mode="nearest")
        return self.extended(torch.cat([sample, z_hat], dim=1))


def restore(home: Path, grid: int, tokens: Tensor, words: str, seed: int, steps: int) -> Tensor:
    """The original's decoder by its published facts: guidance 3, DDIM written out, v-prediction."""
    state = load_file(home / "hyper_enc" / "diffusion_pytorch_model.safetensors")
    codes = state["quantizer._codebook.embed"][0][tokens.long()]
    z_hat = codes @ state["quantizer.project_out.weight"].T + state["quantizer.project_out.bias"]
    unet = random_perco.plain_unet()
    weights = load_file(home / "unet" / "diffusion_pytorch_model.safetensors")
    extended = nn.Conv2d(4 + random_perco.SIZES["m"], 8, 3, padding=1)
    for part in ("weight", "bias"):
        getattr(extended, part).data = weights.pop(f"conv_in_extended.{part}")
    unet.load_state_dict(weights)
    unet.conv_in = ExtendedConvolution(extended, z_hat.permute(0, 3, 1, 2))
    tokenizer = CLIPTokenizer.from_pretrained(home / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(home / "text_encoder").eval()
    embeddings = []
    for text in (words, ""):
        rows = tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        embeddings.append(encoder(torch.tensor([rows])).last_hidden_state)
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
    side = len(tokens[0]) * reference.GRIDS[grid]
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    gap = 1000 // steps
    for t in [i * gap + 1 for i in reversed(range(steps))]:
        a, b = kept[t] ** 0.5, (1 - kept[t]) ** 0.5
        with_text, without = (unet(x, t, e).sample for e in embeddings)
        v = without + 3.0 * (with_text - without)
        clean, noise = a * x - b * v, a * v + b * x
        before = kept[t - gap] if t >= gap else kept[0]
        x = (before**0.5 * clean + (1 - before) ** 0.5 * noise).float()
    vae = AutoencoderKL.from_pretrained(home / "vae").eval()
    return vae.decode(x / 0.18215).sample


@pytest.mark.parametrize(("rate", "grid"), [("r1250", 64), ("r0020", 8)])
@torch.inference_mode()
def test_pictures_are_those_of_the_originals_decoder(imported, published, rate, grid):
    tokens = torch.randint(256, (1, 24, 24), generator=torch.Generator().manual_seed(4))
    tokens = tokens[:, :: reference.GRIDS[grid], :: reference.GRIDS[grid]]
    found = imported.model.reconstruct(tokens, rate, ["a red door"], 4, 3.0, seed=9)
    expected = restore(published / f"grid{grid}", grid, tokens, "a red door", 9, 4)
    torch.testing.assert_close(found, expected.clamp(-1, 1), rtol=0, atol=2e-4)
    assert found.std() > 0.01
    for other in (
        imported.model.reconstruct(tokens, rate, ["a red door"], 4, 1.0, seed=9),
        imported.model.reconstruct(tokens, rate, [""], 4, 3.0, seed=9),
        imported.model.reconstruct(tokens.flip(1), rate, ["a red door"], 4, 3.0, seed=9),
        imported.model.reconstruct(tokens, rate, ["a red door"], 4, 3.0, seed=8),
    ):
        assert (other - found).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (9, 70), (72, 520)])
def test_any_size(imported, size):
    image = Image.fromarray(PIXELS[: size[0], :1].repeat(size[1], 1))
    for rate in ("r1250", "r0020"):
        (data,) = imported.compress([image], rate=rate)
        (restored,) = imported.decompress([data], steps=2)
        assert restored.size == image.size


def test_defaults_and_steps_are_the_originals(imported):
    config = imported.config
    assert (config.steps, config.guidance, config.default_rate) == (20, 3.0, "r0313")
    assert [rate.token_side for rate in config.rates] == [8, 16, 64]
    tokens = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="steps must be 1 to 999 with this model, not 1000"):
        imported.model.reconstruct(tokens, "r0313", [""], 1000, 1.0, 0)


def test_compressing_and_restoring_load_their_own_networks_only(model, monkeypatch):
    def forbid(*names: str) -> Codec:
        """A codec that was opened when these could no longer be had."""
        for name in names:

            def fail(*_: object, name: str = name) -> None:
                raise AssertionError(f"{name} was loaded")

            loader = callable(getattr(PerCoModel, name))
            monkeypatch.setattr(PerCoModel, name, fail if loader else property(fail))
        return Codec.from_pretrained(f"perco:{model}")

    image = Image.fromarray(PIXELS[:64, :64])
    with monkeypatch.context() as monkeypatch:
        (data,) = forbid("text_encoder", "tokenizer", "scheduler", "_load_unet").compress([image])
    with monkeypatch.context() as monkeypatch:
        codec = forbid("_load_hyper_encoder")
        codec.decompress([data], steps=1)
        with pytest.raises(AssertionError, match="_load_hyper_encoder was loaded"):
            codec.compress([image])
    with monkeypatch.context() as monkeypatch:
        codec = forbid("_load_unet")
        assert codec.compress([image]) == [data]
        with pytest.raises(AssertionError, match="_load_unet was loaded"):
            codec.decompress([data], steps=1)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [({"offload": True, "vae_tiling": True}, -1, 0), ({"dtype": "bf16"}, 0, 8)],
    ids=["offload and tiling change nothing here", "half precision stays near"],
)
def test_options_change_no_token_and_the_picture_as_little_as_they_say(
    options, least, most, model, imported
):
    image = Image.fromarray(PIXELS[:64, :64])
    other = Codec.from_pretrained(f"perco:{model}", options=BackboneOptions(**options))
    (data,) = imported.compress([image], caption=["a door"])
    assert other.compress([image], caption=["a door"]) == [data]
    pictures = [c.decompress([data], steps=4)[0] for c in (imported, other)]
    first, second = (np.asarray(picture, float) for picture in pictures)
    assert least < np.abs(first - second).mean() <= most


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("base/text_encoder", None, "cannot load its text_encoder"),
        ("base/vae/diffusion_pytorch_model.safetensors", None, "cannot load its vae"),
        ("r0313/unet/diffusion_pytorch_model.safetensors", None, "cannot load its unet"),
        ("base", None, r"base is './base'; there is no folder"),
        ("base/scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "'epsilon'"),
        ("base/text_encoder/config.json", {"hidden_size": 8}, "load its text_encoder|gives 8"),
    ],
)
def test_incomplete_folders_and_other_base_models_are_refused(
    part, change, message, model, tmp_path
):
    folder = shutil.copytree(model, tmp_path / "model")
    place = folder / part
    if change:
        place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    with pytest.raises(ValueError, match=message):
        PerCoModel(folder, "cpu", BackboneOptions()).reconstruct(
            torch.zeros(1, 1, 1, dtype=torch.int32), "r0313", [""], 1, 1.0, 0
        )
