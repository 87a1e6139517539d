"""The cache of training photos: shards of any spelling, with damage."""

from __future__ import annotations

import gzip
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.colour_spaces import from_gamma, icc_profile
from percov2.images import to_rgb
from percov2.photos import PhotoCrops, PhotoWarning, decode_shards
from tools.photos import noise, write_tar


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def cached(folder: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    pixels = np.fromfile(folder / "photos.bin", np.uint8)
    return {
        key: (pixels[at : at + 3 * h * w].reshape(h, w, 3), captions)
        for key, at, h, w, captions in json.loads((folder / "photos.json").read_text())
    }


def test_photos_are_those_that_compress_would_see(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.array([[0, 65535], [257, 32768]], np.uint16))
    clear = Image.new("RGBA", (4, 3), (9, 9, 9, 0))
    profile = icc_profile(from_gamma(1.0, None))
    members = {
        "a.JPG": encoded(noise(8, 4), "JPEG", exif=turned),
        "b.jpeg": encoded(noise(5, 6), "JPEG"),
        "dir/c.png": encoded(deep),
        "dir/c.txt": "ein Weg\n\n café ".encode("latin-1"),
        "d.Png": encoded(clear),
        "f.png": encoded(Image.new("RGB", (2, 2), (55, 55, 55)), icc_profile=profile),
        "e.json": b"{}",
    }
    shard = write_tar(tmp_path / "s.tar", members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode_shards([shard], tmp_path / "cache")
        found = cached(tmp_path / "cache")
        assert list(found) == ["a", "b", "dir/c", "d", "f"]
        for name, key in (("a.JPG", "a"), ("dir/c.png", "dir/c"), ("d.Png", "d"), ("f.png", "f")):
            expected = to_rgb(Image.open(io.BytesIO(members[name])))
            assert np.array_equal(found[key][0], expected)
    assert found["a"][0].shape == (8, 4, 3) and (found["d"][0] == 255).all()
    assert (found["f"][0] == 128).all() and found["dir/c"][0][0, 1, 0] == 255
    assert found["dir/c"][1] == ["ein Weg", "caf\ufffd"]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_photo_is_named_and_skipped(damage, tmp_path):
    members = {f"p{i:02}.png": encoded(noise(4, 4, i)) for i in range(12)}
    members["p05.png"] = members["p05.png"][:40] if damage == "cut" else b"this is no photo"
    with pytest.warns(PhotoWarning, match=r"s\.tar: skipped p05: "):
        decode_shards([write_tar(tmp_path / "s.tar", members)], tmp_path / "cache")
    assert len(cached(tmp_path / "cache")) == 11


@pytest.mark.filterwarnings("ignore::percov2.photos.PhotoWarning")
def test_shards_without_enough_photos_are_one_error(tmp_path):
    bad = {f"p{i}.png": b"nothing" for i in range(3)}
    good = {f"q{i}.png": encoded(noise(4, 4)) for i in range(5)}
    for name, members, message in (
        ("empty", {}, "contains no readable photo"),
        ("text", {"a.txt": b"words"}, "contains no readable photo"),
        ("bad", bad, "contains no readable photo"),
        ("half", bad | good, "3 of 8 photos are damaged"),
    ):
        shard = write_tar(tmp_path / f"{name}.tar", members)
        with pytest.raises(ValueError, match=message):
            decode_shards([shard], tmp_path / name)
    (tmp_path / "nothing.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing\.tar is not a tar file, .* it is empty"):
        decode_shards([tmp_path / "nothing.tar"], tmp_path / "nothing")
    (tmp_path / "no.tar").write_bytes(b"not a tar file" * 99)
    with pytest.raises(ValueError, match=r"no\.tar is not a tar file"):
        decode_shards([tmp_path / "no.tar"], tmp_path / "no")
    whole = write_tar(tmp_path / "cut.tar", good).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        decode_shards([tmp_path / "cut.tar"], tmp_path / "cut")


@pytest.mark.parametrize("name", ["s.tar.gz", "packed.tar"])
def test_a_compressed_shard_is_read(name, tmp_path):
    plain = write_tar(tmp_path / "s.tar", {"a.png": encoded(noise(4, 4))})
    packed = tmp_path / name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    decode_shards([packed], tmp_path / "cache")
    assert list(cached(tmp_path / "cache")) == ["a"]


def test_no_name_is_a_command(tmp_path, monkeypatch):
    """WebDataset runs what follows "pipe:" in a shell, and expands braces."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch PWNED #.tar", "x{1..3}.tar"):
        shard = write_tar(Path(name), {"a.png": encoded(noise(4, 4))})
        decode_shards([shard], tmp_path / f"cache {name[0]}")
    assert not (tmp_path / "PWNED").exists()


DAMAGED_CACHES = {
    "no pixels": ("[]", None),
    "too few pixels": ('[["a", 0, 8, 8, []]]', b"abc"),
    "another table": ('{"a": 1}', b"abc"),
    "cut": ('[["a", 0, 8', b"abc"),
    "numbers": ("[1, 2]", b"abc"),
    "a fraction": ('[["a", 0.5, 1, 1, []]]', b"abc"),
    "below zero": ('[["a", -3, 1, 1, []]]', b"abc"),
}


@pytest.mark.parametrize("damage", DAMAGED_CACHES)
def test_damaged_caches_are_named(damage, tmp_path):
    table, pixels = DAMAGED_CACHES[damage]
    (tmp_path / "photos.json").write_text(table)
    if pixels is not None:
        (tmp_path / "photos.bin").write_bytes(pixels)
    with pytest.raises(ValueError, match=r"holds no whole cache of photos .*; delete it"):
        PhotoCrops(tmp_path, "all")
