"""Training of the caption model: an alphabet of pieces, and a transformer on captions.

A caption is a grid of one row with one piece per stage (``container.caption_model``). A hash of the
text decides whether a line is held out, so every run and every file gives the same answer.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from percov2.container.caption_model import END, MAX_PIECES, Alphabet, CaptionModel
from percov2.datasets.shards import SHARDS, open_shard
from percov2.entropy.schedule import stages
from percov2.entropy.torch.transformer import Crop, TokenBatch, crop_batch
from percov2.entropy.visibility import size_class
from percov2.stored_files import read_regular
from percov2.training.loop import LoopConfig
from percov2.training.ranges import check_ranges
from percov2.training.stage import ALONE, Figures, Place
from percov2.training.stage2 import RoundedStage, trained_model

__all__ = ["WORDS", "CaptionLines", "CaptionStage", "CaptionsConfig", "is_held_out"]
__all__ += ["learn_pieces", "measure", "read_lines", "train_captions"]

_HELD_OUT_EVERY = 20
_MOST_TEXT_BYTES = 1 << 32
_WIDTH_STEP = 4
"""Captions share a batch if their lengths round up to the same multiple of this number."""
WORDS = range(8, 15)
"""Lengths in words of the captions in the report."""
_SPACE = "\u2581"
"""The character that replaces a space while pieces are learned."""


@dataclass(frozen=True)
class CaptionsConfig:
    """Configuration of the captions phase; ValueError for a number outside its range."""

    model: dict  # sizes of the transformer (``TransformerConfig`` without codebook_size)
    pieces: int = 3839  # learned pieces, without the end and the single bytes
    captions_per_step: int = 256  # captions in a batch, over all processes
    round_from: float = 0.7  # share of the steps before rounding starts
    observe_until: float = 0.9  # share of the steps before the scales are fixed

    def __post_init__(self) -> None:
        check_ranges(self, pieces=(1, 1 << 16), captions_per_step=(1, 1 << 24))
        check_ranges(self, round_from=(0, 1), observe_until=(0, 1))


def is_held_out(line: str) -> bool:
    """Return True for one caption in 20, chosen by a hash of its words.

    These captions are never trained on.
    """
    digest = hashlib.sha256(" ".join(line.lower().split()).encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_EVERY == 0


def read_lines(sources: Sequence[Path]) -> list[str]:
    """Return the captions of ``.txt`` files (one per line) or ``.tar`` shards of such files.

    Raises:
        ValueError: a file is damaged or no text, there are no captions, or no ``.pcv2`` file can
            hold one of them.
    """
    from percov2.container.captions import encode_caption

    def is_shard(source: Path) -> bool:
        return source.name.lower().endswith(SHARDS)

    def texts(source: Path) -> Iterator[bytes]:
        if not is_shard(source):
            yield read_regular(source, _MOST_TEXT_BYTES)
            return
        with open_shard(source) as tar:
            members = [m for m in tar if m.isfile() and m.name.endswith(".txt")]
            yield from (file.read() for m in members if (file := tar.extractfile(m)))

    found = []
    for source in sources:
        try:
            for text in texts(source):
                found += [line.strip() for line in text.decode().splitlines()]
        except (tarfile.TarError, EOFError, UnicodeDecodeError, zlib.error) as error:
            kind = "tar file" if is_shard(source) else "file"
            raise ValueError(f"{source} is no {kind} of UTF-8 text, or is damaged") from error
    lines = [line for line in found if line]
    if not lines:
        raise ValueError(f"no captions in {[str(source) for source in sources]}")
    for line in lines:
        try:
            encode_caption(line)
        except ValueError as error:
            raise ValueError(f"{line[:60]!r}: {error}") from None
    return lines


def learn_pieces(lines: Sequence[str], count: int) -> list[bytes]:
    """Learn the pieces of an alphabet by byte-pair merges within words.

    A word includes the space before it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    spaces = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")
    words = [spaces, pre_tokenizers.Punctuation("isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    size = count + len({letter for line in lines for letter in line}) + 1
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=3, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece.replace(_SPACE, " ").encode("utf-8") for piece, _ in ranked]
    return [piece for piece in pieces if 2 <= len(piece) <= 32][:count]


class CaptionLines:
    """Captions that are split into pieces.

    Attributes:
        held_out: pieces of the held-out captions.

    Raises:
        ValueError: all captions are held out, or none is.
    """

    def __init__(self, lines: Sequence[str], alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.held_out: list[list[int]] = []
        self._by_width: dict[int, list[list[int]]] = {}
        for line in tqdm(lines, desc="splitting captions", unit="caption"):
            pieces = [*alphabet.split(line), END]
            if len(pieces) > MAX_PIECES:
                continue
            if is_held_out(line):
                self.held_out.append(pieces)
            else:
                width = -(-len(pieces) // _WIDTH_STEP) * _WIDTH_STEP
                self._by_width.setdefault(width, []).append(pieces)
        if not self._by_width or not self.held_out:
            raise ValueError(
                f"of {len(lines)} captions, {len(self.held_out)} are held out by their hash; both "
                "held-out and other captions are needed: give more captions"
            )
        self._widths = sorted(self._by_width)
        sizes = np.array([len(self._by_width[w]) for w in self._widths], dtype=np.float64)
        self._shares = sizes / sizes.sum()
        self.stages = stages("raster", 1, MAX_PIECES)

    def counts(self) -> NDArray[np.int64]:
        """Return the number of times that each piece occurs in training, int64 [pieces]."""
        every = [piece for group in self._by_width.values() for line in group for piece in line]
        return np.bincount(every, minlength=len(self.alphabet))

    def draw(self, generator: np.random.Generator, count: int, place: Place = ALONE) -> TokenBatch:
        """Draw ``count`` captions of about the same length. Return this process's part."""
        width = self._widths[int(generator.choice(len(self._widths), p=self._shares))]
        group = self._by_width[width]
        picks = generator.integers(len(group), size=count + -count % place.processes)
        return self.batch([group[pick] for pick in picks[place.process :: place.processes]], width)

    def batch(self, lines: Sequence[list[int]], width: int) -> TokenBatch:
        """Return captions as a batch of the first ``width`` positions of their grids."""
        crops = []
        for line in lines:
            row = np.full((1, MAX_PIECES), END, dtype=np.int32)
            row[0, : len(line)] = line
            crops.append(Crop(row, self.stages))
        return crop_batch(crops, 1, width)


class CaptionStage(RoundedStage):
    """The stage that trains the transformer on the bits per piece of captions."""

    tables = ("held_out.csv",)

    def __init__(self, config: CaptionsConfig, data: CaptionLines) -> None:
        super().__init__(config, data.counts())
        self.data = data

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, Figures]:
        batch = self.data.draw(generator, self.config.captions_per_step, self.place)
        bits, coded = self._bits(batch)
        loss = bits / coded
        return loss, {"bits_per_piece": loss.detach()}

    def _bits(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the bits of a batch's pieces and their number, including the end pieces."""
        batch = batch.to(self.place.device)
        with self.precision():
            logits = self.transformer(batch)
        pieces = batch.tokens.flatten(1)
        ended = (pieces == END).cumsum(1)
        coded = (ended == 0) | ((ended == 1) & (pieces == END))
        nats = functional.cross_entropy(logits[coded], pieces[coded], reduction="sum")
        return nats / np.log(2.0), coded.sum()

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Return the bits per held-out caption with the current form of the model."""
        transformer = self.transformer
        observing, transformer.observing = transformer.observing, False
        lines = sorted(self.data.held_out, key=len)
        bits = 0.0
        for begin in range(0, len(lines), 64):
            part = lines[begin : begin + 64]
            bits += float(self._bits(self.data.batch(part, len(part[-1])))[0])
        transformer.observing = observing
        return bits / len(lines)

    def draw_samples(self, folder: Path, step: int) -> None:
        """Append the bits per held-out caption to held_out.csv."""
        with open(folder / "held_out.csv", "a") as log:
            log.write(f"{step},{self.held_out_bits():.4f}\n")


def measure(model: CaptionModel, lines: Sequence[str]) -> dict[str, Any]:
    """Return the mean cost in bytes of held-out captions of 8 to 14 words.

    Captions with too many pieces for the model are left out.
    """
    from percov2.container.captions import encode_caption

    held_out = [x for x in lines if is_held_out(x) and len(x.split()) in WORDS]
    costs = {x: model.bits(x) for x in tqdm(held_out, desc="measuring", unit="caption")}
    chosen = [x for x in held_out if np.isfinite(costs[x])]
    if not chosen:
        return {"captions": 0}
    bits = [costs[x] for x in chosen]
    return {
        "captions": len(chosen),
        "bytes": float(np.mean(bits)) / 8,
        "deflate_bytes": float(np.mean([len(encode_caption(line)[1]) for line in chosen])),
        "raw_bytes": float(np.mean([len(line.encode()) for line in chosen])),
    }


def train_captions(
    config: CaptionsConfig,
    loop: LoopConfig,
    texts: Sequence[Path],
    out: Path,
    *,
    minutes: float | None = None,
) -> dict[str, Any] | None:
    """Learn an alphabet and train the caption model, then export it to ``out/captions``.

    Args:
        texts: files of captions (``read_lines``).
        out: folder for pieces.json, checkpoint.pt, log.csv, held_out.csv, and finally captions/ and
            report.json.
        minutes: time in minutes after which to stop. The same call then resumes the run. None sets
            no limit.

    Returns:
        The report, or None if steps remain or this is not the first process.

    Raises:
        ValueError: captions or settings are invalid.
    """
    torch.manual_seed(loop.seed)
    lines = read_lines(texts)
    out.mkdir(parents=True, exist_ok=True)
    stored = out / "pieces.json"
    if not stored.is_file():
        learned = learn_pieces([x for x in lines if not is_held_out(x)], config.pieces)
        stored.write_text(json.dumps([piece.decode() for piece in learned]), encoding="utf-8")
    pieces = json.loads(stored.read_text(encoding="utf-8"))
    data = CaptionLines(lines, Alphabet([piece.encode() for piece in pieces]))
    stage = CaptionStage(config, data)
    sizes = {size_class(1)}, {size_class(MAX_PIECES)}
    trained = trained_model(stage, sizes, loop, out, minutes)
    if trained is None:
        return None
    model = CaptionModel(data.alphabet, trained)
    model.save(out / "captions")
    report = {
        "fingerprint": model.fingerprint().hex(),
        "settings": {**asdict(config), "loop": asdict(loop)},
        "texts": {text.name: measure(model, read_lines([text])) for text in texts},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
