"""The integer token transformer, slow and obvious: one entry at a time, in Python integers.

Written from docs/entropy-model.md, sharing no code with percov2.entropy: tensors
come in as numpy arrays by name, as they are stored in model.safetensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference_intmath import attention_mean, layer_norm, requantize, softmax_weight

NEVER = 10**9


def linear(x: list[int], tensors: dict[str, Any], name: str, low: int, high: int) -> list[int]:
    weight = tensors[f"{name}.weight"].astype(np.int64)
    acc = weight @ np.array(x, dtype=np.int64) + tensors[f"{name}.bias"]
    assert np.abs(acc).max() < 2**24
    scale = zip(tensors[f"{name}.multiplier"], tensors[f"{name}.shift"], strict=True)
    return [
        requantize(int(a), int(m), int(k), low, high) for a, (m, k) in zip(acc, scale, strict=True)
    ]


def visible(reader: dict[str, Any], key: dict[str, Any]) -> bool:
    if key["key_stage"] > reader["reads"]:
        return False
    if key["start"] is not None:
        return True
    if reader["start"] is not None:
        return False
    return abs(key["y"] - reader["y"]) <= 15 and abs(key["x"] - reader["x"]) <= 15


def relative_bias(table: np.ndarray, reader: dict[str, Any], key: dict[str, Any]) -> int:
    if key["start"] is not None:
        return int(table[961 + key["start"]])
    return int(table[(key["y"] - reader["y"] + 15) * 31 + key["x"] - reader["x"] + 15])


def make_entries(
    tensors: dict[str, Any], tokens: np.ndarray, stages: np.ndarray
) -> list[dict[str, Any]]:
    height, width = stages.shape
    row, column = tensors["embedding.row"], tensors["embedding.column"]

    def size_class(length: int) -> int:
        return min(16, (length - 1).bit_length())

    entries: list[dict[str, Any]] = []
    extra = [0, tensors["embedding.height"][size_class(height)]]
    extra.append(tensors["embedding.width"][size_class(width)])
    for i in range(3):
        payload = tensors["embedding.start"][i].astype(np.int64) + extra[i]
        entries.append({"start": i, "key_stage": 0, "reads": 0, "r": payload})
    for kind in ("content", "query"):
        for y in range(height):
            for x in range(width):
                stage = int(stages[y, x])
                place = row[16 * y // height].astype(np.int64) + column[16 * x // width]
                if kind == "content":
                    payload = place + tensors["embedding.token"][tokens[y, x]]
                    when = {"key_stage": stage, "reads": stage}
                else:
                    payload = place + tensors["embedding.query"]
                    when = {"key_stage": NEVER, "reads": stage - 1}
                entries.append({"start": None, "y": y, "x": x, "r": payload, **when})
    for entry in entries:
        entry["r"] = [int(v) for v in entry["r"]]
    return entries


def attend(
    tensors: dict[str, Any], config: dict[str, int], prefix: str, entries: list[dict[str, Any]]
) -> list[list[int]]:
    heads, width = config["heads"], config["head_dim"]
    inner = heads * width
    gain_bits = int(tensors[f"{prefix}.attention.gain_bits"][0])
    projected = []
    for entry in entries:
        x = layer_norm(entry["r"], tensors[f"{prefix}.attention_norm.gain"].tolist())
        q = linear(x, tensors, f"{prefix}.q", -127, 127)
        projected.append(q + linear(x, tensors, f"{prefix}.kv", -127, 127))
    keys = [j for j, e in enumerate(entries) if e["key_stage"] != NEVER]
    outputs = []
    for i, reader in enumerate(entries):
        seen = [j for j in keys if visible(reader, entries[j])]
        out: list[int] = []
        for h in range(heads):
            shift = int(tensors[f"{prefix}.attention.shift"][h])
            table = tensors[f"{prefix}.attention.bias"][h]
            part = slice(h * width, (h + 1) * width)
            query = projected[i][:inner][part]
            scores = []
            for j in seen:
                key = projected[j][inner : 2 * inner][part]
                product = sum(a * b for a, b in zip(query, key, strict=True))
                score = (product + (1 << (shift - 1))) >> shift
                scores.append(score + relative_bias(table, reader, entries[j]))
            best = max(scores)
            weights = [softmax_weight(best - s) for s in scores]
            values = [projected[j][2 * inner :][part] for j in seen]
            for c in range(width):
                weighted = sum(w * v[c] for w, v in zip(weights, values, strict=True))
                out.append(attention_mean(weighted, sum(weights), gain_bits))
        outputs.append(out)
    return outputs


def logits(
    config: dict[str, int], tensors: dict[str, Any], tokens: np.ndarray, stages: np.ndarray
) -> np.ndarray:
    """int16 [h * w, V] in coding order, for one grid of tokens [h, w]."""
    entries = make_entries(tensors, tokens, stages)
    queries = entries[3 + tokens.size :]
    order = sorted(range(tokens.size), key=lambda i: (int(stages.flat[i]), i))
    return entry_logits(config, tensors, entries, [queries[i] for i in order])


def entry_logits(
    config: dict[str, int],
    tensors: dict[str, Any],
    entries: list[dict[str, Any]],
    asked: list[dict[str, Any]],
) -> np.ndarray:
    """int16 [n, V] of those n of the entries that are asked."""
    limit = 2**20
    for index in range(config["layers"]):
        prefix = f"layers.{index}"
        attended = attend(tensors, config, prefix, entries)
        for entry, output in zip(entries, attended, strict=True):
            update = linear(output, tensors, f"{prefix}.out", -limit, limit)
            r = [max(-limit, min(limit, a + b)) for a, b in zip(entry["r"], update, strict=True)]
            x = layer_norm(r, tensors[f"{prefix}.mlp_norm.gain"].tolist())
            hidden = linear(x, tensors, f"{prefix}.up", -127, 127)
            active = [int(tensors[f"{prefix}.gelu"][v + 128]) for v in hidden]
            update = linear(active, tensors, f"{prefix}.down", -limit, limit)
            entry["r"] = [max(-limit, min(limit, a + b)) for a, b in zip(r, update, strict=True)]
    rows = []
    for entry in asked:
        x = layer_norm(entry["r"], tensors["head_norm.gain"].tolist())
        rows.append(linear(x, tensors, "head", -(2**15), 2**15 - 1))
    return np.array(rows, dtype=np.int16)
