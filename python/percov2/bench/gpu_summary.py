"""What the GPU path is held against: counted bytes, launches and copies, and their limits."""

from __future__ import annotations

from typing import Any

from percov2.bench.gpu_kernels import Size, coder_rows, interval_bytes, layer_rows
from percov2.bench.gpu_predict import PREDICTION
from percov2.entropy.transformer_config import TransformerConfig

Record = dict[str, Any]

BYTES_TO_FLOOR = 1.1
AFTER_TRANSFORMER = ("symbol_intervals", "encode_kernel", "pack_kernel")
"""Of a batch of up to 2^28 logits (percov2.entropy.token_coder)."""
MOST_LAUNCHES = 3
COPIES_TO_HOST = 1


def layer_launches(config: TransformerConfig) -> dict[str, int]:
    """Kernel -> launches of the layers and of the head, in the pass that encodes.

    A layer makes keys and values of the contents, then advances queries and, but in the last layer,
    contents; percov2.entropy.triton_layers.
    """
    layers = config.layers
    advanced = 2 * layers - 1
    return {
        "layer_norm": layers + 2 * advanced + 1,
        "linear": layers + 4 * advanced + 1,
        "attention": advanced,
    }


def whole(size: Size, predictions: list[Record]) -> list[Record]:
    """Predicted time of encoding a batch on each card: the sum of its launches.

    predictions: those of all kernels; layers are predicted for the queries, and contents, which are
    fewer, are taken to cost as much. Attention is predicted for both together; contents have none
    in the last layer. A card of which something is missing has no sum.
    """
    layers = size.config.layers
    advanced = 2 * layers - 1
    times = {"layer_norm": layers + 2 * advanced + 1, "attention": layers - 0.5}
    times |= dict.fromkeys(("q", "out", "up", "down"), advanced) | {"kv": layers, "head": 1}
    times |= dict.fromkeys(AFTER_TRANSFORMER, 1)
    wanted = {(row.name, row.case) for row in (*layer_rows(size), *coder_rows(size).values())}
    found = []
    for card in dict.fromkeys(record["card"] for record in predictions):
        parts: Record = {}
        for r in predictions:
            name = r["case"].partition(",")[0] if r["kernel"] == "linear" else r["kernel"]
            if r["card"] == card and (r["kernel"], r["case"]) in wanted and name in times:
                parts[name] = r["predicted_s"] * times[name] if "predicted_s" in r else None
        if all(parts.get(name) is not None for name in times):
            seconds = sum(parts.values())
            found.append(
                {
                    "kind": PREDICTION,
                    "section": "whole",
                    "card": card,
                    "images": size.images,
                    "tokens": size.tokens,
                    "codebook": size.config.codebook_size,
                    "parts_s": parts,
                    "predicted_s": seconds,
                    "predicted_msym_per_s": size.symbols / seconds / 1e6,
                }
            )
    return found


def launches(size: Size) -> Record:
    """Launches and copies of encoding a batch, as the code queues them."""
    return {
        "kind": PREDICTION,
        "section": "launches",
        "images": size.images,
        "tokens": size.tokens,
        "codebook": size.config.codebook_size,
        "layers_and_head": layer_launches(size.config),
        "after_transformer": list(AFTER_TRANSFORMER),
        "to_host": COPIES_TO_HOST,
    }


def summarize(sizes: tuple[Size, ...], records: list[Record]) -> list[Record]:
    """Name, value, goal and which side of the goal is good; launches as traced, where they are."""
    lines = []
    for size in sizes:
        moved, least = interval_bytes(size)
        name = f"logits to intervals, V={size.config.codebook_size}: bytes moved / fewest possible"
        lines.append(_line(name, moved / least, BYTES_TO_FLOOR))
    traced = [
        (f"{r['case']}, {r['who']}", r["launches"])
        for r in records
        if r["section"] == "paths" and r["what"] == "encode" and r["coder"] == "cuda"
    ]
    counted = [
        (f"{r['images']} x {r['tokens']} tokens, V={r['codebook']}", r)
        for r in records
        if r["section"] == "launches"
    ]
    for name, found in traced or counted:
        after = len(found["after_transformer"])
        lines.append(_line(f"encode {name}: launches after the transformer", after, MOST_LAUNCHES))
        lines.append(_line(f"encode {name}: copies to the host", found["to_host"], COPIES_TO_HOST))
    return lines


def _line(name: str, value: float, goal: float) -> Record:
    return {"name": name, "value": value, "goal": goal, "at_least": False, "met": value <= goal}
