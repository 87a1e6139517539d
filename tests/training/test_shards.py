"""Shards: reading by seeking, streams, held-out photos, and a feed with a settable position."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from percov2.photos import PhotoWarning, decode_shards, is_held_out
from percov2.training.shards import (
    CropFeed,
    Position,
    Sample,
    ShardStreams,
    read_member,
    shard_members,
    shard_photos,
)
from tools.photos import png, write_shard, write_tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [write_shard(folder / f"s-{seed}.tar", 7 + seed, seed) for seed in range(3)]


def walk(streams: ShardStreams, stream: int, count: int) -> list[Sample]:
    position, found = Position(), []
    for _ in range(count):
        sample, position = streams.next(stream, position)
        found.append(sample)
    return found


def test_members_are_those_of_webdataset(shards, tmp_path):
    # The key of a name ends at its first dot.
    odd = {"a/b.c.jpg": b"x", "a/d.JPEG": b"yy", "a/d.txt": b"words"}
    odd = write_tar(tmp_path / "odd.tar", odd)
    for shard in (*shards, odd):
        members = {member.key: member for member in shard_members(shard)}
        expected = {s["__key__"]: s for s in wds.WebDataset(str(shard), shardshuffle=False)}
        known = {key for key, s in expected.items() if {"png", "jpg", "jpeg"} & set(s)}
        assert set(members) == known
        data = shard.read_bytes()
        for key, member in members.items():
            stored = next(v for k, v in expected[key].items() if k in ("png", "jpeg", "jpg"))
            assert data[member.photo[0] :][: member.photo[1]] == stored
    assert read_member(shards[0], shard_members(shards[0])[1])[1] == ("a door", "a red door")


def test_a_stream_sees_every_photo_of_its_shards_once_a_round(shards):
    streams = ShardStreams(shards, 2, 8, 8, seed=5)
    for stream, own in ((0, (shards[0], shards[2])), (1, (shards[1],))):
        keys = [m.key for shard in own for m in shard_members(shard) if not is_held_out(m.key)]
        position, seen = Position(), []
        while position.rounds == 0:
            shard, members, more = streams._shard(stream, position)
            assert shard in own
            seen += [m.key for m in members]
            position = Position(0, position.shards + 1) if more else Position(1)
        assert sorted(seen) == sorted(keys) and seen != keys
        # The next round has another order.
        again = streams._shard(stream, position)[1]
        assert [m.key for m in again] != seen[: len(again)]


def test_streams_that_share_a_shard_deal_it_among_them(shards):
    streams = ShardStreams(shards[:1], 3, 8, 8, seed=5)
    dealt = [[m.key for m in streams._shard(i, Position())[1]] for i in range(3)]
    keys = [m.key for m in shard_members(shards[0]) if not is_held_out(m.key)]
    assert sorted(key for own in dealt for key in own) == sorted(keys)


def test_held_out_photos_are_never_drawn(tmp_path):
    shard = write_shard(tmp_path / "many.tar", 200, 9, side=8)
    members = shard_members(shard)
    held = {m.key for m in members if is_held_out(m.key)}
    assert held
    streams = ShardStreams([shard], 4, 8, 8, 0)
    drawn = {m.key for i in range(4) for m in streams._shard(i, Position())[1]}
    assert drawn == {m.key for m in members} - held


def test_crops_are_reproducible_parts_of_photos(shards):
    streams = ShardStreams(shards, 2, 40, 48, seed=3)
    first, again = walk(streams, 0, 9), walk(ShardStreams(shards, 2, 40, 48, seed=3), 0, 9)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and a.pixels.shape == (40, 40, 3)
        assert a.caption == b.caption and a.caption in ("", "a door", "a red door")
        assert a.randomness.integers(2**63) == b.randomness.integers(2**63)
    other = walk(ShardStreams(shards, 2, 40, 48, seed=4), 0, 9)
    assert not all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, other, strict=True))


def test_a_crop_that_needs_no_scaling_is_a_part_of_its_photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    shard = write_tar(tmp_path / "one.tar", {"one.png": png(pixels)})
    windows = {pixels[:, i : i + 16].tobytes(): False for i in range(25)}
    windows |= {pixels[:, i : i + 16][:, ::-1].tobytes(): True for i in range(25)}
    streams = ShardStreams([shard], 1, 16, 16, 0)
    found = [sample.pixels.tobytes() for sample in walk(streams, 0, 12)]
    assert {windows[crop] for crop in found} == {False, True} and len(set(found)) > 6


def test_batches_do_not_depend_on_processes_or_parts(shards):
    def batches(processes: int, parts: int) -> list[bytes]:
        streams = ShardStreams(shards, 4, 24, 32, seed=1)
        feeds = [CropFeed(streams, p, processes, parts) for p in range(processes)]
        found = []
        for _ in range(3):
            taken = [[s for _ in range(parts) for s in feed.take()] for feed in feeds]
            places = [sample for row in zip(*taken, strict=True) for sample in row]
            found += [sample.pixels.tobytes() for sample in places]
        return found

    alone = batches(1, 1)
    assert len(set(alone)) == 12
    assert alone == batches(2, 1) == batches(1, 2) == batches(2, 2) == batches(4, 1)


def test_a_feed_goes_on_from_stored_positions(shards):
    streams = ShardStreams(shards, 4, 24, 32, seed=1)
    feed = CropFeed(streams)
    for _ in range(3):
        feed.take()
    stored = feed.positions()
    expected = [s.pixels.tobytes() for s in feed.take()]
    fresh = CropFeed(streams)
    fresh.take()
    fresh.go_to(stored)
    assert [s.pixels.tobytes() for s in fresh.take()] == expected
    # Other numbers of processes may go on from the same place.
    pair = [CropFeed(streams, p, 2) for p in range(2)]
    for half in pair:
        half.go_to(stored)
    taken = [half.take() for half in pair]
    assert [s.pixels.tobytes() for row in zip(*taken, strict=True) for s in row] == expected
    with pytest.raises(ValueError, match="same batch"):
        CropFeed(ShardStreams(shards, 2, 24, 32, 1)).go_to(stored)


def test_damaged_and_small_photos_are_passed_over(tmp_path):
    photo = png(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    members = {"x-1.png": photo[: len(photo) // 2], "x-2.png": photo}
    shard = write_tar(tmp_path / "bad.tar", members)
    with pytest.warns(UserWarning, match="skipped x-1"):
        walk(ShardStreams([shard], 1, 16, 16, 0), 0, 2)
    with pytest.raises(ValueError, match="smaller crop"):
        ShardStreams([shard], 1, 500, 500, 0).next(0, Position())


def test_refusals(shards, tmp_path):
    (tmp_path / "no.tar").write_bytes(b"not a tar file" * 100)
    empty = write_tar(tmp_path / "empty.tar", {"a.txt": b"words"})
    for match, call in (
        (r"no \.tar", lambda: ShardStreams([], 1, 8, 8, 0)),
        ("at least the crops' side of 8", lambda: ShardStreams(shards, 1, 8, 7, 0)),
        ("cannot be divided", lambda: CropFeed(ShardStreams(shards, 4, 8, 8, 0), 0, 3)),
        ("tar", lambda: shard_members(tmp_path / "no.tar")),
        ("contains no photo", lambda: shard_members(empty)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_both_readers_take_the_same_photos_and_captions(tmp_path):
    """`train data` reads whole shards, and `train sd3` seeks in them."""
    small, large = (png(np.full((side, side, 3), side, np.uint8)) for side in (8, 9))
    members = {
        "a.PNG": small,
        "a.webp": large,  # a PNG file by its content
        "a.TXT": "ein Weg\n\n café ".encode("latin-1"),
        "b.png": small,
        "c.png": small,
        "b.txt": b"too far from its photo",
        "__d.png": small,
    }
    shard = write_tar(tmp_path / "s.tar", members)
    decode_shards([shard], tmp_path / "cache")
    stored = [
        (key, height, captions)
        for key, _, height, _, captions in json.loads((tmp_path / "cache/photos.json").read_text())
    ]
    assert stored == [("a", 9, ["ein Weg", "caf\ufffd"]), ("b", 8, []), ("c", 8, [])]
    found = [(member.key, *read_member(shard, member)) for member in shard_members(shard)]
    sizes = {small: 8, large: 9}
    assert [(key, sizes[photo], list(words)) for key, photo, words in found] == stored
    assert [(key, len(pixels)) for key, pixels in shard_photos(shard, 1, 99)] == [
        (key, height) for key, height, _ in stored
    ]


def test_bad_photos_are_named_skipped_and_counted(tmp_path):
    """One bad photo ended `train shard-tokens` without its name."""
    photo = png(np.zeros((8, 8, 3), np.uint8))
    members = {f"p{i}": photo for i in range(12)} | {"p5": photo[:40]}
    shard = write_tar(tmp_path / "s.tar", {f"{key}.png": data for key, data in members.items()})
    with pytest.warns(PhotoWarning, match=r"s\.tar: skipped p5: "):
        assert len(list(shard_photos(shard, 8, 8))) == 11
    members |= {"p6": b"", "p7": b"%!PS-Adobe-3.0 EPSF-3.0"}
    shard = write_tar(tmp_path / "t.tar", {f"{key}.png": data for key, data in members.items()})
    with (
        pytest.warns(PhotoWarning, match="skipped p7"),
        pytest.raises(ValueError, match=r"t\.tar: 3 of 12 photos are damaged"),
    ):
        list(shard_photos(shard, 8, 8))


def test_a_photo_over_the_pixel_limit_is_skipped(tmp_path):
    huge = io.BytesIO()
    Image.new("1", (8001, 8001)).save(huge, "PNG")
    shard = write_tar(tmp_path / "s.tar", {"x-1.png": huge.getvalue()})
    with (
        pytest.warns(PhotoWarning, match="skipped x-1: .* pixels"),
        pytest.raises(ValueError, match="smaller crop"),
    ):
        ShardStreams([shard], 1, 16, 16, 0).next(0, Position())


def test_a_shard_that_cannot_be_sought_in_is_one_line(tmp_path):
    plain = write_shard(tmp_path / "plain.tar", 5, 0)
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ValueError, match=r"packed\.tar is no uncompressed tar file.*unpacked$"):
        shard_members(packed)
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "device.tar").symlink_to("/dev/zero")
    for name in ("pipe.tar", "device.tar"):
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            shard_members(tmp_path / name)
    damaged = plain.read_bytes().replace(b"0-3.png", b"0-x.png")
    plain.write_bytes(damaged)
    with pytest.raises(ValueError, match="a header is damaged"):
        shard_members(plain)
