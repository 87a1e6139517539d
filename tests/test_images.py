"""Pictures of all kinds become the sRGB pixels that a viewer shows; padding; writing."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from percov2 import images
from percov2.files import (
    check_kind,
    check_outputs,
    open_atomically,
    picture_format,
    write_bytes,
    write_image,
)
from percov2.images import ImageWarning, pad, read_image, reflected, to_rgb
from tools.full_disk import file_limit
from tools.photos import noise

pytestmark = pytest.mark.core


def quiet(image: Image.Image) -> np.ndarray:
    """to_rgb where nothing may be warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = to_rgb(image)
    assert result.dtype == np.uint8
    assert result.shape == (image.height, image.width, 3) or image.getexif()
    return result


def stored(image: Image.Image, form: str, **options: object) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return Image.open(io.BytesIO(stream.getvalue()))


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "HSV", "YCbCr", "CMYK", "LA", "RGBA", "PA"])
def test_plain_modes_look_as_pillow_shows_them(mode):
    image = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], -1)).convert(mode)
    np.testing.assert_array_equal(quiet(image), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_rounded_not_cut():
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 254, 255, 255]
    png = stored(Image.fromarray(values), "PNG")
    assert png.mode == "I;16"
    assert quiet(png)[0, :, 0].tolist() == expected
    assert quiet(Image.fromarray(values.astype(np.int32)))[0, :, 1].tolist() == expected
    assert quiet(stored(Image.fromarray(values), "TIFF"))[0, :, 2].tolist() == expected
    with pytest.raises(ValueError, match="-1 to 70000"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))


def test_floating_point_pictures_are_zero_to_one():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert quiet(image)[0, :, 0].tolist() == [0, 128, 255]
    for bad in (1.5, np.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            to_rgb(Image.fromarray(np.array([[bad]], dtype=np.float32)))


def test_transparency_is_flattened_on_white_and_said():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 51))
    grey_alpha = Image.new("LA", (2, 1), (0, 0))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 0)
    palette = stored(palette, "PNG", transparency=0)
    keyed = stored(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    deep = stored(Image.fromarray(np.array([[300, 257]], dtype=np.uint16)), "PNG", transparency=300)
    assert deep.mode == "I;16"
    for image, expected in [
        (rgba, [[200, 0, 0], [204, 204, 204]]),
        (grey_alpha, [[255, 255, 255]] * 2),
        (palette, [[10, 20, 30], [255, 255, 255]]),
        (keyed, [[255, 255, 255]]),
        (deep, [[255, 255, 255], [1, 1, 1]]),
    ]:
        with pytest.warns(ImageWarning, match="flattened on white"):
            assert to_rgb(image)[0].tolist() == expected


def test_exif_orientation_is_applied():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    turned = pixels.transpose(1, 0, 2)
    upright = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    upright += [turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]]
    for orientation, expected in enumerate(upright, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = stored(Image.fromarray(pixels), "PNG", exif=exif)
        np.testing.assert_array_equal(quiet(image), expected)


def test_a_damaged_exif_block_is_ignored_and_said():
    deep = Image.fromarray(np.full((2, 3), 9 * 257, np.uint16))
    for plain in (Image.new("RGB", (3, 2), (9, 9, 9)), deep):
        image = stored(plain, "PNG", exif=b"no Exif block")
        with pytest.warns(ImageWarning, match="ignored a damaged EXIF block"):
            assert (to_rgb(image) == 9).all()


def wide_gamut_profile() -> bytes:
    """sRGB's profile with red and green swapped: conversion must swap the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def test_profiles_are_converted_to_srgb():
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    tagged = stored(image, "PNG", icc_profile=wide_gamut_profile())
    assert np.abs(quiet(tagged)[0, 0].astype(int) - [100, 200, 50]).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = stored(image, "PNG", icc_profile=srgb)
    assert np.abs(quiet(same)[0, 0].astype(int) - [200, 100, 50]).max() <= 1
    transparent = stored(image.convert("RGBA"), "PNG", icc_profile=wide_gamut_profile())
    assert np.abs(quiet(transparent)[0, 0].astype(int) - [100, 200, 50]).max() <= 2


def test_damaged_profiles_and_those_of_other_colour_spaces_are_ignored_and_said():
    for profile in (b"no profile", b"\0" * 200):
        image = stored(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", icc_profile=profile)
        with pytest.warns(ImageWarning, match="colour profile"):
            assert to_rgb(image)[0, 0].tolist() == [9, 8, 7]
    image = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with pytest.warns(ImageWarning, match="RGB profile in a CMYK picture"):
        assert to_rgb(image)[0, 0].tolist() == [255, 0, 0]


def grey_profile() -> bytes:
    """A profile of linear grey: the tags of sRGB's, with a curve of exponent one."""
    white = b"XYZ \0\0\0\0\0\0\xf6\xd6\0\1\0\0\0\0\xd3\x2d"
    curve = b"curv" + bytes(8)
    head = bytearray(128)
    head[8:12], head[12:24] = b"\x02\x40\0\0", b"mntrGRAYXYZ "
    head[36:40], head[68:80] = b"acsp", white[8:]
    tags = (2).to_bytes(4, "big")
    for name, place, size in ((b"wtpt", 156, 20), (b"kTRC", 176, 12)):
        tags += name + place.to_bytes(4, "big") + size.to_bytes(4, "big")
    data = bytes(head) + tags + white + curve
    return len(data).to_bytes(4, "big") + data[4:]


def test_a_grey_profile_fits_greys_with_and_without_transparency():
    image = Image.new("L", (2, 1), 55)
    image.putpixel((1, 0), 0)
    opaque = stored(image, "PNG", icc_profile=grey_profile())
    linear = quiet(opaque)[0, 0].tolist()
    assert abs(linear[0] - 128) <= 2  # 55/255 of the light is about half of sRGB's range
    keyed = stored(image, "PNG", icc_profile=grey_profile(), transparency=0)
    with pytest.warns(ImageWarning) as caught:
        assert to_rgb(keyed)[0].tolist() == [linear, [255, 255, 255]]
    assert ["flattened" in str(warning.message) for warning in caught] == [True]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "cut.png"
    noise(64, 64).save(path)
    cut = path.read_bytes()[:3000]
    for data, message in (
        (cut, "truncated or damaged"),
        (b"not a picture", "not a picture"),
        (b"", "not a picture"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_giant_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    for size, message in (
        ((9000, 9000), "more pixels than the limit of"),
        ((70000, 1), "a side has at most"),
    ):
        Image.new("1", size).save(path)
        with pytest.raises(ValueError, match=message):
            read_image(path)
    Image.new("1", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the limit given decides, not Pillow's
    assert read_image(path).size == (50, 50)
    with pytest.raises(ValueError, match="limit of 2499"):
        read_image(path, max_pixels=2499)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_share_a_limit_on_pixels_or_wait_for_their_turn():
    """The limit is Pillow's, for the whole process."""
    seen, before = [], Image.MAX_IMAGE_PIXELS

    def work(pixels: int) -> None:
        with images._PILLOW_LIMIT.held(pixels):
            seen.append((pixels, Image.MAX_IMAGE_PIXELS))

    same, other = (threading.Thread(target=work, args=(n,), daemon=True) for n in (100, 200))
    with images._PILLOW_LIMIT.held(100):
        same.start()
        same.join(10)
        other.start()
        other.join(0.2)
        assert seen == [(100, 100)] and Image.MAX_IMAGE_PIXELS == 100
    other.join(10)
    assert seen == [(100, 100), (200, 200)] and before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_a_container_cannot_hide_a_giant_picture(tmp_path):
    inner = io.BytesIO()
    Image.new("L", (300, 300)).save(inner, format="PNG")
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inner.getvalue()).to_bytes(4, "little")
    path = tmp_path / "icon.ico"
    path.write_bytes(b"\0\0\1\0\1\0" + entry + (22).to_bytes(4, "little") + inner.getvalue())
    with pytest.raises(ValueError, match="more pixels than the limit of 1000"):
        read_image(path, max_pixels=1000)


def test_only_regular_files_are_read_and_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read_image(path)

    def fail(*_: object) -> None:
        raise MemoryError

    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as lazy, pytest.raises(MemoryError):
        to_rgb(lazy)


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "tif", "tiff", "bmp", "ppm"])
def test_written_pictures_read_back(ending, tmp_path):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64))] * 2, -1)[..., :3]
    path = tmp_path / f"out.{ending}"
    write_image(Image.fromarray(pixels), path)
    loss = np.abs(to_rgb(read_image(path)).astype(int) - pixels).max()
    assert loss <= (8 if ending in ("jpg", "JPEG") else 0)


@given(length=st.integers(1, 20), extra=st.integers(0, 70))
def test_reflection_equals_numpys(length, extra):
    signal = np.arange(length)
    mode = "reflect" if length > 1 else "edge"
    expected = np.pad(signal, (0, extra), mode)
    np.testing.assert_array_equal(signal[reflected(length, length + extra)], expected)


@given(height=st.integers(1, 40), width=st.integers(1, 40), side=st.sampled_from([1, 16, 64]))
def test_padding_keeps_the_picture_and_fills_whole_tokens(height, width, side):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    padded = pad(pixels, side)
    assert padded.shape == (-(-height // side) * side, -(-width // side) * side, 3)
    np.testing.assert_array_equal(padded[:height, :width], pixels)


def test_written_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    write_image(Image.new("RGB", (2, 2), "red"), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"no picture format for the ending '\.xyz'"):
        write_image(Image.new("RGB", (2, 2)), tmp_path / "out.xyz")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.core
@pytest.mark.parametrize("unnamed", [True, False])
def test_errors_of_writing_name_the_output_and_others_pass(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    out, none = tmp_path / "out", tmp_path / "none"
    for path, error in ((none / "out", "No such file"), (tmp_path / "a/out", "Not a directory")):
        (tmp_path / "a").write_bytes(b"")
        with pytest.raises(OSError, match=error) as raised, open_atomically(path):
            pass
        assert raised.value.filename == str(path)
    with pytest.raises(OSError, match="too large") as raised, file_limit(99):
        write_bytes(out, bytes(10_000))
    assert raised.value.filename == str(out)
    with pytest.raises(OSError, match="No such file") as raised, open_atomically(out):
        none.read_bytes()
    assert raised.value.filename == str(none)
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_links_stay_links_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    target.chmod(0o640)
    write_bytes(link, b"newer")
    assert target.read_bytes() == b"newer"
    assert target.stat().st_mode & 0o777 == 0o640
    longest = tmp_path / ("n" * 255)
    write_bytes(longest, b"x")
    assert longest.read_bytes() == b"x"


def test_pipes_are_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_bytes(pipe, b"through")
    reader.join(10)
    assert seen == [b"through"]
    assert pipe.is_fifo()
    write_bytes("/dev/null", b"gone")
    assert not Path("/dev/null").is_file()


def test_outputs_overwrite_neither_inputs_nor_each_other(tmp_path):
    photo, link = tmp_path / "a.png", tmp_path / "link.png"
    photo.write_bytes(b"original")
    link.symlink_to(photo)
    again = tmp_path / ".." / tmp_path.name / "b.png"
    new = tmp_path / "new.png"
    new.symlink_to("b.png")
    check_outputs([tmp_path / "b.png", tmp_path / "c.png"], [photo])
    for outputs, match in [
        ([photo], r"a\.png: it is the same file as the input"),
        ([tmp_path / ".." / tmp_path.name / "a.png"], "same file as the input"),
        ([link], "same file as the input"),
        *(([tmp_path / "b.png", one], "same file as the output") for one in (again, new)),
        ([tmp_path / "none" / "b.png"], "there is no folder"),
        ([tmp_path], "it is a folder"),
    ]:
        with pytest.raises(ValueError, match=match):
            check_outputs(outputs, [photo])


def test_results_replace_only_files_of_their_kind(tmp_path):
    ours, theirs, empty = tmp_path / "a.pcv2", tmp_path / "b.pcv2", tmp_path / "c.pcv2"
    ours.write_bytes(b"\xfc\x21rest")
    theirs.write_bytes(b"text")
    empty.write_bytes(b"")
    streams = [Path("/dev/stdout"), Path("/dev/null")]
    for path in (ours, empty, tmp_path / "new.pcv2", tmp_path / "NEW.PCV2", *streams):
        check_kind(path, compressed=True)
    for path in (theirs, tmp_path / "a.png", tmp_path / "a"):
        with pytest.raises(ValueError, match=r"must end in|is no \.pcv2 file"):
            check_kind(path, compressed=True)
    picture, text = tmp_path / "a.png", tmp_path / "b.png"
    noise(4, 4).save(picture)
    text.write_text("letters")
    check_kind(picture, compressed=False)
    for path in (text, tmp_path / "new.txt", ours):
        with pytest.raises(ValueError, match=r"is no picture|no picture format"):
            check_kind(path, compressed=False)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path, monkeypatch, number):
    def busy(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", busy)
    path = tmp_path / "mounted"
    path.write_bytes(b"a longer text before")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.core
def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    """A new file has no name until it is complete; the next writer removes an old neighbour."""
    kill = """
import os, signal, sys
from percov2.files import open_atomically, write_bytes
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
path, call = sys.argv[1:]
if call == "write":
    with open_atomically(path) as stream:
        stream.write(bytes(100_000))
        die()
setattr(os, call, die)
write_bytes(path, b"complete")
"""
    new, old = tmp_path / "new.pcv2", tmp_path / "old.pcv2"
    old.write_bytes(b"before")
    for path, call in ((new, "link"), (new, "write"), (old, "replace")):
        result = subprocess.run([sys.executable, "-c", kill, path, call], check=False)
        assert result.returncode == -signal.SIGKILL
    assert not new.exists() and old.read_bytes() == b"before"
    (left,) = set(tmp_path.iterdir()) - {old}
    write_bytes(old, b"while another process may write")
    assert left.exists()
    os.utime(left, (0, 0))
    write_bytes(old, b"after")
    assert old.read_bytes() == b"after" and [*tmp_path.iterdir()] == [old]


@pytest.mark.core
@pytest.mark.parametrize("missing", ["O_TMPFILE", "link"])
def test_files_are_written_where_the_system_has_no_unnamed_ones(tmp_path, monkeypatch, missing):
    if missing == "link":
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(2, "no")))
    else:
        monkeypatch.delattr(os, "O_TMPFILE")
    for content in (b"one", b"two"):
        write_bytes(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content and len([*tmp_path.iterdir()]) == 1


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_an_open_file_is_written_at_its_offset(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        log.write(b"before ")
        log.flush()
        write_bytes(f"/dev/fd/{log.fileno()}", b"data")
        log.write(b" after")
    assert (tmp_path / "log").read_bytes() == b"before data after"


def test_only_devices_and_open_files_are_streams(tmp_path):
    photo = Path("/dev/..") / tmp_path.relative_to("/") / "photo.png"
    photo.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"must end in \.pcv2"):
        check_kind(photo, compressed=True)
    for path in (Path("/dev/null"), Path("/dev/stdout")):
        check_kind(path, compressed=True)
        check_kind(path, compressed=False)
        assert picture_format(path)[0] == "PNG"


def test_nothing_is_written_to_a_standard_output_that_is_closed(monkeypatch):
    """Another file may have its number by now."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_bytes("/dev/stdout", b"data")


def test_hard_links_are_the_same_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match="same file as the input"):
        check_outputs([tmp_path / "b.png"], [tmp_path / "a.png"])
