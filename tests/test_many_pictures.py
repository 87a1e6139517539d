"""Iterables of pictures and files through a codec: captions, limits and numbers."""

from __future__ import annotations

import pytest
from PIL import Image

from tools.photos import noise


def pictures(*widths: int) -> list[Image.Image]:
    return [noise(width, 20) for width in widths]


def test_captions_are_one_for_all_one_for_each_or_made_from_batches(codec):
    images = pictures(30, 31, 32)
    expected = codec.compress(images, caption=["a", "b", "c"])
    each = codec.compress_many(images, caption=iter("abc"), jobs=2)
    assert [one.get() for one in each] == expected
    one = codec.compress_many(images, caption="d", jobs=1, batch_size=2)
    assert [one.get() for one in one] == codec.compress(images, caption=["d"] * 3)
    batches = []

    def described(batch: list[Image.Image]) -> list[str]:
        batches.append([image.width for image in batch])
        return ["abc"[image.width - 30] for image in batch]

    made = codec.compress_many(images, caption=described, jobs=1, batch_size=2)
    assert [one.get() for one in made] == expected and batches == [[30, 31], [32]]
    for wrong in ("ab", "abcd"):
        with pytest.raises(ValueError, match="zip"):
            list(codec.compress_many(images, caption=iter(wrong)))


def test_pictures_and_files_over_the_limit_are_refused_alone(codec):
    images = pictures(30, 90)
    small, large = codec.compress_many(images, max_pixels=800)
    assert small.error is None and "the limit of 800" in str(large.error)
    files = codec.compress(images)
    small, large = codec.decompress_many(files, max_pixels=800)
    assert small.error is None and "the limit of 800" in str(large.error)
    assert large.input == files[1]


@pytest.mark.parametrize("wrong", [0, -1, 1025, True, 1.5, "2"])
def test_numbers_of_jobs_and_pictures_are_checked(codec, wrong):
    for numbers in ({"jobs": wrong}, {"batch_size": wrong}):
        (name,) = numbers
        with pytest.raises(ValueError, match=f"{name} is .*a whole number from 1 to 1024"):
            codec.compress_many([], **numbers)
