"""Coded bytes of token maps by order and entropy model (PerCoV2, Table 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from percov2.evaluation.study.coders import CHECK_BITS, StudyCoder, TokenMap, uniform_coder
from percov2.evaluation.study.page import draw_stages, page, panels
from percov2.evaluation.study.schedules import STUDY_SCHEDULES, Order
from percov2.evaluation.writers import write_json
from percov2.files import write_bytes

__all__ = ["Method", "compare", "measure", "order_methods"]


def measure(
    coder: StudyCoder, maps: Sequence[TokenMap], label: str, progress: bool = True
) -> dict[str, Any]:
    """Encode and decode maps one by one, and check that the decoded tokens are equal.

    Returns:
        maps, tokens: number of maps and number of tokens.
        stages, most_stages: mean and largest number of decoding passes.
        bytes: mean length of a payload.
        ideal_bytes: mean cost of the intervals and the check of a payload.
        bits_per_token: mean cost of an interval.
        stage_bits, stage_tokens: bits per token and number of tokens of each stage.
        encode_s, decode_s: mean seconds per map.

    Raises:
        ValueError: there are no maps.
        RuntimeError: a map is decoded wrongly.
    """
    if not maps:
        raise ValueError("no token maps to measure")
    coder.decode(coder.encode(maps[0]), maps[0].shape)  # excludes one-time work from the times
    sizes: list[int] = []
    bits: list[list[NDArray[np.float64]]] = []
    spent = np.zeros(2)
    for tokens in tqdm(maps, desc=label, unit="map", disable=not progress):
        begin = time.perf_counter()
        payload = coder.encode(tokens)
        encoded = time.perf_counter()
        decoded = coder.decode(payload, tokens.shape)
        spent += encoded - begin, time.perf_counter() - encoded
        if not np.array_equal(decoded, tokens.tokens):
            raise RuntimeError(f"{label}: a map of {tokens.shape} was decoded wrongly")
        sizes.append(len(payload))
        bits.append(coder.stage_bits(tokens))
    counts = [len(stages) for stages in bits]
    by_stage = [[b[s] for b in bits if len(b) > s] for s in range(max(counts))]
    joined = [np.concatenate(parts) for parts in by_stage]
    total = float(sum(part.sum() for part in joined))
    tokens_in_all = sum(len(part) for part in joined)
    return {
        "maps": len(maps),
        "tokens": tokens_in_all,
        "stages": float(np.mean(counts)),
        "most_stages": max(counts),
        "bytes": float(np.mean(sizes)),
        "ideal_bytes": (total / len(maps) + CHECK_BITS) / 8,
        "bits_per_token": total / tokens_in_all,
        "stage_bits": [float(part.mean()) for part in joined],
        "stage_tokens": [len(part) for part in joined],
        "encode_s": float(spent[0]) / len(maps),
        "decode_s": float(spent[1]) / len(maps),
    }


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: name of the method in file names.
        title: name of the method in the table.
        weights: description of the training of the weights.
        coder: the coder.
        maps: the token maps to code.
        panels: a function from a grid's rows and columns to the panels for ``page.draw_stages``.
            None makes no picture.
        note: Markdown for the page, or "" for none.
    """

    name: str
    title: str
    weights: str
    coder: StudyCoder
    maps: Sequence[TokenMap]
    panels: Callable[[int, int], list[NDArray[np.int64]]] | None = None
    note: str = ""


def order_methods(
    weights: str,
    coder_of: Callable[[str, Order], StudyCoder],
    maps: Sequence[TokenMap],
    draw: bool = False,
) -> Iterator[Method]:
    """Yield a method for every order of ``STUDY_SCHEDULES``.

    ``coder_of(name, order)`` returns its coder. With ``draw``, it gets a picture.
    """
    for name, (title, order) in STUDY_SCHEDULES.items():
        shown = partial(_panels, order) if draw else None
        yield Method(name, title, weights, coder_of(name, order), maps, shown)


def _panels(order: Order, height: int, width: int) -> list[NDArray[np.int64]]:
    return panels(order(height, width))


def compare(
    maps: Sequence[TokenMap],
    methods: Iterable[Method],
    facts: dict[str, Any],
    out: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure uniform coding of single grids and every method. Rewrite the report after each.

    Args:
        maps: token maps of single grids.
        methods: methods whose maps come from the same photos.
        facts: rate, codebook_size, token_side (in pixels) and command.
        out: folder for report.json, report.md and, for the largest map, schedule_NAME.png.
        progress: True to show the progress.

    Returns:
        The report, as ``page.page`` takes it.

    Raises the errors of ``measure``.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {**facts, "threads": torch.get_num_threads(), "methods": [], "notes": []}
    uniform = uniform_coder(facts["codebook_size"])
    for method in chain([Method("uniform", "uniform", "none", uniform, maps)], methods):
        record = measure(method.coder, method.maps, f"{method.title}, {method.weights}", progress)
        if method.note and method.note not in report["notes"]:
            report["notes"].append(method.note)
        head = {"name": method.name, "title": method.title, "weights": method.weights}
        picture = _draw(method, facts["token_side"], out)
        report["methods"].append({**head, **record, "picture": picture})
        write_json(out / "report.json", report)
        write_bytes(out / "report.md", page(report).encode())
    return report


def _draw(method: Method, token_side: int, out: Path) -> str | None:
    """Draw the stages of the largest map. Return the picture's name, or None without a picture."""
    if method.panels is None:
        return None
    largest = max(method.maps, key=lambda tokens: len(tokens.tokens))
    height, width = largest.shape
    name = f"schedule_{method.name}.png"
    title = f"{method.title}, {method.weights} weights, {height}x{width} tokens"
    bits, pixels = method.coder.stage_bits(largest), height * width * token_side**2
    draw_stages(method.panels(height, width), bits, pixels, title, out / name)
    return name
