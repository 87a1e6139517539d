"""Stage 1: data cache, crops, losses, two steps of each phase, exact resume after a kill."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from percov2.photos import PARTS, PhotoCrops, decode_shards
from percov2.training import checkpoint
from percov2.training.autoencoder_stage import AutoencoderStage
from percov2.training.averaging import AveragedWeights
from percov2.training.commands import autoencoder_stage, read_section
from percov2.training.loop import LoopConfig, _learning_rate, load_averaged, train
from percov2.training.stage import keep_rows
from tools.photos import png, write_tar
from tools.rate_runs import config_text, moved, snapshot, written

CONFIG = config_text(["r031"], steps=4)
CONFIG = CONFIG.replace("sides = [48], counts = [2]", "sides = [48, 48], counts = [4, 2]")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    members = {"pic-0.txt": b"a red door\na blue door\n"}
    for i, size in enumerate([(48, 64), (64, 48), (32, 40)]):
        members[f"pic-{i}.png"] = png(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
    decode_shards([write_tar(folder / "photos-000.tar", members)], folder / "cache")
    return folder / "cache"


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
    colours = [(0, 0, 255) if key in held_out else (255, 0, 0) for key in keys]
    photos = [png(Image.new("RGB", (9, 9), colour)) for colour in colours]
    members = {f"{key}.png": photo for key, photo in zip(keys, photos, strict=True)}
    decode_shards([write_tar(tmp_path / "photos.tar", members)], tmp_path / "cache")
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
    random = np.random.default_rng(0)
    empty = write_tar(tmp_path / "empty.tar", {"a.txt": b"no photo"})
    for match, call in (
        ("percov2 train data", lambda: PhotoCrops(tmp_path)),
        (r"part must be one of .* not 'test'", lambda: PhotoCrops(cache, "test")),
        ("no held out photos", lambda: PhotoCrops(cache, "held out")),
        ("smaller crop", lambda: PhotoCrops(cache).batch(random, 1, 65)),
        (r"no \.tar", lambda: decode_shards([], tmp_path)),
        (r"empty\.tar", lambda: decode_shards([empty], tmp_path / "cache")),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_config_refusals(cache, tmp_path):
    path = written(tmp_path, CONFIG.replace("warmup", "warmpu"))
    with pytest.raises(ValueError, match="no \\[entropies\\]"):
        read_section(path, "entropies")
    with pytest.raises(ValueError, match="warmpu"):
        autoencoder_stage(path, PhotoCrops(cache))


@pytest.fixture
def begin(cache, tmp_path) -> Callable[[], tuple[AutoencoderStage, LoopConfig]]:
    """A function that begins the same autoencoder phase again."""
    config = written(tmp_path, CONFIG)
    return lambda: autoencoder_stage(config, PhotoCrops(cache))


@pytest.mark.parametrize("old", [False, True])
def test_killed_and_resumed_equals_uninterrupted(old, begin, tmp_path):
    stage, loop = begin()
    before = snapshot(stage)
    assert train(stage, loop, tmp_path / "once") == 4
    changed = moved(before, stage.state_dict())
    assert all(any(part in k for k in changed) for part in ("encoder", "decoder"))
    for _ in range(2):
        resumed, loop = begin()
        train(resumed, loop, tmp_path / "twice", stop_after_steps=2)
        path = tmp_path / "twice" / "checkpoint.pt"
        if old:  # versions before had neither other processes' draws nor a state beside the weights
            state = checkpoint.read(path)
            torch.save({k: state[k] for k in state.keys() - {"other_processes", "side"}}, path)
    assert not moved(stage.state_dict(), resumed.state_dict())
    fresh, _ = begin()
    assert load_averaged(tmp_path / "twice", fresh) == 4
    assert not moved(stage.state_dict(), fresh.state_dict())
    with pytest.raises(ValueError, match="train this stage first"):
        load_averaged(tmp_path, fresh)
    assert (tmp_path / "once" / "samples.png").is_file()
    lines = (tmp_path / "twice" / "log.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("step,seconds,l1,lpips")


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "foreign": lambda data: b"no checkpoint",
}


def flipped(data: bytes) -> bytes:
    """The bytes with a changed one in the largest tensor, which torch reads without a word."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        content = archive.read(largest := max(tensors, key=lambda info: info.file_size))
    at = data.index(content, largest.header_offset) + len(content) // 2
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def changed(**parts: object) -> Callable[[bytes], bytes]:
    """A function that replaces parts of a checkpoint."""

    def change(data: bytes) -> bytes:
        state = torch.load(io.BytesIO(data), weights_only=True)
        out = io.BytesIO()
        torch.save({**state, **parts}, out)
        return out.getvalue()

    return change


DAMAGES |= {
    "flipped": flipped,
    "no averages": changed(ema=None),
    "averages without tensors": changed(ema={"a": None}),
    "a list of averages": changed(ema=[1]),
    "no weights": changed(model=None),
    "a text as step": changed(step="20"),
    "half a step": changed(step=1.5),
    "a huge step": changed(step=10**30),
    "a negative step": changed(step=-5),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(begin, tmp_path, damage):
    for _ in range(2):
        stage, loop = begin()
        train(stage, loop, tmp_path / "run", stop_after_steps=2)
    path = tmp_path / "run" / "checkpoint.pt"
    assert not path.with_suffix(".part").exists()
    assert checkpoint.read(checkpoint.previous(path))["step"] == 2
    content = path.read_bytes()
    if damage == "missing":  # the moment between two renames
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](content))
    resumed, loop = begin()
    with pytest.warns(UserWarning, match="goes on from the checkpoint before"):
        assert train(resumed, loop, tmp_path / "run") == 4
    assert not moved(stage.state_dict(), resumed.state_dict())
    steps = [line.split(",")[0] for line in log_of(tmp_path / "run")]
    assert steps == ["step", "1", "2", "3", "4"]


def test_a_checkpoint_is_on_the_disk_before_its_name_changes(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, call=call, name=name: (calls.append(name), call(*a))
        )
    for _ in range(2):
        checkpoint.write(tmp_path / "checkpoint.pt", {"ema": {}, "step": 1})
    assert calls == ["fsync", "replace", "fsync", "fsync", "replace", "replace", "fsync"]


def log_of(run: Path) -> list[str]:
    return (run / "log.csv").read_text().splitlines()


WRONG_PARTS = ("optimizer", "generator", "torch_rng", "minutes", "other_processes")


@pytest.mark.parametrize("part", [*WRONG_PARTS, "ema"])
def test_parts_of_a_wrong_type_are_one_line(part, begin, tmp_path):
    stage, loop = begin()
    train(stage, loop, tmp_path, stop_after_steps=1)
    path = tmp_path / "checkpoint.pt"
    wrong = {"ema": {}, "other_processes": 3}.get(part, ["x"])
    path.write_bytes(changed(**{part: wrong})(path.read_bytes()))
    stage, loop = begin()
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt (does not match|contains other)"
    ) as fault:
        train(stage, loop, tmp_path)
    assert "\n" not in str(fault.value)


def test_messages_repeat_no_advice_to_run_code(begin, tmp_path):
    """torch advises to read a file without weights_only, which runs any code in it."""
    stage, loop = begin()
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        torch.save({"ema": {}, "step": 1, "more": Path()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"more than tensors.*, and .*previous is") as fault:
        train(stage, loop, tmp_path)
    assert "weights_only" not in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt.previous", "log.csv"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_first_step(name, begin, tmp_path):
    stage, loop = begin()
    (tmp_path / name).mkdir()
    stage.forward = lambda generator: pytest.fail("a step was done")
    with pytest.raises(ValueError, match=f"{name} is (a folder|no regular file)"):
        train(stage, loop, tmp_path)


def test_tables_of_others_in_the_folder_of_a_run_are_left_alone(begin, tmp_path):
    text = "my,own,notes\nhello,1,2\n30,4,5\n"
    for name in ("notes.csv", "held_out.csv"):  # this phase writes no held_out.csv
        (tmp_path / name).write_text(text)
    for _ in range(2):
        stage, loop = begin()
        train(stage, loop, tmp_path, stop_after_steps=2)
    assert {(tmp_path / name).read_text() for name in ("notes.csv", "held_out.csv")} == {text}
    assert not list(tmp_path.glob("*.part"))


def test_rows_that_repeat_or_are_no_text_are_removed(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(b"step,loss\n1,a\n2,b\n1,c\n2,d\n\xff,e\n3,f\n4,g\n")
    keep_rows(log, 3)
    assert log.read_text() == "step,loss\n1,a\n2,b\n3,f\n"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "number keys", "a list"])
def test_without_an_earlier_one_a_damaged_checkpoint_is_named(begin, tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({1: 2} if content == "number keys" else [1], path)
    stage, loop = begin()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is .*delete it to start the run again"):
        train(stage, loop, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is "):
        load_averaged(tmp_path, stage)


def test_a_killed_run_logs_every_step_once(begin, tmp_path):
    stage, loop = begin()
    train(stage, loop, tmp_path, stop_after_steps=2)
    with open(tmp_path / "log.csv", "a") as log:  # steps after the last checkpoint, and a torn row
        log.write("3,0,0,0\n4,0,0,0\n5,0")
    stage, loop = begin()
    train(stage, loop, tmp_path)
    lines = log_of(tmp_path)
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4"]
    assert "3,0,0,0" not in lines


def test_a_loss_that_is_not_finite_stops_training(begin, tmp_path):
    stage, loop = begin()
    with torch.no_grad():
        next(stage.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(stage, loop, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_between_steps_with_a_checkpoint(number, begin, tmp_path):
    stage, loop = begin()
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
    assert load_averaged(tmp_path, begin()[0]) == 2


def test_a_run_of_more_processes_is_not_resumed_by_one(begin, tmp_path):
    stage, loop = begin()
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


class Network(nn.Module):
    """A trained and a frozen parameter, a buffer, and one that checkpoints leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.left_out = nn.Parameter(torch.ones(1))
        self.register_buffer("counts", torch.zeros(2))


def test_averages_follow_trained_parameters_and_copy_buffers():
    network = Network()
    averaged = AveragedWeights(network, 0.9, {"trained", "frozen", "counts"})
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(200):
        with torch.no_grad():
            network.trained.copy_(torch.tensor([1.0, step, (-1.0) ** step]))
            network.counts += 1
        averaged.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.trained.detach().double()
        assert torch.allclose(averaged.state["trained"].double(), expected, rtol=1e-5)
        assert torch.equal(averaged.state["counts"], network.counts)
    assert set(averaged.state) == {"trained", "frozen", "counts"}
    assert averaged.state["frozen"].tolist() == [1, 1]
    with averaged.applied_to(network):
        assert torch.equal(network.trained, averaged.state["trained"])
    assert network.trained.tolist() == [1, 199, -1]
    nothing = AveragedWeights(network, 0.9, {"frozen", "counts"})  # may be trained
    network.counts += 1
    nothing.update(network, 0)
    assert nothing.state["counts"].tolist() == [201, 201]
