"""The small model on ONNX Runtime: the same tokens and pictures as on torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.codec import Codec
from percov2.images import from_unit_range, to_unit_range
from percov2.models.backbone import BackboneOptions, open_backbone
from percov2.models.config import ModelConfig
from percov2.models.stored_tensors import read_tensors
from percov2.models.tiny.backbone import TinyModel, position_table
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.tiny.torch.dial import RealismDial
from percov2.models.tiny.torch.graphs import write_graphs
from percov2.models.tiny.torch.int8_decoder import write_int8_decoder
from percov2.models.torch.storage import save_component
from tools import random_model as builder
from tools.photos import noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model with a dial, a velocity flow and graphs."""
    folder = builder.build(tmp_path_factory.mktemp("onnx") / "model")
    torch.manual_seed(5)
    dial = RealismDial(frequencies=3, width=8, pooled=8)
    torch.nn.init.normal_(dial.layers[2].weight)
    save_component(dial, folder / "dial", "float16")
    config = dataclasses.replace(
        ModelConfig.load(folder), realism=0.75, decoder_noise=0.3, overlap=6, prediction="velocity"
    )
    config.save(folder)
    autoencoder = PatchAutoencoder(16, (32, 32), (1, 1), (1, 1))
    for parameter in autoencoder.parameters():  # new residual blocks would change nothing
        torch.nn.init.normal_(parameter, std=0.06)
    save_component(autoencoder, folder / "autoencoder", "int8")
    write_graphs(folder)
    return folder


@pytest.fixture(scope="module")
def models(folder) -> tuple[TinyModel, TinyTorchModel]:
    onnx, on_torch = (
        open_backbone(folder, options=BackboneOptions(runtime=name)) for name in ("onnx", "torch")
    )
    assert isinstance(onnx, TinyModel) and isinstance(on_torch, TinyTorchModel)
    return onnx, on_torch


def images(count: int, height: int, width: int) -> np.ndarray:
    return to_unit_range(np.stack([np.asarray(noise(width, height, i)) for i in range(count)]))


@pytest.mark.parametrize("rate", ["fine", "coarse"])
@pytest.mark.parametrize("sides", [(32, 32), (96, 160)])
def test_directions_and_tokens_equal_those_of_torch(models, rate, sides):
    onnx, on_torch = models
    pixels = images(3, *sides)
    ours, theirs = (model.directions(pixels, rate) for model in models)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.mean(onnx.encode_tokens(pixels, rate) == on_torch.encode_tokens(pixels, rate)) > 0.99
    for mine, other in zip(
        onnx.candidates(ours, rate, 7), on_torch.candidates(ours, rate, 7), strict=True
    ):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert np.allclose(mine, other, atol=1e-5)
    tensors = torch.from_numpy(pixels)
    assert torch.is_tensor(on_torch.encode_tokens(tensors, rate))
    with pytest.raises(ValueError, match="multiples"):
        onnx.encode_tokens(pixels[..., :-8], rate)


@pytest.mark.parametrize(
    ("grid", "steps", "guidance", "realism"),
    [((2, 3), 1, 1.0, None), ((5, 3), 3, 2.0, 0.0), ((11, 4), 2, 1.5, 1.0), ((1, 1), 1, 3.0, 0.4)],
)
def test_painted_pictures_equal_those_of_torch(models, grid, steps, guidance, realism):
    tokens = np.random.default_rng(0).integers(0, 64, (2, *grid)).astype(np.int32)
    captions = ["a red door", ""]
    ours, theirs = (
        model.reconstruct(tokens, "fine", captions, steps, guidance, 7, realism) for model in models
    )
    assert ours.shape == theirs.shape == (2, 3, 16 * grid[0], 16 * grid[1])
    assert np.abs(ours).max() <= 1
    assert np.abs(ours - theirs).max() < 1e-3


def test_company_and_threads_do_not_change_tokens(folder, models):
    pixels = images(4, 64, 96)
    alone = np.concatenate([models[0].encode_tokens(one[None], "fine") for one in pixels])
    for threads in (1, 2, 3):
        model = open_backbone(folder, options=BackboneOptions(runtime="onnx", threads=threads))
        assert np.array_equal(model.encode_tokens(pixels, "fine"), alone)
        assert np.array_equal(model.encode_tokens(pixels[::-1], "fine"), alone[::-1])


def test_large_pictures_are_decoded_in_equal_tiles(folder, models, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 64, (1, 13, 18))
    whole = models[0].reconstruct(tokens, "fine", [""], 1, 1.0, 0)
    monkeypatch.setattr("percov2.models.tiny.backbone._TILE", 20)
    model = open_backbone(folder)
    assert model._reach == 5 and len(model._tiles(36)) == 4
    tiled = model.reconstruct(tokens, "fine", [""], 1, 1.0, 0)
    assert np.abs(whole - tiled).max() < 1e-5


def test_wrong_tokens_are_refused(models):
    for value in (-1, 64):
        with pytest.raises(ValueError, match="0…63"):
            models[0].reconstruct(np.full((1, 2, 2), value), "fine", [""], 1, 1.0, 0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        models[0].reconstruct(np.zeros((1, 2, 2), int), "fine", [""], 0, 1.0, 0)


def test_the_table_of_positions_is_the_flows(models):
    flow = models[1].flow
    config = flow.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    base = config["sample_size"] // config["patch_size"]
    table = position_table(width, config["pos_embed_max_size"], base)
    assert np.allclose(table, flow.pos_embed.pos_embed.numpy(), atol=1e-6)


def test_stored_tensors_equal_the_loaded_network(folder, models):
    tensors = read_tensors(folder / "flow" / "model.safetensors")
    for name, value in models[1].flow.state_dict().items():
        if name in tensors:
            assert np.array_equal(tensors[name], value.numpy())


def test_a_folder_with_graphs_needs_no_torch_runtime(folder, random_model):
    assert isinstance(open_backbone(folder), TinyModel)
    assert isinstance(open_backbone(random_model), TinyTorchModel)  # it has no graphs
    with pytest.raises(ValueError, match=r"contains no graph\.onnx; write it with"):
        open_backbone(random_model, options=BackboneOptions(runtime="onnx")).encode_tokens(
            images(1, 32, 32), "fine"
        )
    with pytest.raises(ValueError, match="threads is an option of runtime 'onnx'"):
        open_backbone(folder, options=BackboneOptions(runtime="torch", threads=2))
    with pytest.raises(ValueError, match="tiny on cuda needs 'torch'"):
        open_backbone(folder, "cuda", BackboneOptions(runtime="onnx"))
    with pytest.raises(ValueError, match="runtime must be one of"):
        BackboneOptions(runtime="jax")
    with pytest.raises(ValueError, match=f"threads .*which {random_model} needs.* no graphs"):
        open_backbone(random_model, options=BackboneOptions(threads=2))
    for threads in (0, 1025, 10**10, True, 2.0, "2"):
        with pytest.raises(ValueError, match="threads must be a whole number from 1 to 1024"):
            BackboneOptions(threads=threads)
    assert type(BackboneOptions(threads=np.int64(2)).threads) is int


@pytest.mark.parametrize("fault", ["other weights", "cut", "no graph"])
def test_graphs_that_do_not_fit_are_refused(folder, tmp_path, fault):
    copy = shutil.copytree(folder, tmp_path / "copy")
    graph, weights = (copy / "flow" / name for name in ("graph.onnx", "model.safetensors"))
    if fault == "other weights":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif fault == "cut":
        graph.write_bytes(graph.read_bytes()[:-100])
    else:
        graph.write_bytes(b"")
    with pytest.raises(ValueError, match=r"graph\.onnx|other weights"):
        open_backbone(copy).reconstruct(np.zeros((1, 2, 2), int), "fine", [""], 1, 1.0, 0)


@pytest.fixture(scope="module")
def with_int8(folder, tmp_path_factory) -> Path:
    """The folder with a graph of an int8 decoder."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("int8") / "model")
    model = TinyModel(folder, threads=1)
    grids = [np.random.default_rng(i).integers(0, 64, (1, 4, 5)) for i in range(4)]
    latents = [model.latents(grid, "fine", [""], 1, 1.0, seed=0) for grid in grids]
    write_int8_decoder(copy / "autoencoder", latents)
    return copy


def test_an_int8_decoder_paints_nearly_the_same(folder, with_int8):
    tokens = np.random.default_rng(9).integers(0, 64, (1, 6, 5))
    painted = {
        dtype: open_backbone(with_int8, options=BackboneOptions(dtype=dtype)).reconstruct(
            tokens, "fine", [""], 1, 1.0, 0
        )
        for dtype in ("fp32", "int8")
    }
    plain = open_backbone(folder).reconstruct(tokens, "fine", [""], 1, 1.0, 0)
    assert np.array_equal(painted["fp32"], plain)
    error = np.square(painted["int8"] - plain).mean()
    assert 0 < error < np.square(plain - plain.mean()).mean() / 300


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_on_torch_paints_nearly_the_same(folder, dtype):
    tokens = np.random.default_rng(9).integers(0, 64, (2, 6, 5))
    full, half = (
        open_backbone(folder, options=BackboneOptions(runtime="torch", dtype=one))
        for one in (None, dtype)
    )
    plain, painted = (
        model.reconstruct(tokens, "fine", ["", "a red door"], 2, 1.5, 0) for model in (full, half)
    )
    assert painted.dtype == np.float32
    error = np.square(painted - plain).mean()
    assert 0 < error < np.square(plain - plain.mean()).mean() / 300
    assert half.runtime.endswith(f"painting in {dtype}")
    pictures = half.pictures(tokens, "fine", ["", "a red door"], 2, 1.5, 0)
    assert np.array_equal(pictures, from_unit_range(painted))
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    assert np.array_equal(half.encode_tokens(image, "fine"), full.encode_tokens(image, "fine"))


def test_the_number_format_is_chosen_by_the_processor_and_reported(folder, with_int8, monkeypatch):
    for sets, expected in ((("scalar", "avx2"), "fp32"), (("scalar", "avx2", "avx512"), "int8")):
        monkeypatch.setattr("percov2.models.tiny.backbone.instruction_sets", lambda sets=sets: sets)
        assert f", {expected} decoder, " in open_backbone(with_int8).runtime
        assert ", fp32 decoder, " in open_backbone(folder).runtime  # it has no int8 graph
    with pytest.raises(ValueError, match=r"contains no decoder\.int8\.onnx"):
        open_backbone(folder, options=BackboneOptions(dtype="int8")).reconstruct(
            np.zeros((1, 2, 2), int), "fine", [""], 1, 1.0, 0
        )
    for wrong in ({"dtype": "bf16", "runtime": "onnx"}, {"dtype": "int8", "runtime": "torch"}):
        with pytest.raises(ValueError, match=r"dtype '(bf16|int8)' is not one of tiny"):
            open_backbone(folder, options=BackboneOptions(**wrong))


def test_an_int8_decoder_needs_int8_weights_and_latents(folder, random_model, tmp_path):
    shapes = ((1, 16, 4, 4), (1, 16, 4, 6))
    for latents in ([], [np.zeros(shape, np.float32) for shape in shapes]):
        with pytest.raises(ValueError, match="latents of one shape, of at least one photo"):
            write_int8_decoder(folder / "autoencoder", latents)
    copy = shutil.copytree(random_model, tmp_path / "copy")
    write_graphs(copy)
    with pytest.raises(ValueError, match="has no int8 weights"):
        write_int8_decoder(copy / "autoencoder", [np.zeros((1, 16, 4, 4), np.float32)])


def test_new_graphs_remove_an_int8_decoder_of_other_weights(with_int8, tmp_path):
    copy = shutil.copytree(with_int8, tmp_path / "copy")
    write_graphs(copy)
    assert not (copy / "autoencoder" / "decoder.int8.onnx").exists()


def test_a_linked_folder_opens(folder, tmp_path):
    """Hub caches are folders of links, which ONNX Runtime would not follow."""
    for path in folder.rglob("*"):
        place = tmp_path / "linked" / path.relative_to(folder)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    file = Codec.from_pretrained(folder).compress(noise(64, 48))
    assert Codec.from_pretrained(tmp_path / "linked").compress(noise(64, 48)) == file
    assert Codec.from_pretrained(tmp_path / "linked").decompress(file).size == (64, 48)


def test_every_graph_takes_its_weights_from_the_safetensors(folder):
    onnx = pytest.importorskip("onnx")
    for path in folder.rglob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        assert len(graph.initializer) > 10
        assert not any(weight.raw_data for weight in graph.initializer)
        stored = json.loads(
            (path.with_name("model.safetensors").read_bytes()[8:]).split(b"}}")[0] + b"}}"
        )
        names = {weight.name for weight in graph.initializer} - {"pos_embed.pos_embed"}
        assert names <= stored.keys()
