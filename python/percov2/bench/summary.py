"""Summary of a report: its main ratios and their goals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from percov2.bench.timing import Record

__all__ = ["line", "summarize"]

# The input of the coders, as the records of percov2 and of constriction name it, and then, per
# codebook, the goals (encode, decode) for percov2's speed relative to constriction.
FASTER = {
    "float32 logits": ("float32 logits", "logits", {256: (5.0, 4.0), 1024: (6.0, 5.0)}),
    "best prepared input": ("int16 logits", "probabilities", {256: (4.0, 3.5), 1024: (5.0, 4.0)}),
}
RANS_STEP, BYTES_ABOVE_IDEAL, PERCENT_ABOVE_INTERVALS = 250.0, 0.5, 0.01
DECODE_PER_ENCODE, DECODE_PER_ENCODE_ALONE, TWO_THREADS, FLAT = 1.5, 2.0, 1.7, 1.1


def line(name: str, value: float, goal: float, at_least: bool = False) -> Record:
    """Return a line of a summary. The goal is a minimum if ``at_least``, otherwise a maximum."""
    met = value >= goal if at_least else value <= goal
    return {"name": name, "value": value, "goal": goal, "at_least": at_least, "met": met}


def summarize(records: list[Record]) -> list[Record]:
    """Return all lines for the given records."""
    return [*_against_constriction(records), *_coder(records), *_model(records)]


def _picked(records: list[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def _best(records: list[Record], way: str) -> float:
    return max(r[way]["msym_per_s"] for r in records)


def _against_constriction(records: list[Record]) -> Iterator[Record]:
    for what, (ours, theirs, goals) in FASTER.items():
        for codebook, goal in goals.items():
            at = _picked(records, section="logits", codebook=codebook)
            peers = [r for r in at if "constriction" in r["coder"] and theirs in r["given"]]
            shapes = {(r["tokens"], r["images"]) for r in peers}
            mine = _picked(at, coder="percov2", given=ours)
            mine = [r for r in mine if (r["tokens"], r["images"]) in shapes]
            if mine:
                for way, least in zip(("encode", "decode"), goal, strict=True):
                    name = f"{way} from {what}, V={codebook}: x constriction"
                    yield line(name, _best(mine, way) / _best(peers, way), least, True)


def _coder(records: list[Record]) -> Iterator[Record]:
    steps = _picked(records, section="coder", coder="percov2")
    if steps:
        name = "rANS step, intervals given, best case: Msym/s"
        yield line(name, _best(steps, "encode"), RANS_STEP, True)
    for r in _picked(records, section="overhead", coder="percov2"):
        name = f"bytes above ideal and check, V={r['codebook']}, {r['tokens']} tokens"
        yield line(name, r["above_ideal"], BYTES_ABOVE_IDEAL)
    for r in _picked(records, section="long"):
        name = f"long stream, V={r['codebook']}, {r['prob_bits']} bits: % above its intervals"
        yield line(name, r["percent_above_intervals"], PERCENT_ABOVE_INTERVALS)


def _model(records: list[Record]) -> Iterator[Record]:
    keys = ("what", "schedule", "grid", "images", "threads")
    found = _picked(records, section="model")
    times = {tuple(r[key] for key in keys): r["median_s"] for r in found}
    for (what, schedule, grid, images, threads), seconds in times.items():
        size = f"{schedule}, {images} x {grid}x{grid}"
        encode = times.get(("encode", schedule, grid, images, threads))
        single = times.get((what, schedule, grid, images, 1))
        if what == "float32 torch" and encode:
            yield line(f"one pass, {size}: time / float32 torch", encode / seconds, 1.0)
        elif what == "decode" and schedule != "raster" and threads == 1 and encode:
            goal = DECODE_PER_ENCODE if images > 1 else DECODE_PER_ENCODE_ALONE
            yield line(f"staged decoding, {size}: time / one pass", seconds / encode, goal)
        if threads == 2 and single:
            yield line(f"{what}, {size}: 2 threads x 1", single / seconds, TWO_THREADS, True)
    # The cost per image of the largest batch relative to the smallest batch of at least 8.
    for what in ("encode", "decode"):
        costs: dict[tuple[str, int], dict[int, float]] = {}
        for r in _picked(found, what=what, threads=1):
            if r["images"] >= 8:
                at = costs.setdefault((r["schedule"], r["grid"]), {})
                at[r["images"]] = r["ms_per_image"]
        for (schedule, grid), by_images in costs.items():
            few, many = min(by_images), max(by_images)
            if few < many:
                name = f"{what}, {schedule}, {grid}x{grid}: cost per image, {many} / {few} images"
                yield line(name, by_images[many] / by_images[few], FLAT)
