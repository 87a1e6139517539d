"""Training of the entropy model: data, rounding, export, and resuming after a kill."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from percov2.entropy import schedule
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.staging import one_pass_logits
from percov2.entropy.torch.export import export
from percov2.entropy.torch.quantization import (
    LOGIT_SCALE,
    multiplier_and_shift,
    round_to_int8,
    score_scales,
)
from percov2.entropy.torch.transformer import (
    Crop,
    TokenBatch,
    TokenTransformer,
    TransformerConfig,
    crop_batch,
)
from percov2.entropy.torch.window_attention import window_attention
from percov2.training import checkpoint
from percov2.training.commands import run_entropy
from percov2.training.loop import LoopConfig
from percov2.training.stage2 import EntropyConfig, TokenMaps, random_stages, train_entropy
from tools.executors import equal, same

SIZES = {"dim": 32, "heads": 2, "head_dim": 16, "layers": 2, "hidden": 64}
CONFIG = EntropyConfig(model=SIZES, shapes=((8, 8), (6, 10)), tokens_per_step=512)


def smooth_map(height: int, width: int, seed: int) -> np.ndarray:
    """Tokens 0 ... 15 that neighbours predict well: a rounded random walk in both directions."""
    random = np.random.default_rng(seed)
    walk = np.cumsum(random.normal(size=(height, 1)), 0) + np.cumsum(
        random.normal(size=(1, width)), 1
    )
    return (np.abs(np.rint(walk * 1.5)) % 16).astype(np.int32)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    sizes = [(8, 12), (14, 14), (10, 8), (5, 9)]
    maps = {f"tokens_{i}": smooth_map(*sizes[i % 4], seed=i) for i in range(48)}
    held_out = np.arange(48) % 16 == 15
    np.savez(path, codebook_size=np.int32(16), held_out=held_out, **maps)
    return path


def test_attention_equals_plain_autograd():
    torch.manual_seed(0)
    q = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    bias = torch.randn(3, 7, 5, dtype=torch.float64)
    hidden = torch.rand(2, 7, 5) > 0.7
    hidden[:, :, 0] = False
    mask = hidden.double() * -(2.0**20)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    result = window_attention(*inputs, mask, False)
    scores = q @ k.transpose(2, 3) + bias
    plain = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1) @ v
    assert torch.allclose(result, plain)
    weights = torch.randn_like(plain)
    ours = torch.autograd.grad((result * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_of_rounded_attention_are_those_of_the_float_form():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 9, 8)
    k, v = torch.randn(2, 1, 2, 7, 8)
    steps = 16 / np.log(2)  # scores in sixteenths of an octave
    bias = torch.round(torch.randn(2, 9, 7) * steps)
    mask = torch.zeros(1, 9, 7)
    weights = torch.randn(1, 2, 9, 8)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    rounded = window_attention(q * steps, k, v, bias, mask, True)
    plain = window_attention(q, k, v, bias / steps, mask, False)
    assert torch.allclose(rounded, plain, atol=0.05)
    ours = torch.autograd.grad((rounded * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) < 0.05 * float(b.norm())


def test_multipliers_are_never_too_small():
    ratio = torch.logspace(-6.5, 1.8, 500, dtype=torch.float64)
    multiplier, shift = multiplier_and_shift(ratio)
    assert int(multiplier.min()) >= 1
    assert int(multiplier.max()) <= 127
    assert 1 <= int(shift.min()) <= int(shift.max()) <= 24
    value = multiplier * torch.exp2(-shift.double())
    assert bool((value >= ratio).all())
    assert bool((value[ratio > 1e-5] <= ratio[ratio > 1e-5] * (1 + 1 / 63)).all())
    with pytest.raises(ValueError, match="too large"):
        multiplier_and_shift(torch.tensor([64.0], dtype=torch.float64))


def test_scores_need_a_shift_only():
    q_amax, k_amax = torch.tensor([3.0, 8.0, 0.5]), torch.tensor([5.0, 7.0, 9.0])
    q, k, shift = score_scales(q_amax, k_amax, 32)
    unit = np.log(2) / 16
    assert torch.allclose(q * k / 32**0.5, unit * torch.exp2(-shift.float()))
    assert bool((q * 127 >= q_amax * 0.999).all())
    assert bool((k * 127 <= k_amax * 1.42).all())


@pytest.fixture(scope="module")
def observed() -> tuple[TokenTransformer, TokenBatch]:
    """A model that has learnt a little, and the batch that it learnt from."""
    torch.manual_seed(0)
    model = TokenTransformer(TransformerConfig(codebook_size=16, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    stages = schedule.stages("qlds12", 12, 12)
    crops = [Crop(smooth_map(12, 12, i), stages) for i in range(8)]
    batch = crop_batch(crops, 12, 12)
    model.observing = True
    for step in range(30):
        model.quantized = step >= 20
        loss = functional.cross_entropy(model(batch).flatten(0, 1), batch.tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.observing = model.quantized = False
    return model, batch


def bits(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())) / np.log(2)


def test_integer_form_equals_the_rounded_form(observed):
    model, batch = observed
    integer = export(model)
    stages = batch.stages[0].numpy()
    order = torch.from_numpy(schedule.order(stages))
    logits = torch.from_numpy(one_pass_logits(integer, batch.tokens, stages)).float()
    tokens = batch.tokens.flatten(1)[:, order]
    coded = bits(logits * LOGIT_SCALE, tokens)
    with torch.no_grad():
        plain = bits(model(batch)[:, order], tokens)
        model.quantized = True
        rounded = model(batch)[:, order]
        model.quantized = False
    assert plain < 3.5  # it has learnt something: 4 bits would be uniform
    difference = (logits - rounded / LOGIT_SCALE).abs()
    assert float(difference.mean()) < 0.02 * float(logits.std())
    assert abs(coded / bits(rounded, tokens) - 1) < 0.002
    assert coded / plain - 1 < 0.01
    with pytest.raises(ValueError, match="never observed"):
        export(TokenTransformer(TransformerConfig(codebook_size=16, **SIZES)))


def test_a_crop_knows_its_place_in_the_whole_grid(observed):
    model, _ = observed
    grid = smooth_map(16, 16, 3)
    stages = np.ones((16, 16), np.int32)
    with torch.no_grad():
        whole = model(crop_batch([Crop(grid, stages)], 16, 16)).view(16, 16, -1)
        part = model(crop_batch([Crop(grid, stages, 4, 7)], 6, 5)).view(6, 5, -1)
    # With one stage a query sees the start entries only, so a crop changes nothing.
    assert torch.allclose(whole[4:10, 7:12], part, atol=1e-5)
    assert not torch.allclose(whole[:6, :5], part, atol=1e-3)


def test_unseen_sizes_take_the_nearest_embedding(observed):
    model = copy.deepcopy(observed[0])
    with torch.no_grad():
        model.height.copy_(torch.arange(17.0)[:, None].expand(-1, 32))
    model.fill_unseen_sizes({3, 5}, {4})
    assert model.height[:, 0].tolist() == [3.0] * 5 + [5.0] * 12
    assert bool((model.width == model.width[4]).all())


def test_rounding_to_int8():
    scale = torch.tensor([0.5, 0.25])
    x = torch.tensor([[0.6, -0.2], [70.0, -40.0]], requires_grad=True)
    y = round_to_int8(x, scale)
    assert y.tolist() == [[0.5, -0.25], [63.5, -31.75]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0]]


def test_float_logits_do_not_see_later_tokens(observed):
    model, _ = observed
    stages = schedule.stages("quincunx", 9, 11)
    grid = smooth_map(9, 11, 5)
    changed = grid.copy()
    changed[stages >= 4] = 15 - changed[stages >= 4]
    with torch.no_grad():
        a = model(crop_batch([Crop(grid, stages)], 9, 11)).view(9, 11, -1)
        b = model(crop_batch([Crop(changed, stages)], 9, 11)).view(9, 11, -1)
    assert same(a[stages <= 4], b[stages <= 4])
    assert not same(a[stages > 4], b[stages > 4])


def test_random_stages_are_orders():
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(random.integers(1, 20, 2))
        result = random_stages(random, *shape)
        assert result.shape == shape and result.dtype == np.int32 and result.min() >= 1


def test_draws_fit_and_hold_out_maps(token_file):
    data = TokenMaps(token_file)
    assert [grid.shape for grid in data.held_out] == [(5, 9)] * 3
    assert np.array_equal(data.held_out[1], smooth_map(5, 9, seed=31))
    assert len(data.maps) == 45
    batch = data.draw(np.random.default_rng(0), (20, 20), CONFIG)
    assert tuple(batch.tokens.shape) == (3, 14, 14)
    batch = data.draw(np.random.default_rng(0), (6, 10), CONFIG)
    assert tuple(batch.tokens.shape) == (9, 6, 10)
    assert tuple(batch.rows.shape) == (9, 6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "codebook_size"),
        ({"codebook_size": 4}, "held_out"),
        ({"codebook_size": 4, "held_out": [False], "tokens_0": np.full((2, 2), 4)}, "tokens_0"),
        ({"codebook_size": 4, "held_out": [False]}, "1 maps .* 0 held out"),
        ({"codebook_size": 4, "held_out": [True]}, "0 maps .* 1 held out"),
    ],
)
def test_broken_token_files_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "tokens.npz", **{"tokens_0": np.zeros((2, 2), np.int32), **arrays})
    with pytest.raises(ValueError, match=message):
        TokenMaps(tmp_path / "tokens.npz")


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "one array"])
def test_damaged_npz_files_are_refused(damage, token_file, tmp_path):
    path, content = tmp_path / "tokens.npz", token_file.read_bytes()
    if damage == "one array":
        np.save(tmp_path / "one.npy", np.zeros(3))
        content = (tmp_path / "one.npy").read_bytes()
    kinds = {"empty": b"", "cut": content[: len(content) // 2], "foreign": b"no zip file" * 9}
    path.write_bytes(kinds.get(damage, content))
    with pytest.raises(ValueError, match=r"tokens\.npz is damaged or no \.npz file"):
        TokenMaps(path)


def test_a_run_resumes_exactly_and_exports_when_finished(token_file, tmp_path):
    loop = LoopConfig(steps=6, learning_rate=2e-3, warmup=2, log_every=2, precision="bf16")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert train_entropy(CONFIG, loop, token_file, cut, minutes=0.0, schedules=()) is None
    assert not (cut / "entropy").exists() and (cut / "checkpoint.pt").is_file()
    assert train_entropy(CONFIG, loop, token_file, cut, schedules=())
    result = train_entropy(CONFIG, loop, token_file, whole, schedules=("qlds12",))
    once, again = (checkpoint.read(home / "checkpoint.pt") for home in (whole, cut))
    assert once["step"] == 6 and equal(once["model"], again["model"])
    assert equal(once["ema"], again["ema"])
    model = IntTransformer.load(whole / "entropy")
    assert result["fingerprint"] == model.fingerprint().hex()
    stored = json.loads((whole / "report.json").read_text())
    assert stored["qlds12"] == result["qlds12"]
    assert abs(stored["qlds12"]["integer"] / stored["qlds12"]["rounded"] - 1) < 0.01
    assert (whole / "held_out.csv").read_text().startswith("step,bits\n6,")


def stored(path: Path, **changes: object) -> Path:
    """A file of two small token maps, with some arrays replaced."""
    arrays = {f"tokens_{i}": smooth_map(4, 5, i) for i in range(2)}
    arrays |= {"codebook_size": np.int32(16), "held_out": np.array([False, True])}
    np.savez(path, **{**arrays, **changes})
    return path


WRONG_MAPS = {
    "wraps": ({"tokens_0": np.full((4, 5), 2**32 + 1)}, "tokens_0, int64 .* below 16"),
    "unsigned": ({"tokens_1": np.full((4, 5), 2**64 - 1, np.uint64)}, "tokens_1, uint64"),
    "negative": ({"tokens_1": np.full((4, 5), -1)}, "tokens_1, int64"),
    "fractions": ({"tokens_0": np.full((4, 5), 1.5)}, "tokens_0, float64"),
    "bool": ({"tokens_0": np.ones((4, 5), bool)}, "tokens_0, bool"),
    "texts": ({"tokens_0": np.full((4, 5), "a")}, "tokens_0, <U1"),
    "one axis": ({"tokens_0": np.ones(5, int)}, r"tokens_0, int64 \[5\]"),
    "empty": ({"tokens_0": np.ones((0, 5), int)}, r"tokens_0, int64 \[0, 5\]"),
    "size 16.7": ({"codebook_size": 16.7}, "codebook_size must be .* 2 to 8192, not 16.7"),
    "size text": ({"codebook_size": "16"}, "codebook_size must be .* not '16'"),
    "size list": ({"codebook_size": [16]}, r"codebook_size must be .* not \[16\]"),
    "size 10**12": ({"codebook_size": 10**12}, "codebook_size must be .* not 1000000000000"),
    "numbers": ({"held_out": [0, 5]}, r"held_out is int64 \[2\] instead of bool \[2\]"),
    "one": ({"held_out": True}, r"held_out is bool \[\] instead of bool \[2\]"),
    "two axes": ({"held_out": np.zeros((2, 2), bool)}, r"held_out is bool \[2, 2\]"),
}


@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_token_maps_of_another_kind_are_refused(wrong, tmp_path):
    """2**32 + 1 became 1, 1.5 became 1, and 16.7 entries became 16."""
    changes, message = WRONG_MAPS[wrong]
    with pytest.raises(ValueError, match=rf"a\.npz.*{message}"):
        TokenMaps(stored(tmp_path / "a.npz", **changes))


def test_whole_numbers_of_any_width_are_tokens(tmp_path):
    expected = smooth_map(4, 5, 0)
    for kind in (np.uint8, np.uint16, np.int64):
        maps = TokenMaps(stored(tmp_path / "a.npz", tokens_0=expected.astype(kind)))
        assert np.array_equal(maps.maps[0], expected) and maps.maps[0].dtype == np.int32


def test_files_of_token_maps_are_regular_files_without_objects(tmp_path):
    """numpy's own message advises to load objects, which may run any code."""
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is no regular file"):
            TokenMaps(tmp_path / f"{name}.npz")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none contains no \.npz files"):
        TokenMaps(tmp_path / "none")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1]))
    np.savez(tmp_path / "objects.npz", tokens_0=np.array([{}]))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
    )
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
        archive.writestr("tokens_0.npy", header.getvalue())
    for name in ("pickle", "objects", "claims"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is damaged or no \.npz") as fault:
            TokenMaps(tmp_path / f"{name}.npz")
        assert "pickle" not in str(fault.value).replace("pickle.npz", "")


LOOP_SETTINGS = (
    "steps = 0",
    "steps = -1",
    f"steps = {10**18}",
    "learning_rate = inf",
    "learning_rate = -1.0",
    "warmup = -1",
    "weight_decay = -1.0",
    "beta2 = 1.0",
    "clip = 0.0",
    "clip = -1.0",
    "ema = 2.0",
    "ema = -0.1",
    "seed = -1",
    "checkpoint_seconds = -1.0",
    "minutes = 0.0",
    "log_every = 0",
)
PHASE_SETTINGS = (
    "shapes = []",
    "shapes = [[0, 4]]",
    "shapes = [[-4, 4]]",
    "shapes = [[4, 4, 4]]",
    "tokens_per_step = 0",
    "tokens_per_step = -64",
    "tokens_per_step = 100_000_000_000",
    "real_orders = 1.5",
    "round_from = -0.1",
    "model = { zims = 3 }",
    "model = { dim = 1.5 }",
    "model = { codebook_size = 16 }",
)


@pytest.mark.parametrize("setting", [*LOOP_SETTINGS, *PHASE_SETTINGS])
def test_settings_without_sense_are_one_line(setting, token_file, tmp_path):
    loop = "{ steps = 1 }" if setting in PHASE_SETTINGS else f"{{ steps = 1, {setting} }}"
    if setting.startswith("steps"):
        loop = f"{{ {setting} }}"
    own = setting if setting in PHASE_SETTINGS else ""
    (tmp_path / "c.toml").write_text(f"[entropy]\nloop = {loop}\n{own}\n")
    name = setting.split(" = {")[-1].split()[0]
    with pytest.raises(ValueError, match=name) as fault:
        run_entropy(tmp_path / "c.toml", token_file, tmp_path / "run")
    assert "\n" not in str(fault.value) and "__init__" not in str(fault.value)
    assert not (tmp_path / "run").exists()


def test_lists_of_settings_are_described_as_lists(token_file, tmp_path):
    (tmp_path / "c.toml").write_text("[entropy]\nloop = { steps = 1 }\nshapes = [[4, 4, 4]]\n")
    with pytest.raises(ValueError, match="shapes must be a list, each a list of 2 values"):
        run_entropy(tmp_path / "c.toml", token_file, tmp_path / "run")


@pytest.mark.parametrize("minutes", [float("nan"), -1.0])
def test_a_time_to_stop_after_is_checked(minutes, token_file, tmp_path):
    with pytest.raises(ValueError, match=f"at least 0 minutes, not {minutes}"):
        train_entropy(CONFIG, LoopConfig(steps=1), token_file, tmp_path, minutes=minutes)
