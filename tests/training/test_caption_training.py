"""The captions phase on a few lines: reading, holding out, training and writing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from percov2.container.caption_model import END, MAX_PIECES, Alphabet, CaptionModel
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.transformer_config import TransformerConfig
from percov2.training.captions import (
    CaptionLines,
    CaptionsConfig,
    CaptionStage,
    is_held_out,
    learn_pieces,
    measure,
    read_lines,
    train_captions,
)
from percov2.training.loop import LoopConfig
from percov2.training.stage import Place
from tools.executors import same
from tools.photos import write_tar

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "orange"]
THINGS = ["door", "car", "house", "dog", "boat", "flower", "train", "kite", "plate", "horse"]
LINES = [
    f"A {colour} {thing} stands {place} the old {other}."
    for colour in COLOURS
    for thing in THINGS
    for place, other in (("near", "bridge"), ("behind", "tree"))
]
MODEL = {"dim": 16, "heads": 2, "head_dim": 8, "layers": 1, "hidden": 16}


def test_lines_of_texts_and_shards(tmp_path):
    (tmp_path / "a.txt").write_text("One  line\n\n another \n", encoding="utf-8")
    shard = {"x.txt": "Zürich\nzwei\n".encode(), "x.webp": b"\xff"}
    lines = read_lines([tmp_path / "a.txt", write_tar(tmp_path / "b.tar", shard)])
    assert lines == ["One  line", "another", "Zürich", "zwei"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no captions in"):
        read_lines([tmp_path / "empty.txt"])


@pytest.mark.parametrize("content", [b"", b"no tar file" * 99, b"PK\3\4zip", b"\x1f\x8bgzip"])
def test_damaged_shards_of_captions_are_refused(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is no tar file of UTF-8 text, or is damaged"):
        read_lines([tmp_path / "a.tar"])


def test_captions_that_cannot_serve_are_refused_before_training(tmp_path):
    (tmp_path / "odd.txt").write_text("a red door\na blue\x7f door\n")
    with pytest.raises(ValueError, match=r"'a blue\\x7f door': a caption cannot hold the control"):
        read_lines([tmp_path / "odd.txt"])
    alphabet = Alphabet(learn_pieces(LINES, 60))
    for held_out in (False, True):
        lines = [line for line in LINES if is_held_out(line) == held_out]
        with pytest.raises(ValueError, match="both held-out and other captions are needed"):
            CaptionLines(lines, alphabet)


def test_captions_of_too_many_pieces_are_left_out_of_the_figures():
    model = CaptionModel(
        Alphabet([]), IntTransformer.random(TransformerConfig(codebook_size=257, **MODEL), seed=0)
    )
    words = [[f"{'x' * n}{i}" for i in range(9)] for n in (3, 30)]
    short, long = ([" ".join([*w, str(i)]) for i in range(200)] for w in words)
    held = [line for line in short if is_held_out(line)]
    assert any(is_held_out(line) for line in long)
    figures = measure(model, short + long)
    assert figures["captions"] == len(held) > 0 and np.isfinite(figures["bytes"])


def test_one_line_in_twenty_is_held_out_however_it_is_written():
    lines = [f"caption number {i}" for i in range(4000)]
    held = [line for line in lines if is_held_out(line)]
    assert 150 < len(held) < 250
    assert all(is_held_out(f"  {line.upper()} ") for line in held)


def test_pieces_are_words_with_their_space_and_rarer_ones_in_parts():
    pieces = learn_pieces(LINES, 60)
    assert len(pieces) == len(set(pieces)) <= 60
    alphabet = Alphabet(pieces)
    assert b" stands" in pieces
    assert len(alphabet.split(LINES[0])) < len(LINES[0].split()) + 4
    assert all(b" " not in piece[1:] for piece in pieces)


def test_batches_hold_whole_captions_of_training_lines_only():
    data = CaptionLines(LINES, Alphabet(learn_pieces(LINES, 60)))
    batch = data.draw(np.random.default_rng(0), 8)
    assert batch.tokens.shape[:2] == (8, 1)
    for row in batch.tokens[:, 0].tolist():
        text = data.alphabet.join(row[: row.index(END)]).decode()
        assert text in LINES
        assert not is_held_out(text)
        assert set(row[row.index(END) :]) == {END}
    halves = [
        data.draw(np.random.default_rng(0), 8, Place(torch.device("cpu"), i, 2)).tokens
        for i in range(2)
    ]
    assert same(torch.stack(halves, 1).flatten(0, 1), batch.tokens)


def test_loss_counts_pieces_up_to_the_end():
    data = CaptionLines(LINES, Alphabet(learn_pieces(LINES, 60)))
    stage = CaptionStage(CaptionsConfig(model=MODEL, pieces=60), data)
    lines = data.held_out[:3]
    bits, coded = stage._bits(data.batch(lines, max(map(len, lines))))
    assert int(coded) == sum(map(len, lines))
    wider, same = stage._bits(data.batch(lines, MAX_PIECES))
    assert int(same) == int(coded)
    assert wider.item() == pytest.approx(bits.item(), rel=1e-4)


def test_a_run_learns_resumes_and_writes_a_model(tmp_path):
    source = tmp_path / "lines.txt"
    source.write_text("\n".join(LINES), encoding="utf-8")
    config = CaptionsConfig(model=MODEL, pieces=60, captions_per_step=32)
    loop = LoopConfig(steps=120, learning_rate=1e-2, warmup=5, ema=0.9)
    out = tmp_path / "run"
    assert train_captions(config, loop, [source], out, minutes=0) is None
    report = train_captions(config, loop, [source], out)
    assert report == json.loads((out / "report.json").read_text())
    figures = report["texts"]["lines.txt"]
    held = [line for line in LINES if is_held_out(line)]
    assert figures["captions"] == len(held) > 3
    # Colour, thing and place are 7.6 bits, all else is certain.
    assert figures["bytes"] < 3 < figures["deflate_bytes"] < figures["raw_bytes"]
    model = CaptionModel.load(out / "captions")
    assert report["fingerprint"] == model.fingerprint().hex()
    mean = float(np.mean([model.bits(line) for line in held])) / 8
    assert mean == pytest.approx(figures["bytes"])
