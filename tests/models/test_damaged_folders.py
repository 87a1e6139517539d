"""A model folder with a damaged or foreign part is refused in one sentence that names the part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from percov2 import BackboneOptions, Codec
from percov2.models.checksums import CHECKSUMS, write_checksums
from percov2.models.tiny.backbone import TinyModel
from percov2.models.tiny.torch.dial import RealismDial
from percov2.models.tiny.torch.graphs import write_graphs
from percov2.models.torch.storage import save_component
from tools import random_model as builder
from tools.photos import noise


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A random model with a dial and graphs."""
    folder = builder.build(tmp_path_factory.mktemp("whole") / "model")
    torch.manual_seed(5)
    save_component(RealismDial(frequencies=3, width=8, pooled=8), folder / "dial", "float16")
    edit(realism=0.75)(folder / "config.json")
    write_graphs(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def edit(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def damage(name: str, value: np.ndarray | None) -> Callable[[Path], None]:
    """Replace a tensor, or remove it."""

    def change(path: Path) -> None:
        tensors = {**load_file(path), name: value}
        save_file({key: kept for key, kept in tensors.items() if kept is not None}, path)

    return change


def rename_a_scale(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b".scale", b".scald", 1))


def use(folder: Path, runtime: str = "onnx") -> None:
    codec = Codec.from_pretrained(folder, options=BackboneOptions(runtime=runtime))
    codec.decompress(codec.compress(noise(64, 64), caption="a red door"))


def test_the_whole_folder_is_used(whole):
    use(whole)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("flow/config.json", write(""), r"flow/config\.json: Expecting value"),
        ("flow/config.json", write("[" * 100_000), r"flow/config\.json: it is nested too deeply"),
        ("flow/config.json", write("[]"), r"flow/config\.json: it contains no settings"),
        ("flow/config.json", write("{}"), r"flow/config\.json: patch_size must be a whole"),
        ("flow/config.json", edit(patch_size=0), r"flow/config\.json: patch_size must be"),
        ("flow/config.json", edit(out_channels=4), r"graph\.onnx does not accept x \("),
        ("config.json", edit(window=1, overlap=0), r"graph\.onnx does not accept x \("),
        ("flow/model.safetensors", rename_a_scale, r"flow/model\.safetensors is damaged"),
        ("text_encoder/model.safetensors", damage("positions", None), "lacks the tensor positions"),
        (
            "text_encoder/model.safetensors",
            damage("positions", np.zeros((3, 4), np.float32)),
            r"positions has shape|words\.weight has shape",
        ),
        (
            "fine/quantizer/model.safetensors",
            damage("project_out.bias", None),
            r"lacks the tensor project_out\.bias",
        ),
        (
            "fine/quantizer/model.safetensors",
            damage("project_in.bias", np.full(8, np.nan, np.float32)),
            r"project_in\.bias (contains numbers|has shape)",
        ),
        ("dial/model.safetensors", damage("more", np.zeros(1, np.float32)), "unknown tensor more"),
    ],
)
def test_damaged_parts_are_refused(copy, file, change, message):
    change(copy / file)
    with pytest.raises(ValueError, match=message):
        use(copy)


def test_networks_of_another_rate_are_refused(copy):
    fine, coarse = copy / "fine" / "hyper_encoder", copy / "coarse" / "hyper_encoder"
    fine.rename(copy / "swapped")
    coarse.rename(fine)
    with pytest.raises(ValueError, match="belongs to another rate"):
        use(copy)


def test_blocks_of_the_decoder_are_checked(copy):
    edit(decoder_blocks="x")(copy / "autoencoder" / "config.json")
    with pytest.raises(ValueError, match="decoder_blocks must be two whole numbers, not 'x'"):
        _ = TinyModel(copy, 1)._reach


def test_a_changed_byte_of_any_network_is_noticed(copy, capfd):
    write_checksums(copy)
    use(copy)
    names = [line.split("  ")[1] for line in (copy / CHECKSUMS).read_text().splitlines()]
    assert {"flow/graph.onnx", "dial/model.safetensors", "fine/entropy/config.json"} <= set(names)
    assert "config.json" not in names
    for name in (name for name in names if not name.startswith("coarse/")):
        path = copy / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for runtime in ("onnx", "torch"):
            with pytest.raises(ValueError, match=f"{name} is missing or has changed since"):
                use(copy, runtime)
        path.write_bytes(content)
    use(copy)
    (copy / CHECKSUMS).write_text("no checksums\n")
    with pytest.raises(ValueError, match="does not consist of checksums and names"):
        use(copy)
    assert capfd.readouterr().out == ""


def test_the_runtime_prints_nothing(copy, capfd):
    graph = copy / "autoencoder" / "encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[34] ^= 0x80
    graph.write_bytes(data)
    with pytest.raises(ValueError, match=r"encoder\.onnx"):
        use(copy)
    assert capfd.readouterr() == ("", "")


PARTS = (
    "config.json",
    "checksums.sha256",
    "flow/config.json",
    "flow/graph.onnx",
    "flow/model.safetensors",
    "dial/model.safetensors",
    "fine/entropy/config.json",
    "fine/entropy/model.safetensors",
)


def replace_by(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as stream:
            stream.truncate(1 << 40)  # takes no room on the disk


@pytest.mark.parametrize("kind", ["pipe", "device", "terabyte"])
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_parts_are_regular_files_of_bounded_size(copy, kind, runtime):
    """A pipe would wait for a writer for ever, and the others would fill the memory."""
    for part in PARTS:
        if (runtime, part) == ("torch", "flow/graph.onnx") or (
            kind == "terabyte" and part.startswith("dial/")  # only its header is read
        ):
            continue
        kept = (copy / part).read_bytes() if (copy / part).exists() else None
        replace_by(kind, copy / part)
        with pytest.raises(
            ValueError, match=rf"{part}( is no regular file| is damaged|: )"
        ) as fault:
            use(copy, runtime)
        assert "\n" not in str(fault.value)
        (copy / part).unlink()
        if kept is not None:
            (copy / part).write_bytes(kept)


def test_parts_may_be_links(copy, tmp_path):
    """A hub's cache consists of links to files in another folder."""
    write_checksums(copy)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(path for path in sorted(copy.rglob("*")) if path.is_file()):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    use(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "the model has unknown settings: 'more'"),
        ({"rates": "fine"}, "rates must be a list of at least one rate, not 'fine'"),
        ({"rates": []}, "rates must be a list of at least one rate"),
        ({"rates": ["fine"]}, "a rate must be an object of settings, not 'fine'"),
        ({"rates": [{"name": "fine"}]}, "a rate lacks the settings token_side, codebook_size"),
        ({"rates": [{"name": "a", "side": 1}]}, "a rate has unknown settings: 'side'"),
        ({"default_rate": []}, r"default_rate must be the name of a rate, not \[\]"),
        ({"name": "a\x1b[31m"}, r"name must consist of printable characters, not 'a\\x1b"),
        ({"name": 5}, "name must be a text, not 5"),
    ],
)
def test_settings_of_a_model_are_named_in_plain_words(copy, change, message):
    edit(**change)(copy / "config.json")
    with pytest.raises(ValueError, match=message):
        Codec.from_pretrained(copy)


@pytest.mark.parametrize("name", ["r\x1b[31m", "con\n", "\u202er", "a\0b"])
def test_names_of_rates_are_printable(copy, name):
    values = json.loads((copy / "config.json").read_text())
    values["rates"][1]["name"] = name
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="a rate's name must"):
        Codec.from_pretrained(copy)


def test_a_setting_that_occurs_twice_is_refused(copy):
    """Which of the two counts would depend on the reader."""
    for path in (copy / "config.json", copy / "fine" / "entropy" / "config.json"):
        text = path.read_text()
        path.write_text(text.replace("{", '{"dim": 1, "dim": 1,', 1))
        with pytest.raises(ValueError, match=r"config\.json: 'dim' occurs twice"):
            use(copy)
        path.write_text(text)
