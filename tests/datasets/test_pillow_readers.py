"""Programs that open pictures with Pillow read and write ``.pcv2`` files."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

import percov2.pillow
from percov2 import Codec
from tools.photos import noise


@pytest.fixture(autouse=True)
def codecs(monkeypatch):
    """Codecs of the plugin that no other test sees."""
    fresh = percov2.pillow._Codecs()
    monkeypatch.setattr(percov2.pillow, "_CODECS", fresh)
    return fresh


def test_a_registered_model_reads_its_files_and_saves_on_request(random_model, monkeypatch):
    codec, picture = Codec.from_pretrained(random_model), noise(70, 50)
    data = codec.compress(picture, rate="coarse")
    with pytest.raises(OSError, match="which is not among tiny"):
        Image.open(io.BytesIO(data)).load()
    monkeypatch.chdir(random_model.parent)
    percov2.pillow.register(random_model.name)
    monkeypatch.chdir("/")  # the name still means the same folder
    image = Image.open(io.BytesIO(data))
    assert image.info["rate"] is None
    assert image.tobytes() == codec.decompress(data).tobytes()
    assert (image.info["model"], image.info["rate"]) == ("random", "coarse")
    picture.save(out := io.BytesIO(), "PCV2", model=random_model, rate="coarse")
    assert out.getvalue() == data


def test_models_whose_extra_is_missing_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'percov2\[torch\]'"):
        percov2.pillow.register("tiny", device="cuda")


def test_imageio_reads_and_writes(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    array, path = np.asarray(noise(70, 50)), tmp_path / "a.pcv2"
    imageio.imwrite(path, array, plugin="pillow", rate="r010")
    codec = Codec.from_pretrained("tiny")
    assert path.read_bytes() == codec.compress(array, rate="r010")
    expected = np.asarray(codec.decompress(path))
    np.testing.assert_array_equal(imageio.imread(path, plugin="pillow"), expected)
    np.testing.assert_array_equal(imageio.imread(path), expected)
    assert imageio.improps(path, plugin="pillow").shape == (50, 70, 3)


class Pictures:
    """A data set for torch's loaders."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return np.asarray(image)


def test_forked_loaders_restore_pictures(tmp_path):
    torch = pytest.importorskip("torch")
    paths = [tmp_path / f"{i}.pcv2" for i in range(4)]
    for i, path in enumerate(paths):
        noise(40, 30 + i).save(path, rate="r002")
    expected = [np.asarray(Image.open(path)) for path in paths]  # the networks are in use here
    loader = torch.utils.data.DataLoader(
        Pictures(paths), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100
    )
    for _ in range(2):  # the first epoch's workers must end
        for array, other in zip(loader, expected, strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_codec_that_forked_loaders_inherit_ends_with_them(tmp_path):
    torch = pytest.importorskip("torch")
    codec = Codec.from_pretrained("tiny")
    files = [codec.compress(noise(40, 30 + i), rate="r002") for i in range(3)]
    expected = [np.asarray(codec.decompress(data)) for data in files]

    def restore(data: bytes) -> np.ndarray:
        nonlocal codec
        picture = np.asarray(codec.decompress(data))
        codec = Codec.from_pretrained("tiny")  # the inherited one is deleted
        return picture

    loader = torch.utils.data.DataLoader(
        files,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
        timeout=100,
        collate_fn=restore,
    )
    for array, other in zip(loader, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_hugging_face_datasets_decode_and_encode(tmp_path):
    # The name alone would be that of this folder.
    pytest.importorskip("datasets.features", reason="Hugging Face's datasets is in no extra")
    import datasets

    path, picture = tmp_path / "a.pcv2", noise(40, 30)
    picture.save(path, rate="r002")
    expected = np.asarray(Image.open(path))
    data = io.BytesIO(path.read_bytes())
    rows = [str(path), {"bytes": data.getvalue(), "path": None}, Image.open(data)]
    for row in rows:
        photos = datasets.Dataset.from_dict(
            {"image": [row]}, features=datasets.Features({"image": datasets.Image()})
        )
        decoded = photos[0]["image"]
        assert decoded.format == "PCV2" and decoded.info["rate"] in ("r002", "r031")
        if row is not rows[2]:  # a picture in memory is saved again in its format
            np.testing.assert_array_equal(np.asarray(decoded), expected)
