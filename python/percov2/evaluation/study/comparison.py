"""What orders and entropy models cost on token maps (PerCoV2, Table 1): really coded bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from percov2.images import write_bytes


def measure(
    coder: StudyCoder, maps: Sequence[TokenMap], label: str, progress: bool = True
) -> dict[str, Any]:
    """Code maps one by one, decode them again, and compare.

    Returns:
        maps, tokens: how many; stages: mean and ``most_stages``, which are the passes of decoding;
        bytes: mean of a payload with its check; ideal_bytes: mean of what the intervals and the
        check say; bits_per_token: of the intervals; stage_bits and stage_tokens: bits per token and
        number of tokens of each stage, over the maps that have it; encode_s and decode_s: mean
        seconds of a map.

    Raises:
        ValueError: no maps.
        RuntimeError: a map is not decoded as it was.
    """
    if not maps:
        raise ValueError("no token maps to measure")
    coder.decode(coder.encode(maps[0]), maps[0].shape)  # what is made once is not timed
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
            raise RuntimeError(f"{label}: a map of {tokens.shape} is not decoded as it was")
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
    """One row of the table: a coder, the maps that it codes, and what draws its stages.

    name: of the method, also in file names; weights: what trained the coder; panels: shape of a
    grid -> what ``study_page.draw_stages`` shows of each stage, None for no picture; note: Markdown
    for the page, "" for none.
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
    """Every order of ``STUDY_SCHEDULES``; ``coder_of(name, order)`` when the order's turn comes."""
    for name, (title, order) in STUDY_SCHEDULES.items():

        def shown(height: int, width: int, order: Order = order) -> list[NDArray[np.int64]]:
            return panels(order(height, width))

        yield Method(name, title, weights, coder_of(name, order), maps, shown if draw else None)


def compare(
    maps: Sequence[TokenMap],
    methods: Iterable[Method],
    facts: dict[str, Any],
    out: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure uniform coding and every method; the report grows as they are measured.

    Args:
        maps: single grids, for uniform coding.
        methods: their maps are of the same photos.
        facts: rate, codebook_size, token_side (pixels) and command.
        out: folder for report.json, report.md and schedule_NAME.png of the photo with most tokens.

    Returns:
        The report, as ``study_page.page`` takes it.

    Raises:
        ValueError: no maps.
        RuntimeError: a map is not decoded as it was.
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
        write_bytes(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        write_bytes(out / "report.md", page(report).encode())
    return report


def _draw(method: Method, token_side: int, out: Path) -> str | None:
    """The stages of the photo with most tokens; returns the picture's name, None for no picture."""
    if method.panels is None:
        return None
    largest = max(method.maps, key=lambda tokens: len(tokens.tokens))
    height, width = largest.shape
    name = f"schedule_{method.name}.png"
    draw_stages(
        method.panels(height, width),
        method.coder.stage_bits(largest),
        height * width * token_side**2,
        f"{method.title}, {method.weights} weights, {height}x{width} tokens",
        out / name,
    )
    return name
