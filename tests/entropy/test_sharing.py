"""Objects that threads share, and objects that are copied or pickled."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from percov2.entropy import (
    IntTransformer,
    RansDecoder,
    RansEncoder,
    StagedDecoder,
    SymbolDecoder,
    SymbolEncoder,
    TokenCoder,
    TransformerConfig,
    stages,
)
from tools.executors import coder_of, model_on

SMALL = TransformerConfig(codebook_size=16, dim=8, heads=2, head_dim=4, layers=1, hidden=8)
TOKENS = np.random.default_rng(2).integers(0, 16, (2, 4, 6), np.int32)


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.random(SMALL, seed=0))


def same(one: tuple, other: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("executor", ["cpu", "torch"])
@pytest.mark.parametrize(
    "travel", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_models_and_token_coders_can_be_copied_and_pickled(coder, executor, travel) -> None:
    model = model_on(executor, SMALL, coder.model.tensors)
    other = travel(model)
    assert type(other) is type(model) and other.executor_name == model.executor_name
    assert other.fingerprint() == model.fingerprint()
    arrived = travel(coder_of(model))
    assert arrived.coder_name == "cpu"
    expected = coder.intervals(TOKENS, "qlds8")
    assert same(arrived.intervals(TOKENS, "qlds8"), expected)


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, pickle.dumps])
def test_coders_in_the_middle_of_streams_are_not_copied(coder, travel) -> None:
    for one in (
        RansEncoder([1]),
        RansDecoder(b"ab", [0, 2]),
        SymbolEncoder(1),
        SymbolDecoder([b"ab"]),
        StagedDecoder(coder.model, stages("var", 2, 2), 1),
    ):
        with pytest.raises(TypeError, match=f"{type(one).__name__} is in the middle of its stream"):
            travel(one)


def test_threads_that_share_an_encoder_or_a_decoder_take_turns() -> None:
    """The symbols of all threads are in the stream in the order of its own check."""
    row = np.zeros((1, 1, 256), np.int16)
    steps, workers = 300, 4
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            encoder, ready = SymbolEncoder(1), threading.Barrier(workers)

            def write(one: int, encoder=encoder, ready=ready) -> None:
                ready.wait()
                for i in range(steps):
                    encoder.encode(row, [[(one * steps + i) % 256]])

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(write, range(workers)))
            decoder = SymbolDecoder(encoder.finish())

            def read(_: int, decoder=decoder, ready=ready) -> list[int]:
                ready.wait()
                return [int(decoder.decode(row)[0, 0]) for _ in range(steps)]

            with ThreadPoolExecutor(workers) as pool:
                found = [one for each in pool.map(read, range(workers)) for one in each]
            decoder.finish()
            wanted = [i % 256 for i in range(workers * steps)]
            assert sorted(found) == sorted(wanted)
    finally:
        sys.setswitchinterval(switch)


def test_one_stage_takes_the_tokens_of_one_thread(coder, monkeypatch) -> None:
    model = IntTransformer(SMALL, coder.model.tensors)
    staged, place = StagedDecoder(model, np.array([[1, 2]]), 1), model.place
    monkeypatch.setattr(model, "place", lambda tokens: (time.sleep(0.1), place(tokens))[1])
    staged.logits()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(staged.accept, np.zeros((1, 1), np.int32)) for _ in range(2)]
    errors = [call.exception() for call in calls]
    assert sorted(str(error)[:13] for error in errors) == ["None", "call logits()"]
    assert staged.remaining == 1
