"""``percov2 bench entropy``, which runs the measurements of a plan."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from percov2.bench import coders, fresh, model
from percov2.bench.cases import Shape, make_case
from percov2.bench.peers import Peers
from percov2.bench.report import environment
from percov2.bench.summary import summarize
from percov2.bench.timing import Effort, Record
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.token_coder import TokenCoder

__all__ = ["FULL_PLAN", "QUICK_PLAN", "SCHEMA", "Plan", "Step", "middle", "run", "take"]

SCHEMA = 1
Step = tuple[str, Callable[[], list[Record]]]
Shapes = tuple[tuple[int, int, int], ...]
Names = tuple[str, ...]


class Plan(NamedTuple):
    """The measurements of one run. A shape is (codebook, tokens, images)."""

    effort: Effort = Effort(0.5, 5, 200)
    rounds: int = 3  # turns of percov2 and its peers
    # Shapes for timing percov2 and its peers.
    compared: Shapes = ((64, 1024, 64), (256, 1024, 64), (1024, 1024, 64), (8192, 1024, 8))
    # Further shapes for timing percov2 alone.
    scaling: Shapes = (
        *((256, 64, 64), (256, 256, 64), (256, 4096, 64)),
        *((256, 1024, 1), (256, 1024, 8), (256, 1024, 256)),
    )
    # Shapes for counting bytes.
    short: Shapes = ((64, 64, 512), (256, 256, 256), (1024, 1024, 64), (8192, 1024, 64))
    # (codebook, prob_bits) of long streams with ``long_symbols`` symbols.
    long: tuple[tuple[int, int], ...] = ((256, 16), (256, 20), (1024, 18), (1024, 20))
    long_symbols: int = 2**20
    schedules: Names = ("qlds12", "quincunx", "checkerboard", "var", "qlds8", "qlds5")
    grid: int = 16  # side of an image in tokens
    batch: int = 64  # number of images
    batches: tuple[int, ...] = (1, 8, 64, 256)  # numbers of images for the cost per image
    memory: tuple[int, ...] = (1, 64, 256)  # numbers of images for the peak memory
    large_grid: int = 32  # side of one large image, decoded with ``schedules[0]``; 0 for none
    raster_grid: int = 16  # side of one image decoded token by token; 0 for none


FULL_PLAN = Plan()
QUICK_PLAN = Plan(
    effort=Effort(0.05, 3, 10),
    rounds=1,
    compared=((256, 256, 16), (1024, 256, 4)),
    scaling=((256, 64, 16),),
    short=((64, 64, 64), (256, 256, 32)),
    long=((256, 16),),
    long_symbols=2**15,
    schedules=("qlds12",),
    batch=2,
    batches=(1,),
    memory=(),
    large_grid=0,
    raster_grid=4,
)


def run(plan: Plan, sections: Names, model_folder: Path, peers: Peers | None = None) -> Record:
    """Measure a plan and return the report as JSON values.

    Raises:
        ValueError: the model cannot be loaded.
        RuntimeError: a peer fails, or a coder returns wrong symbols.
    """
    with model.torch_threads(1):  # the default of every step
        report: Record = {
            "schema": SCHEMA,
            "environment": environment(),
            "peers": None if peers is None else peers.versions(),
            "model": str(model_folder),
            "records": take(list(_steps(plan, sections, model_folder, peers))),
        }
    return {**report, "summary": summarize(report["records"])}


def take(steps: list[Step]) -> list[Record]:
    """Run all steps with a progress bar, and return their records."""
    records = []
    for name, work in (bar := tqdm(steps, unit="step", leave=False)):
        bar.set_description(name)
        records += work()
    return records


def _steps(plan: Plan, sections: Names, folder: Path, peers: Peers | None) -> Iterator[Step]:
    def step(name: str, work: Callable[..., Record], *arguments: Any) -> Step:
        return name, lambda: [work(*arguments)]

    timed = tuple(name for name in ("coder", "logits") if name in sections)
    for shapes, beside in ((plan.compared, peers), (plan.scaling, None)) if timed else ():
        for shape in itertools.starmap(Shape, shapes):
            yield f"coders, {shape}", partial(_coders, plan, shape, timed, beside)
    if "overhead" in sections:
        for shape in itertools.starmap(Shape, plan.short):
            yield f"bytes, {shape}", partial(_bytes, shape, peers)
        for codebook, bits in plan.long:
            one = Shape(codebook, min(plan.long_symbols, 2**22 // codebook), 1)
            parts = plan.long_symbols // one.tokens
            yield step(f"long stream, V={codebook}", coders.long_stream, one, parts, bits)
    if "model" in sections:
        yield from _model_steps(plan, TokenCoder(IntTransformer.load(folder)))
        for images in plan.memory:
            for way in ("encode", "decode"):
                name = f"memory, {images} images, {way}"
                yield step(name, fresh.memory, way, folder, images, plan.grid)
    if "attention" in sections:
        config = IntTransformer.load(folder).config
        for side, images in ((plan.grid, plan.batch), (plan.large_grid, 1)):
            if side:
                case = (config, plan.schedules[0], side, images)
                yield f"attention, {side}x{side}", partial(model.attention, *case, plan.effort)
    if "cold" in sections:
        yield step("fresh process", fresh.cold, folder)


def _coders(plan: Plan, shape: Shape, sections: Names, peers: Peers | None) -> list[Record]:
    """Return the records of all coders on a shape.

    The coders take turns, because the speed of a shared machine changes over time.
    """
    case = make_case(shape)

    def turn() -> list[Record]:
        given = [given for given, section in coders.GIVEN.items() if section in sections]
        records = [coders.timed(case, each, plan.effort) for each in given]
        for record in peers.measure(case, sections, plan.effort) if peers is not None else ():
            record["bytes"] = sum(record.pop("stream_bytes"))
            records.append(record)
        return records

    return middle([turn() for _ in range(1 if peers is None else plan.rounds)])


def middle(rounds: Iterable[list[Record]]) -> list[Record]:
    """Merge rounds of the same records. Of each timing, keep the round with the middle median.

    Raises:
        ValueError: the rounds do not hold the same records.
    """
    merged = []
    for same in zip(*rounds, strict=True):
        if len({(r["coder"], r["given"], r["bytes"]) for r in same}) > 1:
            raise ValueError("the rounds of a measurement do not hold the same records")
        ways = {}
        for way in ("encode", "decode"):
            ordered = sorted((r[way] for r in same), key=lambda timing: timing["median_s"])
            ways[way] = ordered[(len(ordered) - 1) // 2]
        merged.append({**same[0], **ways})
    return merged


def _bytes(shape: Shape, peers: Peers | None) -> list[Record]:
    records = [coders.short_streams(shape)]
    if peers is not None:
        case = next(coders.parts_of(shape))
        records += [
            coders.peer_streams(case, peer["coder"], peer["stream_bytes"])
            for peer in peers.measure(case, ("logits",), None)
            if peer["given"] == "float32 logits"
        ]
    return records


def _model_steps(plan: Plan, coder: TokenCoder) -> Iterator[Step]:
    tokens = model.draw_tokens(coder, max(plan.batch, *plan.batches), plan.grid)
    main, default = tokens[: plan.batch], plan.schedules[0]

    def both(what: str, grids: NDArray[np.int32], schedule: str, threads: int = 1) -> Step:
        work = partial(model.encode_and_decode, coder, grids, schedule, threads, plan.effort)
        return f"entropy model, {what}", work

    yield "float transformer", lambda: [model.float_pass(coder, main, default, plan.effort)]
    for schedule in plan.schedules:
        yield both(schedule, main, schedule)
    if (os.cpu_count() or 1) > 1:
        yield both("2 threads", main, default, 2)
    for images in (count for count in plan.batches if count != plan.batch):
        yield both(f"{images} images", tokens[:images], default)
    for side, schedule in ((plan.large_grid, default), (plan.raster_grid, "raster")):
        if side:
            yield both(f"{schedule}, {side}x{side}", model.draw_tokens(coder, 1, side), schedule)
