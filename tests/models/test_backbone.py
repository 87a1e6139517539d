"""The lookup of a backbone by the name of a model."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch

from percov2 import BackboneOptions, Codec
from percov2.models.backbone import open_backbone
from percov2.models.config import ModelConfig, Rate


def test_old_folders_are_tiny_ones(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    del values["backbone"], values["base"]
    path.write_text(json.dumps(values))
    old, new = Codec.from_pretrained(tmp_path / "old"), Codec.from_pretrained(random_model)
    assert old.config == new.config and old.config.backbone == "tiny"
    assert old.model_id("fine") == new.model_id("fine")


def test_kind_and_options_must_be_those_of_the_folder(random_model):
    assert type(open_backbone(f"tiny:{random_model}")) is type(open_backbone(random_model))
    with pytest.raises(ValueError, match="holds a 'tiny' model, not a 'sd3' one"):
        open_backbone(f"sd3:{random_model}")
    with pytest.raises(ValueError, match="small model"):
        Codec.from_pretrained(random_model, options=BackboneOptions(offload=True))


@pytest.mark.parametrize(("backbone", "base"), [("sd3", ""), ("tiny", "a/b"), ("sd4", "a/b")])
def test_base_models_belong_to_big_backbones(backbone, base, tmp_path):
    rates = (Rate("r", 16, 256),)
    ModelConfig("m", rates, "r", backbone=backbone, base=base).save(tmp_path)
    with pytest.raises(ValueError, match=r"base is|backbone must be"):
        ModelConfig.load(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of"):
        BackboneOptions(dtype="int4")


def test_hub_ids_are_downloaded_after_a_kind_only(random_model, tmp_path, monkeypatch):
    asked = []

    def download(hub_id: str) -> str:
        asked.append(hub_id)
        if hub_id == "some/other":
            raise OSError("offline")
        return str(random_model if hub_id == "some/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_backbone("tiny:some/model").config.name == "random"
    with pytest.raises(ValueError, match="no such folder, and the hub says: offline"):
        open_backbone("tiny:some/other")
    with pytest.raises(ValueError, match="is no percov2 model"):
        open_backbone("tiny:some/words")
    assert asked == ["some/model", "some/other", "some/words"]
    for name in ("some/model", "tiny:words", f"tiny:{tmp_path}", "sd3:a/b/c"):
        with pytest.raises(ValueError, match="give a model folder or one of"):
            open_backbone(name)
    assert len(asked) == 3


def test_a_model_stays_on_the_card_that_was_current(monkeypatch, random_model):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert open_backbone(random_model, "cuda").device == "cuda:2"
    assert open_backbone(random_model, "cuda:1").device == "cuda:1"
