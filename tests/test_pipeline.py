"""The diffusers pipeline: the same files and pictures as the codec's, saved and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from percov2 import BitstreamError, Codec, PerCoV2Pipeline
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import save_component
from percov2.pipeline import TrainedParts
from tools import random_sd3
from tools.command_line import run
from tools.photos import noise

CAPTION = "a red door"


def photo(seed: int = 0) -> Image.Image:
    return noise(70, 50, seed)


@pytest.fixture(scope="module")
def pipe(sd3_folder) -> PerCoV2Pipeline:
    return PerCoV2Pipeline.from_percov2(f"sd3:{sd3_folder}")


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def test_it_gives_the_codecs_files_and_pictures(pipe, sd3_folder):
    codec = Codec.from_pretrained(sd3_folder)
    data = pipe.compress(photo(), CAPTION, rate="r0938")
    assert [data] == codec.compress([photo()], rate="r0938", caption=[CAPTION])
    (expected,) = codec.decompress([data], steps=3, guidance=2.5, seed=9)
    output = pipe(data, num_inference_steps=3, guidance_scale=2.5, seed=9)
    assert output.images[0] == expected and expected.size == (70, 50)
    again = pipe.decompress(data, num_inference_steps=3, guidance_scale=2.5, seed=9)
    assert again == expected
    assert pipe(data, 3, 2.5, 9, return_dict=False)[0][0] == expected


def test_several_pictures_and_prompts(pipe):
    files = pipe.compress([photo(0), photo(1)], [CAPTION, ""])
    assert files == [pipe.compress(photo(0), CAPTION), pipe.compress(photo(1))]
    assert [image.size for image in pipe.decompress(files)] == [(70, 50)] * 2
    with pytest.raises(ValueError, match="caption has 1 texts for 2 pictures"):
        pipe.compress([photo(0), photo(1)], ["one"])
    with pytest.raises(BitstreamError):
        pipe(files[0][:-3])


def test_it_survives_a_folder(pipe, saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "PerCoV2Pipeline"
    assert index["percov2"] == ["percov2.pipeline", "TrainedParts"]
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    again = PerCoV2Pipeline.from_pretrained(saved)
    data = pipe.compress(photo(), CAPTION)
    assert again.compress(photo(), CAPTION) == data
    assert again.decompress(data) == pipe.decompress(data)
    for name, weights in pipe.transformer.state_dict().items():
        assert torch.equal(weights, again.transformer.state_dict()[name])


def test_a_saved_pipeline_is_self_contained_and_moves(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    again = PerCoV2Pipeline.from_pretrained(tmp_path / "elsewhere")
    again.save_pretrained(tmp_path / "further")
    shutil.rmtree(tmp_path / "elsewhere")
    last = PerCoV2Pipeline.from_pretrained(tmp_path / "further")
    assert last.decompress(last.compress(photo())).size == (70, 50)


def test_the_codec_and_the_command_line_open_saved_pipelines(pipe, saved, picture, tmp_path):
    codec = Codec.from_pretrained(f"sd3:{saved}")
    (data,) = codec.compress([photo()], caption=[CAPTION])
    assert data == pipe.compress(photo(), CAPTION)
    assert codec.decompress([data])[0] == pipe.decompress(data)
    file, out = tmp_path / "p.pcv2", tmp_path / "p.png"
    assert run("compress", picture, file, "--model", f"sd3:{saved}") == 0
    assert run("decompress", file, out, "--model", saved, "--offload") == 0
    assert run("info", file, "--verify", "--model", saved) == 0


def test_without_t5_and_in_half_precision(sd3_folder, saved, tmp_path):
    small = PerCoV2Pipeline.from_percov2(sd3_folder, dtype="bf16", t5=False)
    assert small.text_encoder_3 is None and small.vae.dtype == torch.bfloat16
    small.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "text_encoder_3").exists()
    again = PerCoV2Pipeline.from_pretrained(tmp_path / "small", torch_dtype=torch.bfloat16)
    assert again.transformer.dtype == torch.bfloat16
    data = again.compress(photo(), CAPTION)
    assert again.decompress(data) == small.decompress(data)
    full = PerCoV2Pipeline.from_pretrained(saved)
    before = full.decompress(data)
    full.to(torch.bfloat16)
    assert full.decompress(data) != before
    dropped = PerCoV2Pipeline.from_pretrained(saved, text_encoder_3=None, tokenizer_3=None)
    assert dropped.decompress(data).size == (70, 50)


def test_rates_may_have_their_own_flows_in_folders_but_not_in_pipelines(sd3_copy, random_model):
    for opened in (PerCoV2Pipeline.from_percov2, TrainedParts):
        with pytest.raises(ValueError, match="has the backbone 'tiny', not 'sd3'"):
            opened(random_model)
    shutil.move(sd3_copy / "flow", sd3_copy / "r0938" / "flow")
    with pytest.raises(ValueError, match="have their own flows"):
        PerCoV2Pipeline.from_percov2(sd3_copy)
    codec = Codec.from_pretrained(sd3_copy)
    assert codec.decompress(codec.compress([photo()], rate="r0938"))[0].size == (70, 50)
    with pytest.raises(ValueError, match="contains no flow"):
        codec.decompress(codec.compress([photo()], rate="r0313"))


def test_flow_and_tokens_of_different_trainings_are_refused(sd3_copy):
    save_component(VectorQuantizer(16, 256, 8, 12), sd3_copy / "r0313" / "quantizer", "float32")
    codec = Codec.from_pretrained(sd3_copy)
    with pytest.raises(ValueError, match="not of one training"):
        codec.decompress(codec.compress([photo()], rate="r0313"))


def test_pickled_weights_are_not_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    vae = tmp_path / "copy" / "vae"
    random_sd3.autoencoder().save_pretrained(vae, safe_serialization=False)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):
        PerCoV2Pipeline.from_pretrained(tmp_path / "copy")
