"""Drawn tokens: equal to the oracle's, and distributed as the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import independent_model as reference
from percov2.entropy import cdf, sampling
from percov2.entropy.torch import sampling as on_device


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_gives_the_known_answers_of_random123(counter, key, expected) -> None:
    assert reference.philox(counter, key) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))
@example(0, 0)
def test_philox_is_the_oracles(key: int, counter: int) -> None:
    found = sampling.philox(key, np.array([counter], dtype=np.int64))[0].tolist()
    words = (counter % 2**32, counter // 2**32, 0, 0), (key % 2**32, key // 2**32)
    assert tuple(found) == reference.philox(*words)


@settings(max_examples=60)
@given(
    st.integers(2, 40),
    st.integers(0, sampling.MAX_SEED),
    st.integers(0, 2**24),
    st.integers(0, 2**32),
    st.sampled_from([8, 300, 3000, 32767]),
)
def test_draws_are_the_oracles(size: int, seed: int, place: int, data: int, spread: int) -> None:
    generator = np.random.default_rng(data)
    logits = generator.integers(-spread, spread + 1, (2, 3, size), dtype=np.int16)
    places = np.array([place, 0, place + 1], dtype=np.int64)
    drawn = sampling.draw(logits, places, seed)
    assert drawn.dtype == np.int32
    there = on_device.draw(torch.from_numpy(logits), places, seed)
    assert there.dtype == torch.int32 and np.array_equal(there.numpy(), drawn)
    for row, found in zip(logits, drawn.tolist(), strict=True):
        assert found == [
            reference.draw(one.tolist(), seed, int(at)) for one, at in zip(row, places, strict=True)
        ]


def test_the_largest_codebook_needs_every_bit_of_the_product() -> None:
    logits = np.zeros((1, 64, cdf.MAX_CODEBOOK), np.int16)
    drawn = sampling.draw(logits, np.arange(64), seed=9)[0].tolist()
    expected = [reference.draw([0] * cdf.MAX_CODEBOOK, 9, place) for place in range(64)]
    assert drawn == expected
    assert on_device.draw(torch.from_numpy(logits), np.arange(64), 9)[0].tolist() == expected
    assert max(drawn) > 2**12  # the whole codebook is in reach


def test_a_target_on_a_bound_belongs_to_the_symbol_above() -> None:
    logits = np.zeros((1, 1, 2), np.int16)
    half = np.array([[1 << 31, 0, 0, 0]], np.uint32)  # half of the total: the first symbol's bound
    below = np.array([[(1 << 31) - 1, (1 << 32) - 1, 0, 0]], np.uint32)
    for words, token in ((half, 1), (below, 0)):
        assert sampling._drawn(logits, words).tolist() == [[token]]
        assert on_device._drawn(torch.from_numpy(logits), words).tolist() == [[token]]


def test_draws_follow_the_sharpened_distribution() -> None:
    count = 40_000
    logits = np.tile(np.array([0, -256, -512, -4000], np.int16), (1, count, 1))
    drawn = sampling.draw(logits, np.arange(count), seed=3)
    weights = 2.0 ** (-np.array([0.0, 1.0, 2.0]) * sampling.SHARPNESS / 256)
    shares = np.bincount(drawn[0], minlength=4) / count
    assert shares[3] == 0  # 2^-15 of the largest is below the floor of 2^-10
    # Five standard deviations of a share, at most sqrt(1/4 / count).
    assert np.abs(shares[:3] - weights / weights.sum()).max() < 2.5 / count**0.5


def test_places_of_a_batch_draw_alike_and_seeds_differ() -> None:
    logits = np.zeros((2, 50, 64), np.int16)
    first = sampling.draw(logits, np.arange(50), seed=1)
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(
        sampling.draw(logits[:1, 10:20], np.arange(10, 20), 1)[0], first[0, 10:20]
    )
    assert not np.array_equal(sampling.draw(logits, np.arange(50), seed=2), first)


def test_draws_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).integers(-900, 900, (3, 50, 16), np.int16)
    whole = sampling.draw(logits, np.arange(50), seed=1)
    for at_once in (1, 7 * 3 * 16):
        monkeypatch.setattr(sampling, "AT_ONCE", at_once)
        assert np.array_equal(sampling.draw(logits, np.arange(50), seed=1), whole)
    assert sampling.draw(logits[:, :0], np.arange(0), seed=1).shape == (3, 0)


def test_wrong_arguments_are_refused() -> None:
    logits = np.zeros((1, 2, 2), np.int16)
    for call, message in (
        (lambda: sampling.draw(logits, np.arange(2), -1), "seed of a draw"),
        (lambda: sampling.draw(logits, np.arange(2), sampling.MAX_SEED + 1), "seed of a draw"),
        (lambda: sampling.draw(logits, np.arange(3), 0), r"must be \[B, n, V\] for \[n\]"),
        (lambda: sampling.philox(2**64, np.arange(1)), "key"),
        (lambda: sampling.philox(0, np.array([-1])), "counter"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
