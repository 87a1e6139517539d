"""Measure the cost of held-out captions: caption model, deflate, raw bytes and a word trigram.

python benchmarks/captions.py --texts LINES.txt SHARD.tar … [--model FOLDER] [--quick]

Every twentieth line, by a hash of its text, is held out of training and measured here. Each caption
is coded and read back. The trigram is an interpolated model of lower-case words (Witten and Bell
1991) that spells unknown words with fixed probabilities of letters. Its cost is in ideal bits, a
bound that files do not reach.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from percov2.codec import CAPTIONS
from percov2.container.caption_model import CaptionModel
from percov2.container.captions import encode_caption
from percov2.entropy.rans import RansEncoder
from percov2.training.captions import WORDS, is_held_out, read_lines

UNKNOWN, END = "<unknown>", "<end>"


class Trigram:
    """Interpolated word trigram with Witten-Bell weights."""

    def __init__(self, lines: Iterable[str]) -> None:
        sentences = [line.lower().split() for line in lines]
        known = Counter(word for words in sentences for word in words)
        self.vocabulary = {word for word, count in known.items() if count > 1} | {END, UNKNOWN}
        self.letters = Counter(letter for word in known for letter in word + " ")
        self.counts: dict[tuple[str, ...], Counter[str]] = {}
        for words in sentences:
            for context, word in self._steps(words):
                for begin in range(3):
                    self.counts.setdefault(context[begin:], Counter())[word] += 1

    def _steps(self, words: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
        kept = [word if word in self.vocabulary else UNKNOWN for word in words]
        padded = ["", "", *kept, END]
        return [((padded[i - 2], padded[i - 1]), padded[i]) for i in range(2, len(padded))]

    def _probability(self, context: tuple[str, ...], word: str) -> float:
        below = self._probability(context[1:], word) if context else 1 / len(self.vocabulary)
        seen = self.counts.get(context)
        if not seen:
            return below
        total, kinds = seen.total(), len(seen)
        return (seen[word] + kinds * below) / (total + kinds)

    def bits(self, line: str) -> float:
        """Return the ideal bits of a caption in lower case, with single spaces."""
        words = line.lower().split()
        bits = -sum(math.log2(self._probability(*step)) for step in self._steps(words))
        total = self.letters.total() + 256
        for word in words:
            if word not in self.vocabulary:
                bits -= sum(math.log2((self.letters[x] + 1) / total) for x in word + " ")
        return bits


def coded_bytes(model: CaptionModel, lines: Sequence[str]) -> list[float]:
    """Return the bytes of captions, each coded and read back on its own rANS stream.

    The start state of the stream does not count.
    """
    sizes = []
    for line in lines:
        intervals = model.intervals(line)
        if intervals is None:
            sizes.append(float(len(encode_caption(line)[1])))
            continue
        encoder = RansEncoder([0x5A5A])
        starts, freqs = (np.ascontiguousarray(column) for column in intervals.T)
        encoder.encode(starts, freqs, [len(intervals)], model.prob_bits)
        buffer, _ = encoder.finish()
        data = buffer.tobytes()
        state, position = 0, 0
        while state < 1 << 23 and position < len(data):
            state, position = state << 8 | data[position], position + 1
        (read,) = model.read([(data, state, position)])
        if read.text != line.encode():
            raise AssertionError(f"{line!r} was decoded as {read.text!r}")
        sizes.append(len(data) - 2.0)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_ = ".txt files with a caption per line, or shards with such members"
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help=help_)
    help_ = "folder of the caption model (default: the embedded one)"
    parser.add_argument("--model", type=Path, default=CAPTIONS, help=help_)
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="measure 50 captions per file")
    arguments = parser.parse_args()
    model = CaptionModel.load(arguments.model)
    files = {text.name: read_lines([text]) for text in arguments.texts}
    trigram = Trigram(x for lines in files.values() for x in lines if not is_held_out(x))
    report = {}
    for name, lines in files.items():
        chosen = [x for x in lines if is_held_out(x) and len(x.split()) in WORDS]
        chosen = chosen[:50] if arguments.quick else chosen
        if not chosen:
            continue
        started = time.perf_counter()
        sizes = coded_bytes(model, chosen)
        seconds = time.perf_counter() - started
        report[name] = {
            "captions": len(chosen),
            "model": float(np.mean(sizes)),
            "model_ideal": float(np.mean([model.bits(x) for x in chosen])) / 8,
            "deflate": float(np.mean([len(encode_caption(x)[1]) for x in chosen])),
            "raw": float(np.mean([len(x.encode()) for x in chosen])),
            "trigram_lower_case": float(np.mean([trigram.bits(x) for x in chosen])) / 8,
            "milliseconds": 1000 * seconds / len(chosen),
        }
        print(name, json.dumps(report[name]))
    if not report:
        raise ValueError("no held-out captions of 8 to 14 words in these files")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
