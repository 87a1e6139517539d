"""The diffusers pipeline: the same files and pictures as the codec's, saved and loaded again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from percov2 import BackboneOptions, BitstreamError, Codec, PerCoV2Pipeline
from percov2.models.torch.quantizer import VectorQuantizer
from percov2.models.torch.storage import save_component
from percov2.pipeline import TinyParts, TrainedParts
from tools import random_sd3
from tools.command_line import run
from tools.photos import noise
from tools.reports import write_report

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


def test_parts_of_another_backbone_are_refused(sd3_folder, random_model):
    with pytest.raises(ValueError, match="has the backbone 'tiny', not 'sd3'"):
        TrainedParts(random_model)
    with pytest.raises(ValueError, match="has the backbone 'sd3', not 'tiny'"):
        TinyParts(sd3_folder)


def test_missing_and_needless_networks_are_named(pipe, random_model):
    with pytest.raises(ValueError, match="the pipeline lacks transformer, scheduler, text_encoder"):
        PerCoV2Pipeline(pipe.percov2, pipe.vae)
    with pytest.raises(ValueError, match=r"leave out \['vae'\]"):
        PerCoV2Pipeline(TinyParts(random_model), pipe.vae)


def test_rates_may_have_their_own_flows_in_folders_but_not_in_pipelines(sd3_copy):
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


# Loading by diffusers alone ----------------------------------------------------------------------


@pytest.fixture
def module_cache(tmp_path, monkeypatch) -> None:
    """Keep the code that diffusers copies out of the user's folder."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.mark.parametrize("custom_pipeline", ["pipeline", "FOLDER", "FOLDER/pipeline.py"])
def test_diffusers_loads_a_saved_pipeline(pipe, saved, module_cache, custom_pipeline):
    custom_pipeline = custom_pipeline.replace("FOLDER", str(saved))
    loaded = DiffusionPipeline.from_pretrained(
        saved, custom_pipeline=custom_pipeline, trust_remote_code=True
    )
    assert type(loaded) is PerCoV2Pipeline and type(loaded.percov2) is TrainedParts
    data = pipe.compress(photo(), CAPTION)
    assert loaded.compress(photo(), CAPTION) == data
    assert loaded.decompress(data) == pipe.decompress(data)


def test_diffusers_runs_code_of_a_folder_only_if_trusted(saved, module_cache):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved, custom_pipeline="pipeline")


def test_the_own_class_runs_no_code_of_a_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    for file in ("pipeline.py", "percov2/percov2.pipeline.py"):
        assert (tmp_path / "copy" / file).is_file()
        (tmp_path / "copy" / file).write_text("raise SystemExit('this code must not run')")
    assert PerCoV2Pipeline.from_pretrained(tmp_path / "copy").transformer is not None


def test_a_repository_is_downloaded_without_pickles(saved, monkeypatch):
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pipe = PerCoV2Pipeline.from_pretrained("owner/name", revision="v1", torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert "*.bin" in asked.pop("ignore_patterns")
    assert asked == {"repo_id": "owner/name", "revision": "v1"}


# Sampling ----------------------------------------------------------------------------------------


def test_a_generator_with_a_seed_gives_the_noise_of_the_seed(pipe):
    data = pipe.compress(photo(), CAPTION)
    seeded = pipe.decompress(data, seed=9)
    assert pipe.decompress(data, generator=torch.Generator().manual_seed(9)) == seeded
    assert pipe.decompress(data, generator=[torch.Generator().manual_seed(9)]) == seeded
    assert pipe.decompress(data, seed=8) != seeded


def test_a_generator_goes_on_from_file_to_file(pipe):
    data = pipe.compress(photo())
    generator = torch.Generator().manual_seed(9)
    first, second = pipe.decompress([data, data], generator=generator)
    assert first == pipe.decompress(data, seed=9) and second != first
    pair = [torch.Generator().manual_seed(seed) for seed in (9, 10)]
    assert pipe.decompress([data, data], generator=pair)[1] == pipe.decompress(data, seed=10)
    with pytest.raises(ValueError, match="2 generators for 1 files"):
        pipe(data, generator=pair)
    with pytest.raises(ValueError, match="seed or generator, not both"):
        pipe(data, seed=1, generator=generator)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe):
    data = pipe.compress(photo())
    plain, seen = pipe.decompress(data, num_inference_steps=3), []

    def watch(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(time), tuple(given["latents"].shape), pipeline.num_timesteps))
        return given

    def blank(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(given["latents"])}

    shown = pipe.decompress(data, num_inference_steps=3, callback_on_step_end=watch)
    assert shown == plain
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000 and seen[0][1] > seen[1][1] > seen[2][1]
    assert {shape for _, _, shape, _ in seen} == {(1, 16, 8, 10)}
    assert {count for *_, count in seen} == {3}
    blanked = pipe.decompress(data, num_inference_steps=3, callback_on_step_end=blank)
    latents = torch.zeros(1, 16, 8, 10)
    expected = pipe.codec.model.decode_latents(latents).clamp(-1, 1)[0, :, :50, :70]
    pixels = expected.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert blanked == Image.fromarray(pixels)
    with pytest.raises(ValueError, match="not \\['prompt_embeds'\\]"):
        pipe(data, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_may_stop_sampling(pipe):
    data, steps = pipe.compress(photo()), []

    def stop(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipeline._interrupt = step == 1
        return given

    stopped = pipe.decompress(data, num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1] and pipe.interrupt
    assert stopped != pipe.decompress(data, num_inference_steps=5) and not pipe.interrupt


def test_the_progress_bar_counts_the_steps_of_all_files(pipe, capsys):
    files = pipe.compress([photo(0), photo(1)])
    pipe(files, num_inference_steps=3)
    assert "6/6" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(files, num_inference_steps=3)
    pipe.set_progress_bar_config()
    assert capsys.readouterr().err == ""


# Small models ------------------------------------------------------------------------------------


def test_a_small_model_survives_a_folder(random_model, module_cache, tmp_path):
    codec = Codec.from_pretrained(random_model, options=BackboneOptions(runtime="torch"))
    pipe = PerCoV2Pipeline.from_percov2(random_model)
    pipe.save_pretrained(tmp_path / "saved")
    data = codec.compress(photo(), caption=CAPTION, rate="coarse")
    picture = codec.decompress(data, seed=4)
    trusted = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    for again in (
        pipe,
        PerCoV2Pipeline.from_pretrained(tmp_path / "saved"),
        DiffusionPipeline.from_pretrained(tmp_path / "saved", **trusted),
    ):
        assert type(again.percov2) is TinyParts
        assert again.compress(photo(), CAPTION, rate="coarse") == data
        assert again.decompress(data, seed=4) == picture
    for folder in (tmp_path / "saved", tmp_path / "saved" / "percov2"):
        opened = Codec.from_pretrained(folder, options=BackboneOptions(runtime="torch"))
        assert opened.decompress(data, seed=4) == picture
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["percov2"] == ["percov2.pipeline", "TinyParts"]
    assert index["transformer"] == [None, None]


def test_the_embedded_model_survives_a_folder(tmp_path):
    PerCoV2Pipeline.from_percov2("tiny").save_pretrained(tmp_path / "saved")
    pipe = PerCoV2Pipeline.from_pretrained(tmp_path / "saved")
    codec = Codec.from_pretrained("tiny", options=BackboneOptions(runtime="torch"))
    data = codec.compress(photo(), caption=CAPTION)
    assert pipe.compress(photo(), CAPTION) == data
    assert pipe.decompress(data) == codec.decompress(data)
    copied = Codec.from_pretrained(tmp_path / "saved" / "percov2")
    assert copied.model.runtime.startswith("onnxruntime")
    assert copied.compress(photo(), caption=CAPTION) == data


def test_a_small_model_paints_in_other_number_formats(random_model, tmp_path):
    half = PerCoV2Pipeline.from_percov2(random_model, dtype="bf16")
    codec = Codec.from_pretrained(
        random_model, options=BackboneOptions(runtime="torch", dtype="bf16")
    )
    data = half.compress(photo())
    expected = codec.decompress(data)
    assert half.decompress(data) == expected
    full = PerCoV2Pipeline.from_percov2(random_model)
    assert full.decompress(data) != expected
    assert full.to(torch.bfloat16).decompress(data) == expected
    full.save_pretrained(tmp_path / "saved")
    loaded = PerCoV2Pipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert loaded.decompress(data) == expected
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        full.to(torch.float64).decompress(data)
    with pytest.raises(ValueError, match="no t5"):
        PerCoV2Pipeline.from_percov2(random_model, t5=False)


def test_generators_and_callbacks_of_a_small_model(random_model):
    pipe = PerCoV2Pipeline.from_percov2(random_model)
    data = pipe.compress(photo())
    first, second = pipe.decompress([data, data], generator=torch.Generator().manual_seed(9))
    assert first != second
    again = pipe.decompress([data, data], generator=torch.Generator().manual_seed(9))
    assert again == [first, second]
    with pytest.raises(ValueError, match="calls no function"):
        pipe(data, callback_on_step_end=lambda *given: given[-1])


# Model cards -------------------------------------------------------------------------------------


def reports_of(folder: Path, model: str) -> list[Path]:
    """Made-up reports of two rates of a model."""
    paths = [write_report(folder / rate, rate, size, 0.5) for rate, size in (("a", 40), ("b", 90))]
    for path in paths:
        path.write_text(json.dumps({**json.loads(path.read_text()), "model": model}))
    return paths


def test_a_saved_pipeline_has_a_card_that_the_hub_reads(saved):
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
    assert card.data.tags == ["image-compression", "percov2", "stable-diffusion-3"]
    assert card.data.license == "other" and card.data.eval_results is None
    assert "| `r0938` | 8×8 | 64 |" in card.text


def test_reports_become_the_model_index_of_the_card(pipe, tmp_path):
    reports = reports_of(tmp_path / "runs", "random-sd3")
    metadata = {"license": "cc-by-4.0", "base_model": "owner/base"}
    pipe.save_pretrained(tmp_path / "saved", reports=reports, card=metadata)
    card = huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model == "owner/base"
    index = card.data.to_dict()["model-index"]
    assert huggingface_hub.ModelCard(str(card)).data.to_dict()["model-index"] == index
    (entry,) = index
    assert entry["name"] == "random-sd3"
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "photos (2 pictures)", "type": "photos"}
    measured = {metric["name"]: metric for metric in result["metrics"]}
    means = {path: json.loads(path.read_text())["mean"] for path in reports}
    assert measured["PSNR, dB at a"]["value"] == means[reports[0]]["psnr"]
    assert measured["bits per pixel at b"]["value"] == means[reports[1]]["bpp"]
    assert measured["LPIPS (AlexNet) at a"]["type"] == "lpips"
    assert measured["DISTS at b"]["args"] == {"rate": "b", "schedule": "qlds12", "steps": 1}
    assert "LPIPS (VGG) at a" not in measured  # no report has it
    assert f"| photos (2 pictures) | a | {means[reports[0]]['bpp']:.4f} | 25.0000 |" in card.text


def test_saving_again_keeps_the_text_of_a_card(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "README.md"
    path.write_text(path.read_text().replace("## Limits", "My own words.\n\n## Limits"))
    reports = reports_of(tmp_path / "runs", "random-sd3")
    both = {
        "model": "random-sd3",
        "rates": {r.parent.name: json.loads(r.read_text()) for r in reports},
    }
    (tmp_path / "report.json").write_text(json.dumps(both))
    pipe.save_pretrained(tmp_path / "saved", reports=[tmp_path / "report.json"])
    card = huggingface_hub.ModelCard.load(path)
    assert "My own words." in card.text and "| b |" in card.text
    assert len(card.data.eval_results) == 10
    pipe.save_pretrained(tmp_path / "saved", card={"license": "mit"})
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.license == "mit" and len(card.data.eval_results) == 10


def test_other_reports_are_refused(pipe, tmp_path):
    (other,) = reports_of(tmp_path / "runs", "another")[:1]
    with pytest.raises(ValueError, match="is about another, not random-sd3"):
        pipe.save_pretrained(tmp_path / "saved", reports=[other])
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match="is no report of percov2 eval"):
        pipe.save_pretrained(tmp_path / "saved", reports=[tmp_path / "none.json"])


def test_a_push_uploads_the_folder_and_keeps_the_card_of_the_repository(
    random_model, tmp_path, monkeypatch
):
    pipe = PerCoV2Pipeline.from_percov2(random_model)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    uploaded: dict[str, str] = {}

    def upload(folder: str, repo_id: str, **_: Any) -> str:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        uploaded.update({path.relative_to(folder).as_posix(): repo_id for path in files})
        uploaded["card"] = (Path(folder) / "README.md").read_text()
        return "address"

    made = huggingface_hub.RepoUrl("https://huggingface.co/owner/name")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_, **__: True)
    here = str(tmp_path / "README.md")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: here)
    monkeypatch.setattr(pipe, "_upload_folder", upload)
    assert pipe.push_to_hub("owner/name", card={"library_name": "diffusers"}) == "address"
    expected = {"README.md", "model_index.json", "pipeline.py", "percov2/percov2.pipeline.py"}
    expected |= {"percov2/config.json", "percov2/flow/model.safetensors"}
    assert expected <= uploaded.keys()
    assert "My own words." in uploaded["card"] and "library_name: diffusers" in uploaded["card"]
    uploaded.clear()
    pipe.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="owner/name")
    assert uploaded["model_index.json"] == "owner/name"


# The guide ---------------------------------------------------------------------------------------


def test_the_examples_of_the_guide_run(module_cache, tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "diffusers.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert "(256, 256)" in capsys.readouterr().out
    assert type(names["pipe"]) is PerCoV2Pipeline and names["first"] != names["second"]
