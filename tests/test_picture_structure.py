"""Parts of picture files that Pillow drops, mistakes, or takes too long for."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from percov2 import Codec, images
from percov2.colour_spaces import SRGB, ColourSpace, icc_profile
from percov2.images import ImageWarning, decode_image, read_image, to_rgb
from percov2.picture_structure import tiff_pages
from tools import picture_files as files
from tools.photos import noise

pytestmark = pytest.mark.core

LINEAR = icc_profile(ColourSpace(SRGB.chromaticities, (1.0,)))
"""A profile with which level 128 is 188 of sRGB."""


def saved(kind: str, level: int = 128, mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    fill = level if mode == "L" else (level,) * 3
    Image.new(mode, (32, 32), fill).save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return to_rgb(decode_image(io.BytesIO(data)))


def test_a_profile_of_avif_comes_before_code_points():
    data = saved("AVIF", icc_profile=LINEAR, quality=100, subsampling="4:4:4")
    assert abs(int(decoded(data)[9, 9, 0]) - 188) <= 1


def test_high_dynamic_range_is_refused_beside_a_profile_too():
    data = saved("AVIF", icc_profile=LINEAR)
    at = data.index(b"colrnclx") + 8
    with pytest.raises(ValueError, match="high dynamic range"):
        decoded(data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :])


@pytest.mark.parametrize("more", [files.iccp(LINEAR), files.gama(1.0)])
@pytest.mark.parametrize("codes", [(2, 2), (3, 3)])
def test_code_points_that_say_nothing_leave_it_to_the_next_chunk(codes, more):
    picture = files.png("rgb", 8, np.full((2, 2, 3), 128), files.cicp(*codes), more)
    assert (decoded(picture) == 188).all()


def test_samples_of_narrow_range_are_refused():
    narrow = files.chunk(b"cICP", bytes([1, 13, 0, 0]))
    with pytest.raises(ValueError, match="narrow range"):
        decoded(files.png("rgb", 8, np.full((2, 2, 3), 128), narrow))


def test_zeros_of_gama_and_chrm_say_nothing():
    plain = files.gama(0.0), files.chrm(*[0.0] * 8)
    assert (decoded(files.png("rgb", 8, np.full((2, 2, 3), 128), *plain)) == 128).all()


def test_high_dynamic_range_in_a_profile_is_refused():
    body = b"cicp" + bytes(4) + bytes([9, 16, 0, 1])
    count = struct.unpack(">I", LINEAR[128:132])[0]
    table = LINEAR[132 : 132 + 12 * count]
    shifted = b"".join(
        name + struct.pack(">II", offset + 12, size)
        for name, offset, size in struct.iter_unpack(">4sII", table)
    )
    entry = b"cicp" + struct.pack(">II", len(LINEAR) + 12, len(body))
    profile = LINEAR[:128] + struct.pack(">I", count + 1) + shifted + entry
    profile += LINEAR[132 + 12 * count :] + body
    with pytest.raises(ValueError, match=r"high dynamic range \(PQ\)"):
        decoded(files.png("rgb", 8, np.full((2, 2, 3), 128), files.iccp(profile)))


def test_the_first_colour_box_of_jpeg2000_counts():
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    data = files.jpeg2000(image, LINEAR)
    assert abs(int(decoded(data)[9, 9, 0]) - 188) <= 1
    at = data.index(b"colr") - 4
    enumerated = struct.pack(">I4sBBBI", 15, b"colr", 1, 0, 0, 16)
    outer = data.index(b"jp2h") - 4
    (length,) = struct.unpack(">I", data[outer : outer + 4])
    grown = data[:outer] + struct.pack(">I", length + 15) + data[outer + 4 :]
    assert abs(int(decoded(grown[:at] + enumerated + grown[at:])[9, 9, 0]) - 128) <= 1
    unknown = enumerated[:-4] + struct.pack(">I", 21)
    with pytest.raises(ValueError, match="enumerated colour space 21"):
        decoded(grown[:at] + unknown + grown[at:])


def test_linear_qoi_is_converted():
    head = b"qoif" + struct.pack(">IIBB", 2, 1, 3, 1)
    data = head + bytes([0xFE, 128, 128, 128, 0xC0]) + bytes(7) + b"\1"
    assert (decoded(data) == 188).all()


def test_grey_profiles_are_exact_in_the_dark():
    """The optimised transform of littlecms is off by 10 levels."""
    gray = b"GRAY".join(LINEAR[:132].split(b"RGB "))
    curve = LINEAR[LINEAR.index(b"para") :][:16]
    white = (
        b"XYZ " + bytes(4) + np.rint(np.array([0.9642, 1, 0.8249]) * 65536).astype(">i4").tobytes()
    )
    tags = b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 16)
    profile = gray[4:128] + struct.pack(">I", 2) + tags + white + curve
    profile = struct.pack(">I", len(profile) + 4) + profile
    samples = np.arange(256).reshape(16, 16, 1)
    found = decoded(files.png("grey", 8, samples, files.iccp(profile))).astype(int)
    light = samples / 255
    small = 12.92 * light
    exact = 255 * np.where(light <= 0.0031308, small, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found - exact).max() <= 1


def test_a_profile_with_a_missing_part_is_said():
    data = saved("JPEG", icc_profile=LINEAR + bytes(70000))
    at = data.index(b"ICC_PROFILE\0\2\2")
    cut = data[:at] + b"XCC" + data[at + 3 :]
    with pytest.warns(ImageWarning, match="incomplete colour profile"):
        decoded(cut)


def planar(samples: np.ndarray) -> bytes:
    """A TIFF file [H, W, 3] of 16 bits with a strip per colour."""
    height, width, _ = samples.shape
    planes = samples.transpose(2, 0, 1).astype("<u2").tobytes()
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2])]
    tags += [(277, 3, [3]), (278, 4, [height]), (284, 3, [2])]
    size = height * width * 2
    tags += [(273, 4, [8, 8 + size, 8 + 2 * size]), (279, 4, [size] * 3)]
    data, table = planes, b""
    for tag, kind, values in sorted(tags):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, data = struct.pack("<I", 8 + len(data)), data + packed
        table += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + table + bytes(4)


def test_planes_of_16_bits_are_read_as_such():
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    data = planar(samples)
    entries = {254: 1, 256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    small = struct.pack("<H", len(entries)) + data[4:8]
    for tag, value in reversed(entries.items()):
        small = small[:2] + struct.pack("<HHII", tag, 4, 1, value) + small[2:]
    after_a_thumbnail = data[:4] + struct.pack("<I", len(data)) + data[8:] + small
    before = TiffImagePlugin.READ_LIBTIFF
    for one in (data, after_a_thumbnail):
        assert np.abs(decoded(one).astype(int) - samples / 257).max() <= 1
    assert before == TiffImagePlugin.READ_LIBTIFF  # a setting of the whole process


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("planes", [True, False])
def test_exif_of_tiff_is_read_before_the_file_is_closed(planes, pages, tmp_path):
    samples = np.full((4, 4, 3), (200, 100, 50)) * 257
    data = planar(samples) if planes else files.tiff(samples, 16, 2)
    (first,) = struct.unpack("<I", data[4:8])
    adobe_rgb = struct.pack("<HHHIHH", 1, 0xA001, 3, 1, 2, 0) + bytes(4)
    path = tmp_path / "adobe.tif"
    path.write_bytes(
        files.with_tags(data + adobe_rgb, {34665: len(data)}, first if pages == 2 else 0)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert to_rgb(read_image(path))[0, 0].tolist() == [227, 100, 42]
    assert ["2 frames" in str(warning.message) for warning in caught] == [True] * (pages - 1)


def test_uncompressed_ycbcr_of_half_size_chroma():
    red = [76] * 4 + [85, 255]
    data = files.tiff(np.array(red).reshape(1, 6, 1), 8, 6)
    whole = [(256, [2]), (257, [2]), (277, [3]), (278, [2])]
    at = struct.unpack("<I", data[4:8])[0] + 2
    table = bytearray(data)
    for i in range(struct.unpack("<H", data[at - 2 : at])[0]):
        place = at + 12 * i
        (tag,) = struct.unpack("<H", data[place : place + 2])
        for wanted, values in whole:
            if tag == wanted:
                table[place + 8 : place + 12] = struct.pack("<I", values[0])
    found = decoded(bytes(table)).reshape(-1, 3)
    assert np.abs(found.astype(int) - (254, 0, 0)).max() <= 3


def test_unsigned_samples_of_32_bits_and_signed_ones():
    samples = np.array([0xFFFFFFFF, 0x80000000, 0, 0x40000000])
    low, high = samples & 0xFFFF, samples >> 16
    words = np.stack([low, high], -1).reshape(1, 8, 1)
    data = bytearray(files.tiff(words, 16, 1))
    for tag, value in ((256, 4), (258, 32)):
        at = data.index(struct.pack("<HH", tag, 4 if tag == 256 else 3))
        data[at + 8 : at + 10] = struct.pack("<H", value)
    assert decoded(bytes(data))[0, :, 0].tolist() == [255, 128, 0, 64]
    with pytest.raises(ValueError, match="signed samples"):
        decoded(files.tiff(np.array([[[1], [2]]]), 8, 1, t339=[2]))


def pages(*tags: dict[str, list[int]], **options: bool) -> bytes:
    """A TIFF file with a grey page per dictionary, whose level is 10 times its number."""
    out = io.BytesIO()
    images = [Image.new("L", (8, 8), 10 * i) for i in range(len(tags))]
    infos = []
    for image, own in zip(images, tags, strict=True):
        image.encoderinfo = {"tiffinfo": {int(k[1:]): v[0] for k, v in own.items()}}
        infos.append(image)
    first, *others = infos
    more = first.encoderinfo | options
    first.save(out, "TIFF", save_all=True, append_images=others, **more)
    return out.getvalue()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("tags", [{"t254": [1]}, {"t254": [4]}, {"t255": [2]}])
def test_masks_and_thumbnails_before_the_page_are_skipped(tags, big):
    data = pages(tags, {}, big_tiff=big)
    assert data.startswith(b"II+\0" if big else b"II*\0")
    found = tiff_pages(io.BytesIO(data))
    assert [page.is_secondary for page in found] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        assert (decoded(data) == 10).all()


@pytest.mark.parametrize(("profiled", "level"), [(0, 128), (1, 188)])
def test_a_page_has_its_own_profile_and_not_that_of_its_thumbnail(profiled, level):
    small, whole = Image.new("L", (8, 8), 10), Image.new("L", (16, 16), 128)
    whole.encoderinfo = {"tiffinfo": {254: 0}}
    out, more = io.BytesIO(), {"save_all": True, "append_images": [whole]}
    small.save(out, "TIFF", tiffinfo={254: 1}, icc_profile=LINEAR, **more)
    before, tag, middle, again, after = re.split(b"(\x73\x87\7\0)", out.getvalue())
    tags = [tag, again]
    tags[1 - profiled] = b"\xe8\xfd\7\0"  # an unknown one
    data = before + tags[0] + middle + tags[1] + after
    assert [page.has_profile for page in tiff_pages(io.BytesIO(data))] == [not profiled, profiled]
    with pytest.warns(ImageWarning, match="2 frames"):
        assert (decoded(data) == level).all()


def test_a_picture_in_a_sub_directory_is_not_replaced_by_its_thumbnail():
    """DNG files are such."""
    whole = files.tiff(np.full((8, 8, 1), 200), 8, 1)
    (place,) = struct.unpack("<I", whole[4:8])
    for tags in ({254: 1}, {330: place}):
        assert (decoded(files.with_tags(whole, tags)) == 200).all()
    with pytest.raises(ValueError, match=r"^the picture is in a sub-directory"):
        decoded(files.with_tags(whole, {254: 1, 330: place}))


def test_an_opened_thumbnail_is_stored_as_the_page_that_it_is_and_said():
    data = pages({"t254": [1]}, {})
    with pytest.warns(
        ImageWarning, match="page 1, which is a reduced version .* page 2 is a whole"
    ):
        assert (to_rgb(Image.open(io.BytesIO(data))) == 0).all()
    whole = Image.open(io.BytesIO(data))
    whole.seek(1)
    with pytest.warns(ImageWarning, match="2 frames or pages; only one is stored$"):
        assert (to_rgb(whole) == 10).all()
    small = files.with_tags(files.tiff(np.full((8, 8, 1), 200), 8, 1), {254: 1, 330: 8})
    with pytest.warns(ImageWarning, match="reduced version of a picture that is not stored"):
        assert (to_rgb(Image.open(io.BytesIO(small))) == 200).all()


class CountedReads(io.BytesIO):
    """A stream that counts its reads."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        return super().read(size)


def test_many_pages_are_counted_in_linear_time():
    page = struct.pack("<H", 3) + struct.pack("<HHII", 256, 4, 1, 1) * 3
    parts, place = [], 8
    for i in range(40000):
        following = place + len(page) + 4 if i < 39999 else 0
        parts.append(page + struct.pack("<I", following))
        place = following
    data = struct.pack("<2sHI", b"II", 42, 8) + b"".join(parts)
    stream = CountedReads(data)
    assert len(tiff_pages(stream)) == 1000
    assert stream.reads < 6000  # three tags, their number and the next place: five of a page
    looped = data[:8] + page + struct.pack("<I", 8)
    assert len(tiff_pages(io.BytesIO(looped))) == 1
    assert tiff_pages(io.BytesIO(data[:20])) == []
    beyond = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**64 - 1)
    assert tiff_pages(io.BytesIO(beyond)) == []


def test_a_handle_whose_decoding_failed_fails_again():
    whole = saved("PNG")
    image = Image.open(io.BytesIO(whole[: len(whole) // 2] + bytes(len(whole) // 2)))
    codec = Codec.from_pretrained("tiny")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"truncated, damaged or closed: \w"):
            codec.compress(image)


def test_stubs_that_call_a_handler_are_refused():
    data = b"BUFR" + bytes(100)
    image = Image.open(io.BytesIO(data), formats=["BUFR"])
    with pytest.raises(ValueError, match="format BUFR is not read"):
        to_rgb(image)


def test_parts_that_are_dropped_are_said():
    data = saved("JPEG")
    for text, part in (
        (b'<x hdrgm:Version="1.0"/>', "gain map"),
        (b'<x GCamera:MotionPhoto="1"/>', "video"),
    ):
        xmp = b"http://ns.adobe.com/xap/1.0/\0" + text
        marked = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
        with pytest.warns(ImageWarning, match=f"the picture's {part} is not stored"):
            decoded(marked)
    image = Image.new("RGB", (4, 4))
    for info, part in (
        ({"depth_images": [b"x"]}, "depth map"),
        ({"aux": {"urn:mpeg:hevc:2015:auxid:2:depth": [1]}}, "depth map"),
        ({"aux": {"urn:com:apple:photo:2020:aux:hdrgainmap": [1]}}, "gain map"),
    ):
        image.info = info  # as pillow-heif gives it
        with pytest.warns(ImageWarning, match=f"the picture's {part} is not stored"):
            to_rgb(image)


@pytest.mark.parametrize(
    "one",
    [
        b"P4 9 2\n\0\0\0\0",
        b"P5 3 2 255\n" + bytes(6),
        b"P5 3 2 65535\n" + bytes(12),
        b"P5 3 2 300\n" + bytes(12),
        b"P6 3 2 255\n" + bytes(18),
        b"P6 3 2 15\n" + bytes(18),
        b"P6 3 2 1023\n" + bytes(36),
        b"Pf\n3 2\n-1.0\n" + bytes(24),
        saved("JPEG"),
        saved("JPEG", progressive=True),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_a_second_picture_in_a_file_is_said(one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = decoded(one)
        np.testing.assert_array_equal(decoded(one + b"\n"), expected)
    for read in (decoded, lambda data: to_rgb(Image.open(io.BytesIO(data)))):
        with pytest.warns(ImageWarning, match="another picture follows in the file"):
            np.testing.assert_array_equal(read(one + one), expected)


def test_previews_before_the_scan_of_a_jpeg_file_are_no_second_picture():
    data = saved("JPEG")
    two = data * 2
    held = data[:2] + b"\xff\xe5" + struct.pack(">H", len(two) + 2) + two + data[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decoded(held), decoded(data))


def test_a_profile_that_cannot_be_inflated_is_said():
    broken = files.chunk(b"iCCP", b"name\0\0no zlib data")
    with pytest.warns(ImageWarning, match="ignored a damaged or incomplete colour profile"):
        found = decoded(files.png("rgb", 8, np.full((2, 2, 3), 128), broken, files.gama(1.0)))
    assert (found == 188).all()


def test_structures_without_end_are_refused_at_once():
    header = b"\x89PNG\r\n\x1a\n" + files.chunk(
        b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    )
    many = header + files.chunk(b"teXt", b"") * 100_001
    with pytest.raises(ValueError, match=r"^the picture has more than 100000 chunks"):
        decoded(many)
    out = io.BytesIO()
    Image.new("L", (64, 64), 9).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    at = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match="scans, more than 500"):
        decoded(data[:at] + data[at:-2] * 600 + data[-2:])
    for filler in (b"#" + b"a" * 200_000 + b"\n", b"#" * 200_000 + b"\n", b"#\n" * 90_000):
        for begin in (b"P5 1 1\n", b"P4 1 ", b"Pf\n"):
            with pytest.raises(ValueError, match="header of more than 65536 bytes"):
                decoded(begin + filler + b"255\n\0")
    assert decoded(b"P5 1 1\n# a short one\n255\n\7").tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("level", [9, 10, 32, 35])
def test_pixels_of_a_portable_bitmap_are_no_header(level):
    """35 begins a comment in the header, and the others are white space."""
    head = b"P5 300 300 # a comment\n255\n"
    assert (decoded(head + bytes([level]) * 90_000) == level).all()
    assert (decoded(head + bytes(range(level + 1)) * 90_000)[0, level] == level).all()


def test_a_damaged_file_of_a_known_format_is_called_so():
    with pytest.raises(ValueError, match="damaged, or a kind of TIFF that Pillow does not decode"):
        decoded(b"II*\0" + bytes(40))


def test_only_the_bits_of_a_sample_count_in_a_transparent_grey():
    samples = np.array([[[8], [9]]])
    trns = files.chunk(b"tRNS", b"\0\x18")
    with pytest.warns(ImageWarning, match="transparency"):
        found = decoded(files.png("grey", 4, samples, trns))
    assert found[0, 0, 0] == 255 and found[0, 1, 0] == 153


def interlaced(samples: np.ndarray, passes: int) -> bytes:
    """A PNG file of grey samples [H, W] of 8 bits with the first passes of Adam7."""
    places = [np.s_[::8, ::8], np.s_[::8, 4::8], np.s_[4::8, ::4], np.s_[::4, 2::4]]
    places += [np.s_[2::4, ::2], np.s_[::2, 1::2], np.s_[1::2]]
    rows = b"".join(
        b"\0" + bytes(row) for place in places[:passes] for row in samples[place] if len(row)
    )
    height, width = samples.shape
    header = files.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    data = files.chunk(b"IDAT", zlib.compress(rows)) + files.chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + data


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (8, 8), (17, 13)])
def test_an_interlaced_picture_needs_all_its_passes(size):
    samples = np.random.default_rng(0).integers(1, 256, size, np.uint8)
    np.testing.assert_array_equal(decoded(interlaced(samples, 7))[..., 0], samples)
    for passes in range(1, 7):
        if interlaced(samples, passes) != interlaced(samples, 7):
            with pytest.raises(ValueError, match="ends before the last row"):
                decoded(interlaced(samples, passes))


@pytest.mark.parametrize("extra", [True, False])
def test_a_truncated_avif_picture_is_no_heic(extra, monkeypatch):
    """It has a brand in common with HEIC."""
    if extra:
        pytest.importorskip("pillow_heif")
    else:
        monkeypatch.setattr(images, "find_spec", lambda name: None)
    data = saved("AVIF")
    for brand in (b"avif", b"mif1"):
        cut = data[:8] + brand + data[12 : len(data) // 2]
        with pytest.raises(ValueError, match="truncated or damaged, or a kind of AVIF"):
            decoded(cut)


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_a_picture_with_fewer_rows_than_it_says_is_refused(depth):
    """Every checksum is right."""
    samples = np.random.default_rng(0).integers(0, 2**depth, (300, 700, 1))
    whole = files.png("grey", depth, samples)
    rows = zlib.decompress(whole[41:-16])
    for kept, pieces in ((len(rows), 1), (len(rows), 5), (len(rows) - 1, 1), (100, 1)):
        packed = zlib.compress(rows[:kept])
        step = -(-len(packed) // pieces)
        chunks = [files.chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step)]
        data = whole[:33] + b"".join(chunks) + whole[-12:]
        if kept == len(rows):
            expected = (samples * 255 + (2**depth - 1) // 2) // (2**depth - 1)
            np.testing.assert_array_equal(decoded(data)[..., :1], expected)
        else:
            for read in (decoded, lambda one: to_rgb(Image.open(io.BytesIO(one)))):
                with pytest.raises(ValueError, match="ends before the last row"):
                    read(data)


def test_a_tiff_file_with_too_few_strips_or_tiles_is_refused():
    samples = np.full((20, 24, 3), 200)
    data = files.tiff(samples, 8, 2)
    tile = {273: None, 278: None, 322: 32, 323: 32, 324: 8}
    padded = {**tile, 322: 16}
    for tags, found in (
        ({278: 10}, "1 of 2"),
        ({278: 7}, "1 of 3"),
        ({284: 2}, "1 of 3"),
        ({284: 2, 278: 10}, "1 of 6"),
        (padded, "1 of 2"),
        ({**padded, 323: 16}, "1 of 4"),
    ):
        with pytest.raises(ValueError, match=f"it has {found} strips or tiles"):
            decoded(files.with_tags(data, tags))
    assert (decoded(files.with_tags(data, {278: 2**32 - 1})) == 200).all()
    whole = files.tiff(np.full((32, 32, 3), 200), 8, 2)
    assert (decoded(files.with_tags(whole, {**tile, 256: 24, 257: 20})) == 200).all()


def test_an_icon_is_not_taken_for_a_tga_picture():
    """TGA has no signature, and the length of the icon stands where it has its depth."""
    out = io.BytesIO()
    image = noise(180, 180)
    image.save(out, "ICO", sizes=[(180, 180)])
    with Image.open(io.BytesIO(out.getvalue()), formats=["TGA"]) as other:
        assert other.size != image.size
    np.testing.assert_array_equal(decoded(out.getvalue()), np.asarray(image))
