"""What the GPU path is held against: counted bytes, launches and copies, and their limits."""

from __future__ import annotations

from typing import Any

from percov2.bench.gpu_kernels import Size, interval_bytes
from percov2.entropy.transformer_config import TransformerConfig

Record = dict[str, Any]

BYTES_TO_FLOOR = 1.1
LAUNCHES_AFTER_TRANSFORMER = {"symbol_intervals": 1, "encode_kernel": 1, "pack_kernel": 1}
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


def launches(size: Size, kind: str) -> Record:
    """Launches and copies of encoding a batch, as the code queues them."""
    return {
        "kind": kind,
        "section": "launches",
        "images": size.images,
        "tokens": size.tokens,
        "codebook": size.config.codebook_size,
        "layers_and_head": layer_launches(size.config),
        "after_transformer": dict(LAUNCHES_AFTER_TRANSFORMER),
        "copies_to_host": COPIES_TO_HOST,
    }


def summarize(sizes: tuple[Size, ...], counted: list[Record]) -> list[Record]:
    """Name, value, goal and which side of the goal is good."""
    lines = []
    for size in sizes:
        moved, least = interval_bytes(size)
        name = f"logits to intervals, V={size.config.codebook_size}: bytes moved / fewest possible"
        lines.append(_line(name, moved / least, BYTES_TO_FLOOR))
    for record in counted:
        shape = f"{record['images']} x {record['tokens']} tokens, V={record['codebook']}"
        after = sum(record["after_transformer"].values())
        name = f"encode {shape}: launches after the transformer"
        lines.append(_line(name, after, MOST_LAUNCHES))
        lines.append(_line(f"encode {shape}: copies to the host", record["copies_to_host"], 1))
    return lines


def _line(name: str, value: float, goal: float) -> Record:
    return {"name": name, "value": value, "goal": goal, "at_least": False, "met": value <= goal}
