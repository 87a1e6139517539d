"""``percov2 bench entropy``: takes the figures of a plan, one step after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from percov2.bench import attention, fresh, model, overhead, own_coder
from percov2.bench.cases import Case, Shape, make_case
from percov2.bench.environment import environment
from percov2.bench.peers import Peers
from percov2.bench.plan import Plan
from percov2.bench.results import middle
from percov2.bench.summary import summarize
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.token_coder import TokenCoder

SCHEMA = 1
Step = tuple[str, Callable[[], list[dict[str, Any]]]]


def run(
    plan: Plan, sections: tuple[str, ...], model_folder: Path, peers: Peers | None = None
) -> dict[str, Any]:
    """Measure and return the report, as it is written to JSON.

    Raises ValueError for a model that cannot be loaded, RuntimeError for a peer that fails and
    for a coder that returns other symbols than it got.
    """
    # Everything but the lines that say otherwise runs on one thread.
    with model.torch_threads(1):
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": environment(),
            "peers": None if peers is None else peers.versions(),
            "model": str(model_folder),
            "records": [],
        }
        steps = list(_steps(plan, sections, model_folder, peers))
        with tqdm(total=len(steps), unit="step", leave=False) as bar:
            for name, work in steps:
                bar.set_description(name)
                report["records"] += work()
                bar.update()
    report["summary"] = summarize(report["records"])
    return report


def _steps(
    plan: Plan, sections: tuple[str, ...], folder: Path, peers: Peers | None
) -> Iterator[Step]:
    timed = tuple(name for name in ("coder", "logits") if name in sections)
    if timed:
        for shape in plan.compared:
            yield _title("coders", shape), partial(_coders, plan, shape, timed, peers)
        for shape in plan.scaling:
            yield _title("coder", shape), partial(_coders, plan, shape, timed, None)
    if "overhead" in sections:
        for shape in plan.short:
            yield _title("bytes", shape), partial(_bytes, shape, peers)
        for codebook, bits in plan.long:
            yield f"long stream, V={codebook}", partial(_long, plan.long_symbols, codebook, bits)
    if "model" in sections:
        coder = TokenCoder(IntTransformer.load(folder))
        yield from _model_steps(plan, coder)
        for images in plan.memory:
            yield f"memory, {images} images", partial(_memory, plan, folder, images)
    if "attention" in sections:
        config = IntTransformer.load(folder).config
        cases = [(plan.grid, plan.batch), *([(plan.large_grid, 1)] if plan.large_grid else [])]
        for side, images in cases:
            yield (
                f"attention, {images} x {side}x{side}",
                partial(attention.attention, config, plan.schedules[0], side, images, plan.effort),
            )
    if "cold" in sections:
        yield "fresh process", lambda: [fresh.cold(folder)]


def _title(what: str, shape: Shape) -> str:
    return f"{what}, V={shape.codebook}, {shape.images}x{shape.tokens}"


def _coders(
    plan: Plan, shape: Shape, sections: tuple[str, ...], peers: Peers | None
) -> list[dict[str, Any]]:
    """Records of all coders on a shape, in rounds when they are to be compared.

    A shared machine is faster at one time and slower at another: taking turns lets both have both.
    """
    case = make_case(shape)
    rounds = 1 if peers is None else plan.rounds
    return middle([_round(plan, case, sections, peers) for _ in range(rounds)])


def _round(
    plan: Plan, case: Case, sections: tuple[str, ...], peers: Peers | None
) -> list[dict[str, Any]]:
    records = []
    if "coder" in sections:
        records.append(own_coder.coder_only(case, plan.effort))
    if "logits" in sections:
        records += [own_coder.from_logits(case, kind, plan.effort) for kind in own_coder.KINDS]
    if peers is not None:
        for record in peers.measure(case, sections, plan.effort):
            record["bytes"] = sum(record.pop("stream_bytes"))
            records.append(record)
    return records


def _bytes(shape: Shape, peers: Peers | None) -> list[dict[str, Any]]:
    records = [overhead.short_streams(shape)]
    if peers is not None:
        case = next(overhead.parts_of(shape))
        records += [
            overhead.peer_streams(case, peer["coder"], peer["stream_bytes"])
            for peer in peers.measure(case, ("logits",), None)
            if peer["given"] == "float32 logits"
        ]
    return records


def _long(symbols: int, codebook: int, prob_bits: int) -> list[dict[str, Any]]:
    tokens = min(symbols, 2**22 // codebook)
    return [overhead.long_stream(Shape(codebook, tokens, 1), symbols // tokens, prob_bits)]


def _memory(plan: Plan, folder: Path, images: int) -> list[dict[str, Any]]:
    return [fresh.memory(way, folder, images, plan.grid) for way in ("encode", "decode")]


def _model_steps(plan: Plan, coder: TokenCoder) -> Iterator[Step]:
    tokens = model.draw_tokens(coder, max(plan.batch, *plan.batches), plan.grid)
    main, default = tokens[: plan.batch], plan.schedules[0]

    def both(grids: torch.Tensor, schedule: str, threads: int) -> list[dict[str, Any]]:
        return model.encode_and_decode(coder, grids, schedule, threads, plan.effort)

    yield "float transformer", lambda: [model.float_pass(coder, main, default, plan.effort)]
    for schedule in plan.schedules:
        yield f"entropy model, {schedule}", partial(both, main, schedule, 1)
    if (os.cpu_count() or 1) > 1:
        yield "entropy model, 2 threads", partial(both, main, default, 2)
    for images in plan.batches:
        if images != plan.batch:
            yield f"entropy model, {images} images", partial(both, tokens[:images], default, 1)
    for side, schedule in ((plan.large_grid, default), (plan.raster_grid, "raster")):
        if side:
            one = model.draw_tokens(coder, 1, side)
            yield f"entropy model, {schedule}, {side}x{side}", partial(both, one, schedule, 1)
