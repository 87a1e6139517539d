"""Networks: shapes, exactness claims, storage, sampling."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from percov2.models.config import ModelConfig, Rate
from percov2.models.stored_tensors import read_tensors
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.text_encoder import HashedTextEncoder
from percov2.models.torch.flow import (
    WindowedEstimate,
    estimate_clean,
    upsample_z_hat,
)
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import load_component, save_component
from percov2.models.windows import sample, window_side, window_starts
from tools import random_sd3


def test_autoencoder_shapes_and_refusal():
    model = PatchAutoencoder(widths=(8, 16)).eval()
    latents = model.encode(torch.zeros(2, 3, 16, 40))
    assert latents.shape == (2, 16, 2, 5)
    assert model.decode(latents).shape == (2, 3, 16, 40)
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 16, 41))


def test_hyper_encoder_stride():
    for stride in (1, 2, 4, 8):
        model = HyperEncoder(channels=8, hyper_channels=12, stride=stride)
        assert model(torch.zeros(1, 16, 16, 24)).shape == (1, 12, 16 // stride, 24 // stride)
    with pytest.raises(ValueError, match="stride"):
        HyperEncoder(stride=3)


def _quantizer() -> VectorQuantizer:
    torch.manual_seed(2)
    return VectorQuantizer(hyper_channels=6, codebook_size=16, code_dim=4, output_channels=5)


def test_tokens_are_the_nearest_codes_by_brute_force():
    quantizer = _quantizer()
    z = torch.randn(2, 6, 3, 5)
    tokens = quantizer.tokens(z)
    projected = quantizer.project_in(z).detach()
    for b, y, x in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        vector = projected[b, :, y, x]
        cosines = [float(torch.cosine_similarity(vector, c, dim=0)) for c in quantizer.codebook]
        assert int(tokens[b, y, x]) == max(range(16), key=cosines.__getitem__)


def test_forward_agrees_with_lookup_and_passes_gradients():
    quantizer = _quantizer()
    z = torch.randn(2, 6, 3, 5, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(out.z_hat, quantizer.lookup(out.tokens))
    out.z_hat.square().sum().backward()
    assert z.grad.abs().sum() > 0
    for bad in (-1, 16):
        with pytest.raises(ValueError, match="0…15"):
            quantizer.lookup(torch.full((1, 1, 1), bad))


def test_codebook_stays_unit_length_and_dead_codes_return():
    quantizer = _quantizer()
    directions = torch.nn.functional.normalize(torch.randn(64, 4), dim=1)
    quantizer.usage.fill_(4.0)
    quantizer.usage[3] = 0.0
    dead = quantizer.codebook[3].clone()
    quantizer.update_codebook(directions, torch.zeros(64, dtype=torch.int32))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))
    assert not torch.equal(quantizer.codebook[3], dead)
    assert (directions == quantizer.codebook[3]).all(1).any()


def test_upsampling_repeats_each_token():
    z_hat = torch.arange(6.0).view(1, 1, 2, 3)
    up = upsample_z_hat(z_hat, 4, 6)
    assert up.shape == (1, 1, 4, 6)
    assert torch.equal(up[..., ::2, ::2], z_hat) and torch.equal(up[..., 1::2, 1::2], z_hat)
    with pytest.raises(ValueError, match="do not match"):
        upsample_z_hat(z_hat, 5, 6)


def test_windows_cover_everything_and_stay_inside():
    for length in range(1, 60):
        starts = window_starts(length, 8, 6)
        covered = {i for s in starts for i in range(s, min(s + 8, length))}
        assert covered == set(range(length))
        assert all(s + 8 <= max(length, 8) for s in starts)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 12), st.sampled_from([1, 2, 8]))
def test_no_other_windows_take_less_work(length, units, overlap, unit):
    window = units * unit
    overlap = min(overlap, window - 1)
    found = window_side(length, window, overlap, unit)

    def work(side: int) -> tuple[int, int]:
        return len(window_starts(length, side, side - overlap)), side

    allowed = [side for side in range(unit, window * 9 // 8 + 1, unit) if overlap < side]
    assert found == (window if length <= window else min(allowed, key=work))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20))
def test_windows_that_no_unit_divides_are_not_longer(length, window, unit):
    found = window_side(length, window, window // 4, unit)
    assert window // 4 < found <= window * 9 // 8
    assert found == window or found % unit == 0


def test_windowed_estimate_blends_to_the_dense_one():
    noisy, z_hat = torch.randn(2, 16, 21, 13), torch.randn(2, 3, 21, 13)
    seen = []

    def pointwise(x: torch.Tensor, z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2:])
        return 2 * x + z.mean(1, keepdim=True) + rows.view(-1, 1, 1, 1)

    rows = torch.arange(2).view(-1, 1, 1, 1)
    dense = 2 * noisy + z_hat.mean(1, keepdim=True) + rows
    windowed = WindowedEstimate(pointwise, windows=(8, 6), overlap=3, batch=4)(noisy, z_hat)
    torch.testing.assert_close(windowed, dense)
    assert {tuple(shape) for shape in seen} == {(8, 6)}


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampling_with_a_perfect_estimate_returns_the_clean_latents(steps):
    clean = torch.randn(1, 16, 4, 4)
    times = []

    def estimate(x: torch.Tensor, z: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        return clean

    out = sample(estimate, torch.zeros(1, 1, 4, 4), torch.randn(1, 16, 4, 4), steps)
    torch.testing.assert_close(out, clean)
    assert times[0] == 1.0 and len(times) == steps and times == sorted(times, reverse=True)
    with pytest.raises(ValueError, match="steps"):
        sample(estimate, torch.zeros(1), torch.zeros(1), 0)


def test_both_predictions_give_the_same_clean_latents():
    clean, noise, t = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), torch.tensor([1.0, 0.4])
    mix = t.view(-1, 1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise

    def ideal(answer: torch.Tensor):
        return lambda **kwargs: (answer,)

    text = (torch.zeros(2, 1, 8), torch.zeros(2, 8))
    for prediction, answer in (("velocity", noise - clean), ("sample", clean)):
        out = estimate_clean(ideal(answer), noisy, noisy[:, :1], t, text, prediction)
        torch.testing.assert_close(out, clean)
    with pytest.raises(ValueError, match="prediction"):
        estimate_clean(ideal(clean), noisy, noisy, t, text, "epsilon")


@pytest.mark.parametrize(
    ("weight_format", "tolerance"), [("float32", 0), ("float16", 1e-3), ("int8", 1e-2)]
)
def test_storage_round_trip(tmp_path, weight_format, tolerance):
    torch.manual_seed(3)
    flow = random_sd3.transformer()
    save_component(flow, tmp_path, weight_format)
    reloaded = load_component(SD3Transformer2DModel, tmp_path)
    for name, value in flow.state_dict().items():
        assert (value - reloaded.state_dict()[name]).abs().max() <= tolerance * value.abs().max()


def test_storage_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="weight_format"):
        save_component(HyperEncoder(channels=8, hyper_channels=8), tmp_path, "int4")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_component(HyperEncoder, tmp_path)
    save_component(HyperEncoder(channels=8, hyper_channels=8), tmp_path, "float16")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"stride": 2', '"stride": 2, "extra": 1'))
    load_component(HyperEncoder, tmp_path)
    PatchAutoencoder(widths=(8, 16)).save_config(tmp_path)
    with pytest.raises(ValueError, match="missing tensors"):
        load_component(PatchAutoencoder, tmp_path)


def test_damaged_components_are_refused_by_name(tmp_path):
    save_component(HyperEncoder(channels=32, hyper_channels=8), tmp_path, "int8")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    for damaged in (good[:-9], good[:20], b"", b"\xff" * 99, good.replace(b".scale", b".scald")):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_component(HyperEncoder, tmp_path)
        if b".scald" not in damaged:
            with pytest.raises(ValueError, match=r"model\.safetensors"):
                read_tensors(weights, "codebook")
    weights.write_bytes(good)
    with pytest.raises(ValueError, match="codebook"):
        read_tensors(weights, "codebook")
    for size in (10**8, 10**12, float("inf")):
        config.write_text(text.replace('"channels": 32', f'"channels": {json.dumps(size)}'))
        with pytest.raises(ValueError, match=r"config\.json: channels is .*too large for"):
            load_component(HyperEncoder, tmp_path)
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith(".scale"))
    save_file({**tensors, name: tensors[name][:1].clone()}, weights)
    config.write_text(text)
    with pytest.raises(ValueError, match="rows, but 1 factors"):
        load_component(HyperEncoder, tmp_path)
    with pytest.raises(ValueError, match="rows, but 1 factors"):
        read_tensors(weights)
    weights.write_bytes(good)
    config.write_text(text.replace('"channels": 32', '"channels": 16'))
    with pytest.raises(ValueError, match=r"model\.safetensors .*does not match"):
        load_component(HyperEncoder, tmp_path)
    for wrong in ('"wide"', "-1", "null", "1e400"):
        config.write_text(text.replace('"channels": 32', f'"channels": {wrong}'))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_component(HyperEncoder, tmp_path)


@pytest.mark.parametrize(
    ("network", "field", "size"),
    [
        (lambda: VectorQuantizer(8, 16, 4, 8), "codebook_size", 10**8),
        (random_sd3.transformer, "num_layers", 10**6),
    ],
)
def test_forged_sizes_are_refused_before_allocation(network, field, size, tmp_path):
    made = network()
    save_component(made, tmp_path, "float16")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, field: size}))
    with pytest.raises(ValueError, match=rf"config\.json: {field} is {size}, too large for"):
        load_component(type(made), tmp_path)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("steps", [0, 1001, "4", 1.5, True, None]),
        ("guidance", [-1, 101, "1", float("nan"), None, True]),
        ("window", [0, "32", 8, 7]),
        ("overlap", [-1, 32, 2.5]),
        ("prediction", ["epsilon", 1, None]),
        ("decoder_noise", [-0.1, 11, "0.2", None, True, float("nan")]),
        ("default_schedule", [3, None]),
        ("name", [3]),
        ("default_rate", ["r2", 0]),
        ("rates", [None, [], 3, [3], [{}], {"a": 1}]),
        ("rate token_side", [0, -16, 12, "16", 16.0, 1 << 40]),
        ("rate codebook_size", [1, 8193, "256", None]),
        ("rate steps", [0, 1001, "4", 1.5, True]),
        ("rate name", ["../r", "", "a/b", 3, ".."]),
        ("extra", [1]),
    ],
)
def test_configs_with_wrong_values_are_refused_by_name(field, wrong, tmp_path):
    good = ModelConfig("m", (Rate("r", 16, 256), Rate("s", 32, 256, 4)), "s", window=32, overlap=8)
    good.save(tmp_path)
    assert ModelConfig.load(tmp_path) == good
    for value in wrong:
        values = json.loads((tmp_path / "config.json").read_text())
        (values["rates"][0] if field.startswith("rate ") else values)[field.split()[-1]] = value
        folder = tmp_path / "wrong"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"wrong/config\.json: "):
            ModelConfig.load(folder)


def test_default_steps_and_configs_that_lack_them_or_are_none(tmp_path):
    config = ModelConfig("m", (Rate("r", 16, 256), Rate("s", 32, 256, 4)), "s", steps=2)
    assert [config.default_steps(rate) for rate in ("r", "s", None)] == [2, 4, 4]
    with pytest.raises(ValueError, match="unknown rate 't'"):
        config.default_steps("t")
    config.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rates"][0]["steps"]  # as version 0.1 wrote it
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ModelConfig.load(tmp_path) == config
    for text in ("", "[]", "3", "{", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json: "):
            ModelConfig.load(tmp_path)


def test_weights_loaded_in_inference_mode_can_be_changed(tmp_path):
    save_component(HyperEncoder(channels=8, hyper_channels=8), tmp_path, "float16")
    with torch.inference_mode():
        model = load_component(HyperEncoder, tmp_path)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert not next(model.parameters()).any()


def test_text_encoder_is_a_function_of_words():
    encoder = HashedTextEncoder(buckets=64, dim=8, length=4)
    sequence, pooled = encoder(["A red door", "a RED, door!", "", "one two three four five six"])
    assert sequence.shape == (4, 4, 8) and pooled.shape == (4, 8)
    assert torch.equal(sequence[0], sequence[1]) and not torch.equal(sequence[0], sequence[2])
    assert torch.equal(pooled[2], torch.zeros(8))
    assert torch.equal(encoder(["one two three four"])[0][0], sequence[3])
