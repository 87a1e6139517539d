"""Pixels mean what the file says: declarations of colour against an oracle of plain floats."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from percov2.colour_spaces import (
    SRGB,
    ColourSpace,
    from_cicp,
    from_gamma,
    icc_profile,
    to_srgb_levels,
)
from percov2.images import ImageWarning, decode_image, read_image, to_rgb
from tools import picture_files as files

pytestmark = pytest.mark.core

D65 = (0.3127, 0.3290)
P3 = (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
BT2020 = (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
ADOBE = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
REC709 = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)


def decoded(data: bytes) -> np.ndarray:
    """The pixels of a file, which must be those of the picture that a user opens with Pillow."""
    found = to_rgb(decode_image(io.BytesIO(data)))
    lazy = Image.open(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = [to_rgb(lazy) for _ in range(2)]
    first_page = lazy.format == "TIFF" and getattr(lazy, "n_frames", 1) > 1  # a user chooses it
    assert first_page or all(np.array_equal(found, one) for one in again)
    return found


def xyz_of(chromaticities: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ, by solving for the white point."""
    pairs = [chromaticities[i : i + 2] for i in range(0, 8, 2)]
    white, *primaries = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in pairs]
    matrix = np.stack(primaries, 1)
    return matrix * np.linalg.solve(matrix, white)


def srgb_light(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def srgb_code(light: float) -> float:
    light = min(max(light, 0.0), 1.0)
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def oracle(samples: np.ndarray, white: int, light, chromaticities: tuple[float, ...]) -> np.ndarray:
    """8-bit sRGB of samples [H, W, 3] with a D65 white, a pixel at a time."""
    to_srgb = np.linalg.inv(xyz_of(REC709)) @ xyz_of(chromaticities)
    result = np.zeros(samples.shape, np.uint8)
    for place in np.ndindex(samples.shape[:2]):
        linear = np.array([light(float(v) / white) for v in samples[place]])
        result[place] = [round(255 * srgb_code(v)) for v in to_srgb @ linear]
    return result


def swatches(depth: int, channels: int) -> np.ndarray:
    """Colours without extremes of saturation, which other gamuts would clip."""
    rng = np.random.default_rng(depth)
    low, high = (0.0, 1.0) if channels == 1 else (0.35, 0.75)
    drawn = low + (high - low) * rng.random((6, 7, channels))
    return np.rint(drawn * ((1 << depth) - 1)).astype(np.uint16)


CHUNKS = {
    "none": ((), srgb_light, REC709),
    "sRGB": ((files.srgb(),), srgb_light, REC709),
    "gAMA of sRGB": ((files.gama(1 / 2.2),), srgb_light, REC709),
    "gAMA and cHRM of sRGB": ((files.gama(1 / 2.2), files.chrm(*REC709)), srgb_light, REC709),
    "gAMA 1": ((files.gama(1.0),), lambda v: v, REC709),
    "gAMA 1/1.8": ((files.gama(1 / 1.8),), lambda v: v**1.8, REC709),
    "gAMA and cHRM of P3": ((files.gama(1 / 2.2), files.chrm(*P3)), lambda v: v**2.2, P3),
    "cHRM alone": ((files.chrm(*ADOBE),), srgb_light, ADOBE),
    "cICP P3": ((files.cicp(12, 13),), srgb_light, P3),
    "cICP BT.2020, linear": ((files.cicp(9, 8),), lambda v: v, BT2020),
    "cICP before gAMA": ((files.cicp(12, 13), files.gama(1.0)), srgb_light, P3),
    "sRGB before gAMA": ((files.srgb(), files.gama(1.0)), srgb_light, REC709),
    "cICP before iCCP": (
        (files.cicp(12, 13), files.iccp(icc_profile(from_gamma(1.0, None)))),
        srgb_light,
        P3,
    ),
    "iCCP before sRGB": (
        (files.iccp(icc_profile(from_cicp(12, 13))), files.srgb()),
        srgb_light,
        P3,
    ),
}


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        *(("grey", depth) for depth in (1, 2, 4, 8, 16)),
        *(("palette", depth) for depth in (1, 2, 4, 8)),
        *((kind, depth) for kind in ("rgb", "grey alpha", "rgba") for depth in (8, 16)),
    ],
)
def test_png_samples_mean_what_the_chunks_say(name, kind, depth):
    chunks, light, chromaticities = CHUNKS[name]
    if kind.startswith("grey") and "iCCP" in name:
        chunks = tuple(c for c in chunks if b"iCCP" not in c)  # a grey picture has no RGB profile
        if name.startswith("iCCP"):
            light, chromaticities = srgb_light, REC709
    white = (1 << depth) - 1
    samples = swatches(depth, 1 if kind in ("palette", "grey", "grey alpha") else 3)
    colours = np.repeat(samples, 3, 2) if kind.startswith("grey") else samples
    if kind == "palette":
        palette = swatches(8, 3).reshape(-1, 3)[: 1 << depth]
        samples = np.minimum(samples, len(palette) - 1)
        chunks = (*chunks, files.chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        colours, white = palette[samples[..., 0]], 255
    expected = oracle(colours, white, light, chromaticities)
    if kind in ("grey alpha", "rgba"):
        alpha = np.random.default_rng(1).integers(0, white + 1, (*samples.shape[:2], 1))
        share = alpha / white
        expected = np.rint(share * expected + (1 - share) * 255).astype(int)
        samples = np.concatenate([samples, alpha], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        found = decoded(files.png(kind, depth, samples, *chunks))
    # A step of dark 8-bit samples is several levels of sRGB.
    dark_8_bit = white == 255 and "1" in name.split()[-1]
    assert np.abs(found.astype(int) - expected).max() <= (3 if dark_8_bit else 2)


@pytest.mark.parametrize(
    ("kind", "depth", "key"),
    [("grey", 1, 1), ("grey", 2, 2), ("grey", 4, 5), ("grey", 8, 77), ("grey", 16, 0x1234)],
)
def test_a_transparent_grey_is_compared_at_its_own_depth(kind, depth, key):
    samples = np.arange(64).reshape(8, 8, 1) * 7919 % (1 << depth)
    samples[0, :4] = key
    samples[0, 4] = key ^ 1
    trns = files.chunk(b"tRNS", key.to_bytes(2, "big"))
    with pytest.warns(ImageWarning, match="transparency"):
        found = decoded(files.png(kind, depth, samples, trns))
    keyed = samples[..., 0] == key
    assert (found[keyed] == 255).all()
    plain = decoded(files.png(kind, depth, samples))
    assert np.array_equal(found[~keyed], plain[~keyed])


def test_a_transparent_colour_is_compared_in_16_bits():
    samples = np.full((2, 2, 3), (0x1234, 0x5678, 0x9ABC))
    samples[0, 1, 2] ^= 1  # the upper bytes are equal
    samples[1, 1] = (0x0034, 0x0078, 0x00BC)  # the lower ones
    trns = files.chunk(b"tRNS", b"\x12\x34\x56\x78\x9a\xbc")
    with pytest.warns(ImageWarning, match="transparency"):
        found = decoded(files.png("rgb", 16, samples, trns))
    assert [(found[y, x] == 255).all() for y, x in np.ndindex(2, 2)] == [True, False, True, False]


@pytest.mark.parametrize("kind", ["rgb", "rgba", "grey alpha"])
def test_dark_colours_of_16_bits_keep_their_steps(kind):
    """In linear light, the first 8-bit step would be 13 levels of sRGB."""
    samples = (np.arange(192).reshape(8, 8, 3) * 6).astype(np.uint16)
    colours = samples[..., :1].repeat(3, -1) if kind == "grey alpha" else samples
    stored = samples[..., :1] if kind == "grey alpha" else samples
    if kind != "rgb":
        stored = np.concatenate([stored, np.full((8, 8, 1), 65535, np.uint16)], -1)
    found = decoded(files.png(kind, 16, stored, files.gama(1.0)))
    expected = oracle(colours, 65535, lambda v: v, REC709)
    assert np.abs(found.astype(int) - expected).max() <= 1
    plain = decoded(files.png(kind, 16, stored))
    assert np.array_equal(plain, np.rint(colours / 257))


def flattened(colours: np.ndarray, share: np.ndarray) -> np.ndarray:
    return share * colours + (1 - share) * 255


def drawn(*shape: int, below: int) -> np.ndarray:
    return np.random.default_rng(below).integers(0, below, shape)


GREY_TIFFS = [(bits, way) for bits in (1, 2, 4, 8, 12, 16) for way in (0, 1)]


# Pillow has no decoder for 12 bits with white as zero.
@pytest.mark.parametrize(("bits", "photometric"), [one for one in GREY_TIFFS if one != (12, 0)])
def test_tiff_grey_of_any_depth_and_direction(bits, photometric):
    white = (1 << bits) - 1
    samples = drawn(5, 7, 1, below=white + 1)
    expected = samples * 255 / white
    expected = 255 - expected if photometric == 0 else expected
    found = decoded(files.tiff(samples, bits, photometric))
    assert np.abs(found - expected).max() <= 1


def flat(*colour: int) -> np.ndarray:
    return np.full((4, 4, len(colour)), colour)


def jpeg_of_adobe_rgb(*colour: int) -> bytes:
    """A JPEG file whose Exif block says "uncalibrated", as cameras that follow DCF do."""
    exif, out = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    Image.new("RGB", (16, 16), colour).save(out, "JPEG", quality=100, exif=exif)
    return out.getvalue()


SWAPPED = (*D65, 0.30, 0.60, 0.64, 0.33, 0.15, 0.06)
KNOWN_COLOURS = {
    "12-bit white": (files.tiff(flat(4095), 12, 1), (255, 255, 255), 0),
    "12-bit grey": (files.tiff(flat(2048), 12, 1), (128, 128, 128), 0),
    "16-bit zero is white": (files.tiff(flat(0), 16, 0), (255, 255, 255), 0),
    "16-bit zero is white, black": (files.tiff(flat(65535), 16, 0), (0, 0, 0), 0),
    "gAMA 1": (files.png("grey", 8, flat(55), files.gama(1.0)), (128, 128, 128), 0),
    "gAMA and cHRM of P3": (
        files.png("rgb", 8, flat(200, 100, 50), files.gama(1 / 2.2), files.chrm(*P3)),
        (216, 92, 24),
        1,
    ),
    "cICP P3": (files.png("rgb", 8, flat(200, 100, 50), files.cicp(12, 13)), (215, 93, 31), 1),
    "Adobe RGB by Exif": (jpeg_of_adobe_rgb(59, 200, 60), (0, 201, 37), 1),
    "JPEG 2000, red and green swapped": (
        files.jpeg2000(
            Image.new("RGB", (32, 32), (200, 100, 50)), icc_profile(from_gamma(None, SWAPPED))
        ),
        (100, 200, 50),
        1,
    ),
}


@pytest.mark.parametrize("name", KNOWN_COLOURS)
def test_known_colours(name):
    """Values from outside the oracle, saturated ones among them."""
    data, expected, tolerance = KNOWN_COLOURS[name]
    assert np.abs(decoded(data).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_tiff_colours_and_alpha_of_both_depths(bits, extra):
    """The fourth sample is unspecified (0), an alpha of premultiplied colours (1) or of plain."""
    white = (1 << bits) - 1
    samples = drawn(5, 7, 4, below=white + 1)
    expected, share = samples[..., :3] * 255 / white, samples[..., 3:] / white
    if extra == 1:
        samples[..., :3] = np.rint(samples[..., :3] * share)
    tags = {} if extra is None else {"t338": [extra]}
    data = files.tiff(samples[..., : 3 if extra is None else 4], bits, 2, **tags)
    if extra in (1, 2):
        expected = flattened(expected, share)
        with pytest.warns(ImageWarning, match="transparency"):
            found = decoded(data)
    else:
        found = decoded(data)
    assert np.abs(found - np.rint(expected)).max() <= 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_palettes_of_any_depth(bits):
    palette, samples = drawn(3, 1 << bits, below=65536), drawn(5, 7, 1, below=1 << bits)
    found = decoded(files.tiff(samples, bits, 3, t320=palette.ravel().tolist()))
    assert np.abs(found - palette.T[samples[..., 0]] / 257).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_inks(bits):
    white = (1 << bits) - 1
    inks = drawn(5, 7, 4, below=white + 1)
    expected = (white - inks[..., :3]) / white * (white - inks[..., 3:]) / white * 255
    found = decoded(files.tiff(inks, bits, 5, t332=[1]))
    assert np.abs(found - expected).max() <= 2


def from_ycbcr(samples: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(samples.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    green = y - 0.344136 * cb - 0.714136 * cr
    return np.stack([y + 1.402 * cr, green, y + 1.772 * cb], -1).clip(0, 255)


def test_tiff_luma_and_chroma():
    samples = drawn(4, 8, 3, below=256)
    found = decoded(files.tiff(samples, 8, 6, t530=[1, 1]))
    assert np.abs(found - from_ycbcr(samples)).max() <= 1


def test_tiff_lab():
    """L is 0 to 100 in 8 bits, a and b are signed; the white is D50."""
    samples = np.array([[(128, 0, 0), (200, 20, 250), (60, 246, 15)]])
    expected = np.zeros(samples.shape)
    adapted = np.array(
        [
            [0.9555766, -0.0230393, 0.0631636],
            [-0.0282895, 1.0099416, 0.0210077],
            [0.0122982, -0.0204830, 1.3299098],
        ]
    )
    for x, (lightness, a, b) in enumerate(samples[0].tolist()):
        fy = (lightness / 2.55 + 16) / 116
        signed = [v - 256 if v > 127 else v for v in (a, b)]
        f = (fy + signed[0] / 500, fy, fy - signed[1] / 200)
        xyz = [v**3 if v > 6 / 29 else (v - 4 / 29) * 108 / 841 for v in f]
        light = np.linalg.inv(xyz_of(REC709)) @ adapted @ (np.array(xyz) * (0.9642, 1, 0.8249))
        expected[0, x] = [255 * srgb_code(v) for v in light]
    assert np.abs(decoded(files.tiff(samples, 8, 8)) - expected).max() <= 2


def ink_picture(samples: np.ndarray) -> np.ndarray:
    """What four inks of 0 (none) to 255 give on white paper."""
    return (255 - samples[..., :3]) * (255 - samples[..., 3:]) / 255


@pytest.mark.parametrize("mode", ["grey", "YCbCr", "RGB", "CMYK", "YCCK"])
def test_jpeg_components_mean_what_the_adobe_marker_says(mode):
    """Flat pictures, which a JPEG of quality 100 keeps within a level."""
    expected = np.full((16, 16, 3), (180, 90, 60))
    out = io.BytesIO()
    if mode == "grey":
        expected = np.full((16, 16, 3), 90)
        Image.fromarray(expected[..., 0].astype(np.uint8)).save(out, "JPEG", quality=100)
    elif mode in ("YCbCr", "RGB"):
        whole = Image.fromarray(expected.astype(np.uint8))
        whole.save(out, "JPEG", quality=100, subsampling=0, keep_rgb=mode == "RGB")
    else:
        stored = np.full((16, 16, 4), (40, 120, 160, 50), np.uint8)
        Image.fromarray(stored, "CMYK").save(out, "JPEG", quality=100)
        expected = ink_picture(stored.astype(float))
    data = out.getvalue()
    marker = b"\xff\xee\0\x0eAdobe"
    assert (marker in data) == (mode in ("RGB", "CMYK", "YCCK"))
    if mode == "YCCK":
        at = data.index(marker) + 4 + 11
        assert data[at] == 0
        data = data[:at] + b"\2" + data[at + 1 :]
        # As Adobe does, the file holds 255 minus each ink, and luma and chroma of 255 minus these.
        stored[..., :3] = np.rint(from_ycbcr(255.0 - stored[..., :3]))
        expected = ink_picture(stored.astype(float))
    assert np.abs(decoded(data) - expected).max() <= 2


def test_pages_thumbnails_and_frames_are_dropped_aloud():
    pages = [Image.new("L", (20, 10), level) for level in (40, 90, 200)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.warns(ImageWarning, match="3 frames or pages"):
        assert (decoded(out.getvalue()) == 40).all()
    thumb, whole = io.BytesIO(), Image.new("L", (64, 48), 120)
    small = Image.new("L", (8, 6), 10)
    whole.encoderinfo = {"tiffinfo": {254: 0}}
    small.save(thumb, "TIFF", tiffinfo={254: 1}, save_all=True, append_images=[whole])
    with pytest.warns(ImageWarning, match="2 frames"):
        found = decoded(thumb.getvalue())
    assert found.shape == (48, 64, 3) and (found == 120).all()
    gif = io.BytesIO()
    pages[0].save(gif, "GIF", save_all=True, append_images=pages[1:])
    with pytest.warns(ImageWarning, match="3 frames"):
        decoded(gif.getvalue())


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_a_file_of_several_frames_says_how_many(kind, tmp_path):
    """The file is closed when its frames are counted."""
    frames = [Image.new("L", (20, 10), level) for level in (255, 90, 10)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "a")
    with pytest.warns(ImageWarning, match="has 3 frames or pages; only one is stored"):
        assert (to_rgb(image) == 255).all()


def test_several_pictures_of_a_phone_in_a_file_are_read_as_one(tmp_path):
    frames = [Image.new("RGB", (16, 8), (level,) * 3) for level in (90, 10)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:], quality=100)
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    with pytest.warns(ImageWarning, match="has 2 frames"):
        assert (decoded((tmp_path / "a.jpg").read_bytes()) == 90).all()


def test_an_alpha_that_holds_nothing_is_ignored_where_it_is_often_unused():
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    used = image.copy()
    used.putpixel((7, 7), (0, 0, 0, 255))
    colour, white = (200, 100, 50), (255, 255, 255)
    for kind, picture, pixel in (
        *(("TGA", image, colour), ("SGI", image, colour), ("PNG", image, white)),
        *(("TGA", used, white), ("SGI", used, white)),
    ):
        out = io.BytesIO()
        picture.save(out, kind)
        with pytest.warns(ImageWarning, match="unused" if pixel == colour else "flattened"):
            assert tuple(decoded(out.getvalue())[0, 0]) == pixel


def test_an_embedded_profile_of_bmp_is_applied():
    linear = icc_profile(ColourSpace(SRGB.chromaticities, (1.0,)))
    assert (decoded(files.bmp((128, 128, 128), b"MBED", b"", linear)) == 188).all()
    assert (decoded(files.bmp((128, 128, 128), b"sRGB", b"", linear)) == 128).all()
    with pytest.warns(ImageWarning, match="unsuitable colour profile"):
        assert (decoded(files.bmp((128, 128, 128), b"MBED", b"", linear[:60])) == 128).all()


def test_declarations_that_are_not_applied_are_said():
    gammas = bytes(36) + struct.pack("<III", 1 << 16, 1 << 16, 1 << 16)
    samples = np.full((2, 2, 3), 128)
    linear = np.linspace(0, 65535, 256).astype(int).tolist()
    for data, name in (
        (files.bmp((128, 128, 128), bytes(4), gammas), "calibrated RGB space"),
        (files.bmp((128, 128, 128), b"LINK", b"", b"a.icc"), "linked colour profile"),
        (files.tiff(samples, 8, 2, t301=linear), "transfer function"),
    ):
        with pytest.warns(ImageWarning, match=f"^the picture's {name} is not applied$"):
            assert (decoded(data) == 128).all()
    assert (decoded(files.bmp((128, 128, 128), bytes(4), b"")) == 128).all()


def test_chromaticities_of_tiff_are_those_of_png():
    samples = swatches(8, 3)
    expected = oracle(samples, 255, srgb_light, P3)
    for white in ({318: P3[:2]}, {}):
        out = io.BytesIO()
        Image.fromarray(samples.astype(np.uint8)).save(out, "TIFF", tiffinfo={**white, 319: P3[2:]})
        found = decoded(out.getvalue()).astype(int)
        assert np.abs(found - expected).max() <= 1
    grey = io.BytesIO()
    Image.new("L", (2, 2), 128).save(grey, "TIFF", tiffinfo={319: P3[2:]})
    assert (decoded(grey.getvalue()) == 128).all()


@pytest.mark.parametrize(("primaries", "transfer"), [(12, 13), (9, 8), (2, 2)])
def test_avif_code_points_are_heeded(primaries, transfer):
    image = Image.new("RGB", (16, 16), (150, 110, 100))
    space = from_cicp(primaries, transfer)
    light = (lambda v: v) if transfer == 8 else srgb_light
    expected = oracle(np.array([[(150, 110, 100)]]), 255, light, space.chromaticities)[0, 0]
    found = decoded(files.avif(image, primaries, transfer))[8, 8]
    assert np.abs(found.astype(int) - expected).max() <= 3  # the codec is lossy


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_refused_with_the_reason(transfer):
    image = Image.new("RGB", (16, 16), "grey")
    for data in (
        files.avif(image, 9, transfer),
        files.png("rgb", 8, swatches(8, 3), files.cicp(9, transfer)),
    ):
        with pytest.raises(ValueError, match=r"high dynamic range \((PQ|HLG)\)"):
            decoded(data)


def test_jpeg2000_profiles_are_heeded():
    profile = icc_profile(from_cicp(12, 13))
    image = Image.new("RGB", (32, 32), (150, 110, 100))
    found = decoded(files.jpeg2000(image, profile))[16, 16]
    expected = oracle(np.array([[(150, 110, 100)]]), 255, srgb_light, P3)[0, 0]
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("space", "index", "adobe"),
    [
        *((1, "", False), (2, "", True), (0xFFFF, "", True), (0xFFFF, "R03", True)),
        *((0xFFFF, "R98", False), (None, "R03", True), (None, "R98", False)),
    ],
)
def test_exif_may_say_adobe_rgb(space, index, adobe):
    image = Image.new("RGB", (16, 16), (150, 110, 100))
    exif = Image.Exif()
    told = {0xA001: space, 0xA005: {1: index} if index else None}
    exif.get_ifd(0x8769).update({tag: value for tag, value in told.items() if value})
    out = io.BytesIO()
    image.save(out, "JPEG", quality=100, exif=exif)
    expected = (150, 110, 100)
    if adobe:
        expected = oracle(np.array([[expected]]), 255, lambda v: v ** (563 / 256), ADOBE)[0, 0]
    assert np.abs(decoded(out.getvalue())[8, 8].astype(int) - expected).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    out = io.BytesIO()
    image.save(out, "JPEG", quality=100, exif=exif, icc_profile=srgb)
    assert np.abs(decoded(out.getvalue())[8, 8].astype(int) - (150, 110, 100)).max() <= 2


@pytest.mark.parametrize(
    "chunks",
    [
        (files.chrm(*D65, 0.3, 0, 0.3, 0.6, 0.15, 0.06),),
        (files.chrm(*D65, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3),),
        (files.cicp(200, 13),),
        (files.cicp(1, 200),),
    ],
)
def test_impossible_declarations_are_refused(chunks):
    with pytest.raises(ValueError, match=r"impossible chromaticities|does not know"):
        decoded(files.png("rgb", 8, swatches(8, 3), *chunks))


CODE_POINTS = {
    1: (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: BT2020,
    11: (0.314, 0.351, *P3[2:]),
    12: P3,
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
"""Primaries of table 2 of H.273: white, red, green and blue."""


def broadcast_light(value: float) -> float:
    """The inverse of the transfer of BT.709, 601 and 2020."""
    return value / 4.5 if value < 4.5 * 0.018 else ((value + 0.099) / 1.099) ** (1 / 0.45)


def test_code_points_mean_what_h273_says():
    for primaries in range(256):
        if primaries in CODE_POINTS:
            found = from_cicp(primaries, 13).chromaticities
            np.testing.assert_allclose(found, CODE_POINTS[primaries], atol=1e-9)
        elif primaries != 2:
            with pytest.raises(ValueError, match=f"primaries {primaries} "):
                from_cicp(primaries, 13)
    lights = {
        **dict.fromkeys((1, 6, 14, 15), broadcast_light),
        13: srgb_light,
        4: lambda v: v**2.2,
        5: lambda v: v**2.8,
        8: lambda v: v,
    }
    samples = np.linspace(0, 1, 101)[:, None, None]
    for transfer in set(range(256)) - {2, 16, 18}:
        if transfer not in lights:
            with pytest.raises(ValueError, match=f"transfer {transfer} "):
                from_cicp(1, transfer)
            continue
        light = np.array([lights[transfer](v) for v in samples.ravel()])
        exact = np.array([255 * srgb_code(v) for v in light])
        found = to_srgb_levels(samples, from_cicp(1, transfer).curve).ravel()
        assert np.abs(found - exact).max() <= 0.6


def test_white_of_any_temperature_stays_white():
    for primaries in CODE_POINTS:
        picture = files.png("rgb", 8, flat(255, 255, 255), files.cicp(primaries, 13))
        assert decoded(picture).min() >= 254


@pytest.mark.parametrize("gamma", [0.005, 20])
def test_a_gamma_out_of_any_use_is_refused(gamma):
    with pytest.raises(ValueError, match="a gamma of"):
        decoded(files.png("grey", 8, flat(9), files.gama(gamma)))


def test_profiles_of_spaces_are_the_identity_for_srgb():
    image = Image.fromarray(swatches(8, 3).astype(np.uint8))
    made = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile(SRGB)))
    back = ImageCms.profileToProfile(image, made, ImageCms.createProfile("sRGB"))
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image)).max() <= 1


# Opening -----------------------------------------------------------------------------------------


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{ } loop\n"


def test_no_interpreter_reads_a_picture(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match="not a picture in a format that percov2 reads"):
        decoded(POSTSCRIPT)
    with Image.open(path) as lazy, pytest.raises(ValueError, match="format EPS is not read"):
        to_rgb(lazy)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "JPEG2000", "BMP"])
def test_a_damaged_lazy_picture_is_refused_as_a_file_is(kind, tmp_path):
    path, out = tmp_path / "cut", io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(out, kind)
    path.write_bytes(out.getvalue()[: len(out.getvalue()) // 2])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match=r"truncated|not a picture"):
        decoded(path.read_bytes())
    try:
        lazy = Image.open(path)
    except OSError:
        return  # Pillow itself refuses to open it
    with lazy, pytest.raises(ValueError, match="truncated, damaged or closed"):
        to_rgb(lazy)


def test_a_closed_picture_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ValueError, match="closed"):
        to_rgb(image)


def test_warnings_as_errors_are_one_exception():
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageWarning, match="transparency"):
            to_rgb(image)


def heic(colour: tuple[int, int, int], **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    picture = pillow_heif.from_pillow(Image.new("RGB", (64, 48), colour))
    picture.save(out, quality=-1, chroma=444, matrix_coefficients=0, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("primaries", "transfer", "expected"),
    [(1, 13, (200, 100, 50)), (12, 13, (215, 93, 31)), (2, 2, (200, 100, 50))],
)
def test_heic_code_points_are_heeded(primaries, transfer, expected):
    data = heic((200, 100, 50), color_primaries=primaries, transfer_characteristics=transfer)
    found = decoded(data)
    assert found.shape == (48, 64, 3)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_heic_of_high_dynamic_range_is_refused():
    with pytest.raises(ValueError, match="high dynamic range"):
        decoded(heic((148, 148, 148), color_primaries=9, transfer_characteristics=16))


def test_heic_names_its_extra(monkeypatch):
    data = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)
    monkeypatch.setattr("percov2.images.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs pillow-heif: pip install 'percov2\[heif\]'"):
        decode_image(io.BytesIO(data))
