"""CLIP scores against transformers' own logits and torchmetrics; captions that are too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from percov2.evaluation.clip_score import Clip
from tools import tiny_judges

CAPTIONS = ["a red door", "a cat", "grass", "two boats", "sky"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_judges.clip(tmp_path_factory.mktemp("clip"))


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(40, 56), (32, 32), (64, 48), (90, 33), (40, 56)]
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def cosines_in_plain_words(folder: Path, captions: list[str]) -> np.ndarray:
    """Cosines of all pictures and captions: CLIPModel's logits without its temperature."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    rows = []
    for picture in pictures():
        row = []
        for caption in captions:
            image = Image.fromarray(picture)
            inputs = processor(text=[caption], images=[image], return_tensors="pt")
            with torch.no_grad():
                logits = model.eval()(**inputs).logits_per_image / model.logit_scale.exp()
            row.append(float(logits))
        rows.append(row)
    return np.array(rows)


def test_scores_are_clipped_cosines(folder):
    plain = cosines_in_plain_words(folder, CAPTIONS)
    assert (plain < -1e-3).any() and (plain > 1e-3).any()
    judge, given = Clip(str(folder), batch_size=2), pictures()
    for shift in range(len(CAPTIONS)):
        found = judge.scores(given, np.roll(CAPTIONS, -shift).tolist())
        expected = [plain[i, (i + shift) % 5] for i in range(5)]
        np.testing.assert_allclose(found.values, 100 * np.maximum(expected, 0), atol=2e-5)
        assert not found.truncated.any()
        assert found.mean == found.values.mean()


def test_scores_are_those_of_torchmetrics(folder):
    module = pytest.importorskip("torchmetrics.functional.multimodal")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)

    class Older:
        """The model with the tensors that transformers 4 returned."""

        def __init__(self) -> None:
            self.config = model.config

        def to(self, device: torch.device) -> Older:
            return self

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            found = model.get_image_features(pixels)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found = model.get_text_features(ids, mask)
            return getattr(found, "pooler_output", found)

    found = Clip(str(folder)).scores(pictures(), CAPTIONS)
    assert (found.values > 0).any()
    for picture, caption, value in zip(pictures(), CAPTIONS, found.values, strict=True):
        image = torch.from_numpy(picture).permute(2, 0, 1)
        with torch.no_grad():
            theirs = module.clip_score(image, caption, lambda: (Older(), processor))
        assert value == pytest.approx(float(theirs), rel=1e-5, abs=1e-4)


def test_likeness_is_the_cosine_of_two_pictures(folder):
    judge, given = Clip(str(folder), batch_size=3), pictures()
    assert judge.likeness(given, given) == pytest.approx(1, abs=1e-6)
    found = judge.likeness(given, given[::-1])
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["x"], images=[Image.fromarray(x) for x in given], return_tensors="pt")
    with torch.no_grad():
        unit = model.eval()(**inputs).image_embeds
    expected = torch.nn.functional.cosine_similarity(unit, unit.flip(0)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[:2].max() < 0.9999  # different pictures


def test_long_captions_are_cut_before_the_end_token_and_counted(folder):
    judge = Clip(str(folder))
    letters = tiny_judges.MAX_TOKENS - 2
    fits, too_long = "x" * letters, "x" * letters + "yz"
    embeddings, truncated = judge.captions([fits, too_long, "a", "x" * (letters + 1)])
    assert truncated.tolist() == [False, True, False, True]
    # Without its last letters, the caption ends in a letter inside a word.
    model = CLIPModel.from_pretrained(folder).eval()
    ids = torch.tensor([[0, *[2 + 23] * letters, 1]])
    with torch.no_grad():
        plain = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0].numpy()
    np.testing.assert_allclose(embeddings[1], plain / np.linalg.norm(plain), atol=1e-6)
    assert not np.allclose(embeddings[0], embeddings[1], atol=1e-4)
    assert judge.scores(pictures()[:2], [too_long, "a"]).truncated.tolist() == [True, False]


def test_inputs_that_do_not_pair_and_missing_models_are_refused(folder, tmp_path):
    judge = Clip(str(folder))
    with pytest.raises(ValueError, match="5 and 4 inputs"):
        judge.scores(pictures(), CAPTIONS[:4])
    with pytest.raises(ValueError, match="0 and 0 inputs"):
        judge.likeness([], [])
    with pytest.raises(ValueError, match="cannot load the CLIP model"):
        Clip(str(tmp_path))


def test_the_description_names_definition_and_versions(folder):
    text = Clip(str(folder)).describe()
    for part in (
        "torchmetrics",
        "100·max(cos, 0)",
        f"{folder.name}, weights ",
        transformers.__version__,
    ):
        assert part in text
