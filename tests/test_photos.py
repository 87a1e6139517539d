"""The cache of training photos: shards of any spelling, with damage."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.colour_spaces import from_gamma, icc_profile
from percov2.datasets.shards import Checked, samples_of
from percov2.images import to_rgb
from percov2.photos import PhotoCrops, PhotoWarning, decode_shards, is_held_out
from percov2.training.commands import run_data
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


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_shard_is_a_regular_file(kind, tmp_path):
    """A pipe would wait for a writer for ever, and a device has no end."""
    shard = tmp_path / "a.tar"
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "device":
        shard.symlink_to("/dev/zero")
    else:
        shard.mkdir()
    with pytest.raises(ValueError, match=r"a\.tar is no regular file"):
        decode_shards([shard], tmp_path / "cache")


def test_every_spelling_of_a_shard_is_taken_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    pack = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pack["tgz"] = gzip.compress
    names = ["A.TAR", "b.tar", "c.tar.gz", "d.Tgz", "e.tar.bz2", "f.tar.xz"]
    for i, name in enumerate(names):
        plain = write_tar(tmp_path / "plain", {f"p{i}.png": encoded(noise(4, 4, i))})
        (folder / name).write_bytes(pack[name.lower().rpartition(".")[2]](plain.read_bytes()))
    (folder / "z.zip").write_bytes(b"PK")
    (folder / ".hidden").write_bytes(b"")
    with pytest.warns(PhotoWarning, match=r"left out 1 files that are no \.tar or .*: z\.zip"):
        run_data(folder, tmp_path / "cache")
    assert list(cached(tmp_path / "cache")) == [f"p{i}" for i in range(6)]
    for nothing in (tmp_path / "none", tmp_path / "cache"):
        with pytest.raises(ValueError, match=f"{nothing} (is no folder|contains no shards)"):
            run_data(nothing, tmp_path / "other")


def shard_of_50(path: Path) -> bytes:
    return write_tar(path, {f"{i:02}.png": encoded(noise(4, 4, i)) for i in range(50)}).read_bytes()


def flip_in_name(shard: bytes) -> bytes:
    return shard.replace(b"10.png", b"x0.png")


def zero_header(shard: bytes) -> bytes:
    at = shard.find(b"10.png")
    return shard[:at] + bytes(1024) + shard[at + 1024 :]


@pytest.mark.parametrize("damage", [flip_in_name, zero_header, lambda shard: shard * 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_damaged_in_the_middle_is_an_error(damage, packed, tmp_path):
    """tarfile alone takes a damaged header for the end of the file."""
    shard = tmp_path / "s.tar"
    data = damage(shard_of_50(shard))
    shard.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(ValueError, match=r"s\.tar is not a tar file, or is damaged: (a|more) "):
        decode_shards([shard], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with (
        open(shard, "rb") as stream,
        pytest.raises(tarfile.ReadError),
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=Checked) as tar,
    ):
        list(samples_of(tar))


def test_a_long_name_and_padding_are_no_damage(tmp_path):
    shard = write_tar(tmp_path / "s.tar", {"a" * 300 + ".png": encoded(noise(4, 4))})
    with open(shard, "ab") as out:
        out.write(bytes(100_000))
    decode_shards([shard], tmp_path / "cache")
    assert list(cached(tmp_path / "cache")) == ["a" * 300]


def test_keys_that_are_no_utf8_belong_to_a_part(tmp_path):
    key = os.fsdecode(b"caf\xe9")
    shard = write_tar(tmp_path / "s.tar", {f"{key}.png": encoded(noise(4, 4))})
    decode_shards([shard], tmp_path / "cache")
    held_out = hashlib.sha256(b"caf\xe9").digest()[0] < 22
    part = "held out" if held_out else "training"
    assert [photo.key for photo in PhotoCrops(tmp_path / "cache", part).photos] == [key]
    assert is_held_out(key) == held_out


def test_the_first_kind_of_photo_of_a_sample_is_taken(tmp_path):
    kinds = {"a.PNG": ("PNG", 1), "a.jpg": ("JPEG", 2), "a.webp": ("WEBP", 3)}
    members = {name: encoded(noise(4, 4, seed), form) for name, (form, seed) in kinds.items()}
    decode_shards([write_tar(tmp_path / "s.tar", members)], tmp_path / "cache")
    expected = to_rgb(Image.open(io.BytesIO(members["a.webp"])))
    assert np.array_equal(cached(tmp_path / "cache")["a"][0], expected)


def test_pictures_with_other_names_are_named(tmp_path):
    photo = encoded(noise(4, 4))
    members = {"a.png": photo, "a.seg.png": photo, "IMG.0001.png": photo, "c.bmp": photo}
    shard = write_tar(tmp_path / "s.tar", members)
    with pytest.warns(PhotoWarning, match=r"s\.tar: pictures left out: 2, such as IMG\.0001\.png"):
        decode_shards([shard], tmp_path / "cache")


def test_a_member_over_the_limit_is_named_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("percov2.datasets.shards.MOST_BYTES", 1000)
    members = {"a.png": encoded(noise(4, 4)), "b.png": bytes(1001), "c.mp4": bytes(2000)}
    with pytest.warns(PhotoWarning, match=r"skipped b: b\.png has 1001 bytes"):
        decode_shards([write_tar(tmp_path / "s.tar", members)], tmp_path / "cache")
    assert list(cached(tmp_path / "cache")) == ["a"]


def test_samples_of_a_stream_are_those_of_a_file(tmp_path):
    members = {"a.png": b"1", "a.seg.png": b"22", "__x.png": b"3", "b/c.TXT": b"4", "d": b"5"}
    shard = write_tar(tmp_path / "s.tar", members)
    with tarfile.open(shard) as tar, open(shard, "rb") as stream:
        whole = list(samples_of(tar))
        with tarfile.open(fileobj=stream, mode="r|*") as streamed:
            assert list(samples_of(streamed)) == whole
    expected = {"a": {"png": b"1", "seg.png": b"22"}, "b/c": {"TXT": b"4"}}
    assert {sample.key: sample.members for sample in whole} == expected
