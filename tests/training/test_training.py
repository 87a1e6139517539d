"""Stage 1: data cache, crops, losses, two steps of each phase, exact resume after a kill."""

from __future__ import annotations

import hashlib
import io
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from percov2.training import checkpoint
from percov2.training.commands import autoencoder_stage, codec_stage, read_section
from percov2.training.data import PARTS, PhotoCrops, decode_shards
from percov2.training.loop import LoopConfig, TrainingStage, _learning_rate, load_averaged, train
from tools.tiny_flow import TINY_FLOW

CONFIG = """
[autoencoder]
autoencoder = { widths = [8, 16] }
crops = { sides = [48], counts = [2] }
loop = { steps = 4, warmup = 1, log_every = 1 }

[codec]
text_encoder = { buckets = 32, dim = 8, length = 4 }
loop = { steps = 4, warmup = 1, log_every = 1 }

[codec.rates.r031]
hyper_encoder = { channels = 8, hyper_channels = 8, stride = 2 }
quantizer = { hyper_channels = 8, codebook_size = 16, code_dim = 4, output_channels = 4 }
crops = { sides = [48, 48], counts = [4, 2] }
"""
CONFIG += TINY_FLOW


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "photos-000.tar", "w") as tar:
        for i, (height, width) in enumerate([(48, 64), (64, 48), (32, 40)]):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "png")
            _add(tar, f"pic-{i}.png", out.getvalue())
            if i == 0:
                _add(tar, f"pic-{i}.txt", b"a red door\na blue door\n")
    decode_shards([folder / "photos-000.tar"], folder / "cache")
    return folder / "cache"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "test.toml"
    path.write_text(CONFIG)
    return path


def test_cache_holds_the_decoded_photos(cache):
    data = PhotoCrops(cache)
    assert [(p.height, p.width) for p in data.photos] == [(48, 64), (64, 48), (32, 40)]
    assert data.photos[0].captions == ("a red door", "a blue door")
    generator = np.random.default_rng(0)
    for photo in data.photos:
        expected = generator.integers(0, 256, (photo.height, photo.width, 3), dtype=np.uint8)
        assert np.array_equal(data.pixels(photo), expected)


def test_crops_are_parts_of_photos_at_native_resolution(cache):
    data = PhotoCrops(cache)
    images, captions = data.batch(np.random.default_rng(5), 6, 32)
    assert images.shape == (6, 3, 32, 32) and len(captions) == 6
    assert set(captions) <= {"a red door", "a blue door", ""}
    crop = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()

    def contains(pixels: np.ndarray) -> bool:
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32, 3))
        return bool((windows == crop).all((-1, -2, -3)).any())

    photos = [data.pixels(p) for p in data.photos]
    assert any(contains(p) or contains(p[:, ::-1]) for p in photos)


def test_crops_cut_on_the_device_are_those_cut_from_the_map(cache):
    here = PhotoCrops(cache)
    there = here.on(torch.device("cpu"))
    there._upload()  # as `on` does for a GPU
    for seed, side in ((0, 8), (1, 31), (2, 48)):
        expected, captions = here.batch(np.random.default_rng(seed), 9, side)
        crops, same = there.batch(np.random.default_rng(seed), 9, side)
        assert torch.equal(crops, expected) and same == captions


def test_photos_with_captions_can_be_chosen(cache):
    chosen = PhotoCrops(cache).with_captions()
    assert [photo.key for photo in chosen.photos] == ["pic-0"]
    assert set(chosen.batch(np.random.default_rng(0), 20, 32)[1]) == {"a red door", "a blue door"}
    assert len(PhotoCrops(cache).photos) == 3
    chosen.photos = chosen.photos[1:]
    with pytest.raises(ValueError, match="has a caption"):
        chosen.with_captions()


def test_held_out_photos_are_never_drawn(tmp_path):
    keys = [f"photo-{i}" for i in range(40)]
    held_out = [key for key in keys if hashlib.sha256(key.encode()).digest()[0] < 22]
    assert "photo-2" in held_out and 2 <= len(held_out) <= 6
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for key in keys:
            out = io.BytesIO()
            colour = (0, 0, 255) if key in held_out else (255, 0, 0)
            Image.new("RGB", (9, 9), colour).save(out, "png")
            _add(tar, f"{key}.png", out.getvalue())
    decode_shards([tmp_path / "photos.tar"], tmp_path / "cache")
    parts = {part: PhotoCrops(tmp_path / "cache", part) for part in PARTS}
    assert [p.key for p in parts["held out"].photos] == held_out
    assert [p.key for p in parts["all"].photos] == keys
    assert len(parts["training"].photos) + len(held_out) == len(keys)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    images, _ = PhotoCrops(tmp_path / "cache").batch(np.random.default_rng(0), 200, 8)
    assert torch.equal(images, red.expand_as(images))
    images, _ = parts["held out"].batch(np.random.default_rng(0), 20, 8)
    assert torch.equal(images, red.flip(1).expand_as(images))


def test_data_refusals(cache, tmp_path):
    with pytest.raises(ValueError, match="percov2 train data"):
        PhotoCrops(tmp_path)
    with pytest.raises(ValueError, match=r"part must be one of .* not 'test'"):
        PhotoCrops(cache, "test")
    with pytest.raises(ValueError, match="no held out photos"):
        PhotoCrops(cache, "held out")
    with pytest.raises(ValueError, match="smaller crop"):
        PhotoCrops(cache).batch(np.random.default_rng(0), 1, 65)
    with pytest.raises(ValueError, match=r"no \.tar"):
        decode_shards([], tmp_path)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        _add(tar, "a.txt", b"no photo")
    with pytest.raises(ValueError, match=r"empty\.tar"):
        decode_shards([tmp_path / "empty.tar"], tmp_path / "cache")


def test_config_refusals(config, cache, tmp_path):
    with pytest.raises(ValueError, match="no \\[entropies\\]"):
        read_section(config, "entropies")
    typo = tmp_path / "typo.toml"
    typo.write_text(CONFIG.replace("warmup", "warmpu"))
    with pytest.raises(ValueError, match="warmpu"):
        autoencoder_stage(typo, PhotoCrops(cache))


def _stage(kind: str, config: Path, data: PhotoCrops) -> tuple[TrainingStage, object]:
    torch.manual_seed(7)
    return (autoencoder_stage if kind == "autoencoder" else codec_stage)(config, data)


@pytest.mark.parametrize("kind", ["autoencoder", "codec"])
def test_killed_and_resumed_equals_uninterrupted(kind, config, cache, tmp_path):
    data = PhotoCrops(cache)
    stage, loop = _stage(kind, config, data)
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    assert train(stage, loop, tmp_path / "once") == 4
    changed = [k for k, v in stage.state_dict().items() if not torch.equal(v, before[k])]
    assert any("decoder" in k for k in changed)
    frozen = any(k.startswith("autoencoder.encoder") for k in changed)
    assert frozen == (kind == "autoencoder")
    for _ in range(2):
        resumed, loop = _stage(kind, config, data)
        train(resumed, loop, tmp_path / "twice", stop_after_steps=2)
    for key, value in stage.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    fresh, _ = _stage(kind, config, data)
    assert load_averaged(tmp_path / "twice", fresh) == 4
    assert all(torch.equal(v, stage.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert (tmp_path / "once" / "samples.png").is_file()
    lines = (tmp_path / "twice" / "log.csv").read_text().splitlines()
    names = "l1,lpips" if kind == "autoencoder" else "l1_r031,lpips_r031"
    assert len(lines) == 5 and lines[0].startswith(f"step,seconds,{names}")


def test_checkpoints_of_earlier_versions_are_gone_on_with(config, cache, tmp_path):
    """They hold neither other processes' draws nor a state beside the weights."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for out, steps in ((whole, 4), (parted, 2)):
        stage, loop = _stage("codec", config, PhotoCrops(cache))
        train(stage, loop, out, stop_after_steps=steps)
    path = parted / "checkpoint.pt"
    state = checkpoint.read(path)
    torch.save({k: v for k, v in state.items() if k not in ("other_processes", "side")}, path)
    stage, loop = _stage("codec", config, PhotoCrops(cache))
    assert train(stage, loop, parted) == 4
    expected, got = (checkpoint.read(out / "checkpoint.pt")["ema"] for out in (whole, parted))
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_missing_checkpoint_is_explained(config, cache, tmp_path):
    stage, _ = _stage("autoencoder", config, PhotoCrops(cache))
    with pytest.raises(ValueError, match="train this stage first"):
        load_averaged(tmp_path, stage)


def test_a_loss_that_is_not_finite_stops_training(config, cache, tmp_path):
    stage, loop = _stage("autoencoder", config, PhotoCrops(cache))
    with torch.no_grad():
        next(stage.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(stage, loop, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_steps_with_a_checkpoint(number, config, cache, tmp_path):
    stage, loop = _stage("autoencoder", config, PhotoCrops(cache))
    before = signal.getsignal(number)
    forward, calls = stage.forward, []

    def interrupted(generator: np.random.Generator) -> tuple[torch.Tensor, dict]:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return forward(generator)

    stage.forward = interrupted
    assert train(stage, loop, tmp_path) == 2
    assert signal.getsignal(number) == before
    fresh, _ = _stage("autoencoder", config, PhotoCrops(cache))
    assert load_averaged(tmp_path, fresh) == 2


def test_a_run_of_more_processes_is_not_resumed_by_one(config, cache, tmp_path):
    stage, loop = _stage("autoencoder", config, PhotoCrops(cache))
    train(stage, loop, tmp_path, stop_after_steps=1)
    path = tmp_path / "checkpoint.pt"
    state = checkpoint.read(path)
    state["other_processes"] = [{k: state[k] for k in ("generator", "torch_rng")}]
    checkpoint.write(path, state)
    with pytest.raises(ValueError, match="2 processes"):
        train(stage, loop, tmp_path)


def test_learning_rates():
    cosine = LoopConfig(steps=110, learning_rate=1.0, warmup=10)
    constant = LoopConfig(steps=110, learning_rate=1.0, warmup=10, schedule="constant")
    for config in (cosine, constant):
        rates = [_learning_rate(config, step, 0.0) for step in (0, 4, 9)]
        assert rates == pytest.approx([0.1, 0.5, 1.0])
    assert _learning_rate(cosine, 60, 0.0) == pytest.approx(0.51)
    assert _learning_rate(cosine, 110, 0.0) == pytest.approx(0.02)
    assert _learning_rate(constant, 109, 0.0) == 1.0
    timed = LoopConfig(steps=1_000_000, learning_rate=1.0, warmup=10, minutes=8.0)
    rates = [_learning_rate(timed, 20, minutes) for minutes in (0.0, 4.0, 8.0, 9.0)]
    assert rates == pytest.approx([1.0, 0.51, 0.02, 0.02])
    for wrong in ({"schedule": "linear"}, {"accumulate": 0}, {"minutes": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoopConfig(steps=1, **wrong)
