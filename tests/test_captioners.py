"""Captioners that look at the picture, with the real classes at tiny sizes and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BatchFeature,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
)

from percov2.captioners import Blip2Captioner, Molmo2Captioner, open_captioner, tidy
from percov2.container.captions import NoCaptioner, TextCaptioner
from tools import random_blip2
from tools.command_line import failure, output, run


@pytest.fixture(scope="module")
def blip2(tmp_path_factory) -> Path:
    return random_blip2.build(tmp_path_factory.mktemp("blip2"))


def photos(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (40, 30, 3)) // (i + 1) for i in range(count)]
    return [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def test_blip2_gives_its_greedy_captions(blip2):
    """Stated again word by word: the likeliest next token of the whole prefix, 32 times."""
    model = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    processor = Blip2Processor.from_pretrained(blip2)
    (photo,) = photos(1)
    pixels = processor.image_processor([photo], return_tensors="pt").pixel_values
    ids = [4] * 4 + [0]
    with torch.inference_mode():
        while len(ids) < 5 + 32 and ids[-1] != 2:
            tokens = torch.tensor([ids])
            logits = model(pixels, tokens, attention_mask=torch.ones_like(tokens)).logits
            ids.append(int(logits[0, -1].argmax()))
    expected = " ".join(random_blip2.VOCABULARY[i] for i in ids[5:] if i > 4)
    assert Blip2Captioner(str(blip2))([photo]) == [expected] and expected


def test_batches_change_no_caption_and_load_once(blip2, monkeypatch):
    loads = []
    load = Blip2ForConditionalGeneration.from_pretrained
    monkeypatch.setattr(
        Blip2ForConditionalGeneration,
        "from_pretrained",
        lambda *a, **k: loads.append(a) or load(*a, **k),
    )
    captioner = Blip2Captioner(str(blip2), batch=2)
    assert not loads
    captions = captioner(photos(5))
    assert captions == [caption for photo in photos(5) for caption in captioner([photo])]
    assert len(set(captions)) > 1 and len(loads) == 1
    assert all(len(caption.split()) <= 32 for caption in captions)
    assert captioner([]) == []
    grey = photos(1)[0].convert("L")
    assert all(captioner([grey, grey.convert("I;16")]))
    assert tidy("  a\nred \t door\x07 \x1b ") == "a red door"


class Molmo2ProcessorStandIn:
    """Molmo2's own needs torchvision. This one asks about a token that stands for the picture."""

    def __init__(self) -> None:
        self.tokenizer = random_blip2.tokenizer()
        self.calls: list[list[Any]] = []

    def apply_chat_template(self, conversations: list[Any], **options: Any) -> BatchFeature:
        assert options["add_generation_prompt"] and options["tokenize"] and options["return_dict"]
        self.calls.append(conversations)
        rows = []
        for ((turn,),) in zip(conversations, strict=True):
            image, question = turn["content"]
            assert turn["role"] == "user" and question["type"] == "text"
            mean = int(np.asarray(image["image"]).mean()) % 40
            rows.append([0, 5 + mean, len(question["text"]) % 50])
        ids = torch.tensor(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def tiny_molmo2() -> Molmo2ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text = {"vocab_size": 50, "additional_vocab_size": 8, "num_hidden_layers": 1}
    text |= {"max_position_embeddings": 128, "initializer_range": 0.8}
    vision = {"num_hidden_layers": 2, "image_size": [28, 28]}
    adapter = {"vision_feature_layer": [1, 0], "text_hidden_size": 16}
    places = ["image_start_token", "low_res_image_start_token", "image_end_token"]
    places += ["image_patch", "frame_start_token", "frame_end_token"]
    config = Molmo2Config(
        text_config=sizes | text,
        vision_config=sizes | vision,
        adapter_config=sizes | adapter,
        **{f"{place}_id": 50 + i for i, place in enumerate(places)},
    )
    return Molmo2ForConditionalGeneration(config).eval()


def test_molmo2_answers_for_every_picture(tmp_path, monkeypatch):
    tiny_molmo2().save_pretrained(tmp_path)
    processor = Molmo2ProcessorStandIn()

    def load(location: Path, trust_remote_code: bool) -> Molmo2ProcessorStandIn:
        assert trust_remote_code is False  # code from the hub never runs, and nobody is asked
        return processor

    monkeypatch.setattr("transformers.AutoProcessor", SimpleNamespace(from_pretrained=load))
    captioner = Molmo2Captioner(str(tmp_path), batch=2)
    captions = captioner(photos(3))
    assert len(processor.calls) == 2 and len(captions) == 3
    assert all(1 <= len(caption.split()) <= 32 for caption in captions)
    assert captions == [caption for photo in photos(3) for caption in captioner([photo])]
    assert len(set(captions)) > 1
    # The answer alone, not the question before it.
    model = Molmo2ForConditionalGeneration.from_pretrained(tmp_path)
    options = dict.fromkeys(("tokenize", "add_generation_prompt", "return_dict"), True)
    inputs = processor.apply_chat_template([captioner._conversation(photos(1)[0])], **options)
    first = int(model(**inputs).logits[0, -1].argmax())
    assert captions[0].split()[0] == random_blip2.VOCABULARY[first]


def test_captioners_have_names_and_missing_networks_are_named(tmp_path):
    assert isinstance(open_captioner("none"), NoCaptioner)
    text = open_captioner("text", "a red door")
    assert isinstance(text, TextCaptioner) and text(photos(2)) == ["a red door"] * 2
    blip = open_captioner("blip2")
    assert isinstance(blip, Blip2Captioner)
    assert blip.location == "Salesforce/blip2-opt-2.7b-coco" and blip.dtype == "float32"
    molmo = open_captioner("molmo2", location="some/other")
    assert isinstance(molmo, Molmo2Captioner) and molmo.location == "some/other"
    for wrong, message in (
        ({"name": "gpt"}, "unknown captioner"),
        ({"name": "text"}, "needs a caption"),
        ({"name": "blip2", "text": "a"}, "does not accept a caption"),
        ({"name": "none", "text": "a"}, "does not accept a caption"),
        ({"name": "none", "location": "a/b"}, "has no network"),
    ):
        with pytest.raises(ValueError, match=message):
            open_captioner(**wrong)
    for kind in (Blip2Captioner, Molmo2Captioner):
        with pytest.raises(ValueError, match="cannot load the captioner"):
            kind(str(tmp_path))(photos(1))


def test_the_command_line_and_round_trips_caption(blip2, picture, random_model, tmp_path, capsys):
    out = tmp_path / "p.pcv2"
    command = ("compress", picture, out, "--model", random_model)
    options = ("--captioner", "blip2", "--captioner-model", blip2)
    trip = ("roundtrip", picture, "--out", tmp_path / "trip", "--model", random_model)
    with Image.open(picture) as image:
        expected = Blip2Captioner(str(blip2))([image])
    for done, file in ((command, out), (trip, tmp_path / "trip" / "photo.pcv2")):
        assert run(*done, *options) == 0
        assert [json.loads(output(capsys, "info", "--json", file))["caption"]] == expected
    said = failure(capsys, *command, "--captioner=blip2", "--caption=a")
    assert "does not accept a caption" in said
    broken = tmp_path / "broken"
    shutil.copytree(blip2, broken)
    (broken / "config.json").write_text("{")
    message = failure(capsys, *command, "--captioner=blip2", "--captioner-model", broken)
    assert "cannot load the captioner" in message
