"""The backbone "sd3" on a tiny set-up with random weights: differential tests against diffusers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from percov2 import BackboneOptions, Codec
from percov2.models.config import PAPER_RATES
from percov2.models.sd3 import base, flow, text
from percov2.models.sd3.backbone import SD3Model
from percov2.models.torch import hyper_encoder, placement, quantizer, storage
from tools import random_sd3
from tools.photos import noise


@pytest.fixture(scope="module")
def original(sd3_folder) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline with the same base model."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder.parent / "base")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(sd3_folder) -> SD3Model:
    return SD3Model(sd3_folder)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Class names of all networks, tokenizers and samplers that are loaded from now on."""
    names: list[str] = []

    def recording(function: Callable) -> Callable:
        def load(kind: type, *arguments: object, **options: object) -> object:
            names.append(kind.__name__)
            return function(kind, *arguments, **options)

        return load

    for module in (base, flow, text):
        monkeypatch.setattr(module, "load_part", recording(placement.load_part))
    for module in (hyper_encoder, quantizer):
        monkeypatch.setattr(module, "load_component", recording(storage.load_component))
    return names


def noise_image(height: int, width: int, seed: int = 0, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator) * 2 - 1


# Against diffusers -------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", ["", "a red door", "many words " * 40])
def test_captions_are_embedded_as_by_diffusers(caption, model, original):
    with torch.inference_mode():
        sequence, pooled = model._captions([caption], 32)
        expected = original.encode_prompt(caption, caption, caption)
    assert torch.equal(sequence, expected[0]) and sequence.shape == (1, 77 + 256, 32)
    assert torch.equal(pooled, expected[2])


def test_without_t5_its_part_is_zeros_as_in_diffusers(sd3_folder, original):
    model = SD3Model(sd3_folder, options=BackboneOptions(t5=False))
    with torch.inference_mode():
        sequence, _ = model._captions(["a red door"], 32)
        bare = StableDiffusion3Pipeline(**{**original.components, "text_encoder_3": None})
        expected, *_ = bare.encode_prompt("a red door", None, None)
    assert torch.equal(sequence, expected)
    assert not sequence[:, 77:].any() and sequence[:, :77].any()


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (3, 1.0), (4, 5.0)])
def test_sampling_equals_diffusers_while_z_hat_has_no_weight(steps, guidance, sd3_copy, original):
    tensors, scale = flow.load_delta(sd3_copy / "flow")
    weight = tensors["pos_embed.proj.weight"]
    weight.zero_()[:, :16] = original.transformer.pos_embed.proj.weight.detach()
    flow.save_delta(tensors, scale, sd3_copy / "flow")
    z_hat = torch.randn(1, random_sd3.Z_CHANNELS, 8, 12)
    latents = SD3Model(sd3_copy).sample(z_hat, "r0313", ["a red door"], steps, guidance, seed=7)
    expected = original(
        "a red door",
        negative_prompt="",
        height=64,
        width=96,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    assert torch.equal(latents, expected)


def test_latents_are_normalised_posterior_means(model, original):
    image, vae = noise_image(32, 48), original.vae
    with torch.inference_mode():
        mean = vae.encoder(image)[:, :16]  # this VAE has no convolution after its encoder
        expected = (mean - 0.0609) * 1.5305
        latents = model.encode_latents(image)
        assert torch.allclose(latents, expected, atol=1e-6)
        decoded = vae.decode(latents / 1.5305 + 0.0609).sample
        assert torch.equal(model.decode_latents(latents), decoded)


# What is loaded ----------------------------------------------------------------------------------


def test_compressing_and_restoring_load_their_own_networks_only(sd3_folder, loaded):
    codec = Codec.from_pretrained(f"sd3:{sd3_folder}")
    files = codec.compress([noise(40, 40)], caption=["a red door"])
    assert sorted(loaded) == ["AutoencoderKL", "HyperEncoder", "VectorQuantizer"]
    loaded.clear()
    Codec.from_pretrained(sd3_folder).decompress(files)
    assert sorted(loaded) == [
        *["AutoTokenizer"] * 3,
        "AutoencoderKL",
        *["CLIPTextModelWithProjection"] * 2,
        "FlowMatchEulerDiscreteScheduler",
        "SD3Transformer2DModel",
        "T5EncoderModel",
        "VectorQuantizer",
    ]


# Sizes, batches, options -------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["r0313", "r0938", "r0020"])
@pytest.mark.parametrize("size", [(1, 1), (40, 24), (70, 50)])
def test_pictures_of_any_size_come_back(rate, size, model):
    codec = Codec(model)
    file, other = codec.compress([noise(*size), noise(16, 16)], rate=rate, caption=["a door", ""])
    first, second = codec.decompress([file, other])
    assert first.size == size and second.size == (16, 16)
    side = codec.config.rate(rate).token_side
    (tokens,) = codec.decode_tokens([file])
    assert tokens.shape == (math.ceil(size[1] / side), math.ceil(size[0] / side))


def test_tokens_and_pictures_do_not_depend_on_the_batch(model):
    images = noise_image(32, 48, count=3)
    tokens = model.encode_tokens(images, "r0313")
    alone = torch.cat([model.encode_tokens(image, "r0313") for image in images.split(1)])
    assert torch.equal(tokens, alone) and len(tokens.unique()) > 1
    captions = ["a red door", "", "a red door"]
    together = model.reconstruct(tokens, "r0313", captions, 2, 3.0, 5)
    single = model.reconstruct(tokens[2:], "r0313", captions[2:], 2, 3.0, 5)
    assert torch.allclose(together[2:], single, atol=1e-4)


def test_tokens_and_caption_and_seed_matter(model):
    tokens = model.encode_tokens(noise_image(32, 32), "r0313")
    given = {"tokens": tokens, "captions": ["a red door"], "guidance": 3.0, "seed": 5}

    def painted(**changes: object) -> torch.Tensor:
        return model.reconstruct(rate="r0313", steps=2, **{**given, **changes})

    first = painted()
    assert torch.equal(first, painted())
    others = {"tokens": (tokens + 100) % 256, "captions": ["zebra"], "seed": 6, "guidance": 1.0}
    for name, value in others.items():
        assert (first - painted(**{name: value})).abs().max() > 1e-4, name


def test_equal_captions_are_embedded_once(sd3_folder):
    model = SD3Model(sd3_folder)
    encoder = model.base.text_networks().encoders[2]
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.zeros(4, 2, 2, dtype=torch.int32)
    model.reconstruct(tokens, "r0313", ["a", "b", "a", ""], 1, 3.0, 0)
    assert len(calls) == 3
    for i in range(40):
        model._captions([f"caption {i}"], 32)
    assert model._captions._known.cache_info().currsize <= 32


def test_large_pictures_are_sampled_in_windows(sd3_folder):
    model = SD3Model(sd3_folder)
    object.__setattr__(model.config, "window", 16)
    object.__setattr__(model.config, "overlap", 4)
    sizes = []
    model.base.flow("r0313").register_forward_hook(
        lambda *call: sizes.append(tuple(call[-1][0].shape[-2:])), with_kwargs=False
    )
    z_hat = torch.randn(1, random_sd3.Z_CHANNELS, 20, 40)
    latents = model.sample(z_hat, "r0313", [""], 1, 1.0, 0)
    assert latents.shape == (1, 16, 20, 40) and torch.isfinite(latents).all()
    assert set(sizes) == {(16, 16)} and len(sizes) == 2 * 3


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_paints_nearly_the_same(dtype, kind, sd3_folder):
    half = SD3Model(sd3_folder, options=BackboneOptions(dtype=dtype, vae_tiling=True))
    full = SD3Model(sd3_folder)
    tokens = full.encode_tokens(noise_image(32, 32), "r0313")
    assert half.encode_tokens(noise_image(32, 32), "r0313").shape == tokens.shape
    expected = full.reconstruct(tokens, "r0313", ["a red door"], 2, 2.0, 0)
    got = half.reconstruct(tokens, "r0313", ["a red door"], 2, 2.0, 0)
    assert got.dtype == torch.float32 and (got - expected).abs().mean() < 0.05
    assert half.base.flow("r0313").dtype == kind
    assert half.base.autoencoder().use_tiling


def test_offloaded_networks_are_on_the_device_only_at_work(sd3_folder, monkeypatch):
    model = SD3Model(sd3_folder, options=BackboneOptions(offload=True))
    places: dict[str, list[str]] = {}
    plain = torch.nn.Module.to

    def to(network: torch.nn.Module, place: object) -> torch.nn.Module:
        places.setdefault(type(network).__name__, []).append(str(place))
        return plain(network, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    for kind in (SD3Transformer2DModel, type(model.base.autoencoder())):
        monkeypatch.setattr(kind, "to", to)
    for encoder in model.base.text_networks().encoders:
        monkeypatch.setattr(type(encoder), "to", to)
    object.__setattr__(model.base.place, "device", torch.device("cpu", 0))
    tokens = torch.zeros(1, 2, 2, dtype=torch.int32)
    model.reconstruct(tokens, "r0313", ["a"], 2, 2.0, 0)
    pair = ["cpu:0", "cpu"]
    assert places["SD3Transformer2DModel"] == pair
    assert places["AutoencoderKL"] == pair
    assert places["T5EncoderModel"] == 2 * pair
    assert places["CLIPTextModelWithProjection"] == 4 * pair


@pytest.mark.cuda
@pytest.mark.parametrize("offload", [False, True])
def test_a_card_paints_what_the_cpu_paints(offload, sd3_folder):
    card = SD3Model(sd3_folder, "cuda", BackboneOptions(dtype="fp32", offload=offload))
    full = SD3Model(sd3_folder)
    tokens = full.encode_tokens(noise_image(32, 32), "r0313")
    assert card.encode_tokens(noise_image(32, 32), "r0313").device.type == "cuda"
    expected = full.reconstruct(tokens, "r0313", ["a red door"], 2, 2.0, 0)
    got = card.reconstruct(tokens, "r0313", ["a red door"], 2, 2.0, 0)
    assert (got.cpu() - expected).abs().mean() < 0.02
    networks = [card.base.flow("r0313"), card.base.autoencoder()]
    networks += card.base.text_networks().encoders
    waiting = "cpu" if offload else "cuda"
    assert {p.device.type for network in networks for p in network.parameters()} == {waiting}


def test_compiling_is_opt_in(sd3_folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(SD3Transformer2DModel, "compile", lambda self: compiled.append(self))
    SD3Model(sd3_folder).base.flow("r0313")
    assert not compiled
    flow = SD3Model(sd3_folder, options=BackboneOptions(compile=True)).base.flow("r0313")
    assert compiled == [flow]


# Command line, errors ----------------------------------------------------------------------------


def test_the_papers_rates_are_named_after_their_bits():
    for rate in PAPER_RATES:
        bits = math.log2(rate.codebook_size) / rate.token_side**2
        assert rate.name == f"r{round(bits * 10000 + 1e-9):04d}"
    assert len(PAPER_RATES) == 7


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("base/text_encoder_3", "cannot load its text_encoder_3.*--no-t5"),
        ("base/text_encoder_2", "cannot load its text_encoder_2"),
        ("base/transformer", "cannot load its transformer"),
        ("base/vae", "cannot load its vae"),
        ("model/flow", "contains no flow"),
        ("base", "there is no folder .*base, and it is no hub id"),
    ],
)
def test_missing_parts_are_named(missing, message, sd3_folder, sd3_copy):
    shutil.rmtree(sd3_copy.parent / missing)
    files = Codec.from_pretrained(sd3_folder).compress([noise(16, 16)], caption=["a"])
    with pytest.raises(ValueError, match=message):
        Codec.from_pretrained(sd3_copy).decompress(files)


def test_pickled_weights_are_not_read(sd3_copy):
    vae = sd3_copy.parent / "base" / "vae"
    random_sd3.autoencoder().save_pretrained(vae, safe_serialization=False)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load its vae"):
        Codec.from_pretrained(sd3_copy).compress([noise(16, 16)])


def test_parts_of_another_rate_are_refused(sd3_copy):
    def mix(part: str) -> Codec:
        shutil.copytree(sd3_copy / "r0938" / part, sd3_copy / "r0020" / part, dirs_exist_ok=True)
        return Codec.from_pretrained(sd3_copy)

    with pytest.raises(ValueError, match="tokens of 8 pixels a side, but rate r0020 has 64"):
        mix("hyper_encoder").compress([noise(16, 16)], rate="r0020")
    tokens = torch.zeros(1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="a codebook of 64, but rate r0020 one of 256"):
        mix("quantizer").model.reconstruct(tokens, "r0020", [""], 1, 1, 0)


def test_wrong_arguments_are_refused(model):
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            model.reconstruct(torch.zeros(1, 1, 1).int(), "r0313", [""], steps, 1.0, 0)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode_tokens(noise_image(24, 32), "r0313")
