"""How launches compile the Triton kernels: argument types, constants, warps.

Importing this needs no triton, calling any of its functions does.
"""

from __future__ import annotations

from percov2.bench.gpu_compiled import Source

_LOGITS = {"INT16": "*i16", "BFLOAT16": "*i16", "FLOAT32": "*fp32"}
_ENDS = {
    "int8": ("STORE", 127, "*i8", "*i8"),
    "int16": ("STORE", 2**15 - 1, "*i8", "*i16"),
    "table": ("TABLE", 127, "*i8", "*i8"),
    "residual": ("RESIDUAL", 2**20, "*i32", "*i32"),
}
ENDS = tuple(_ENDS)
"""What may follow a linear map."""


def symbol_intervals(codebook: int, kind: str = "INT16") -> Source:
    """Logits of a kind ("INT16", "BFLOAT16", "FLOAT32") to intervals, for any number of rows."""
    from percov2.triton_kernels import intervals

    rows, columns, warps = intervals.block_sizes(codebook)
    pointers = dict.fromkeys(("symbols", "table", "starts", "freqs"), "*i32")
    return Source(
        intervals.intervals_kernel,
        {"logits": _LOGITS[kind], **pointers, "rows": "i32", "spread": "i32"},
        {
            "SIZE": codebook,
            "KIND": getattr(intervals, kind),
            "BLOCK_ROWS": rows,
            "BLOCK_SIZE": columns,
        },
        ("logits", *pointers),
        warps,
    )


def layer_norm(dim: int) -> Source:
    """LayerNorm of a width, for any number of rows."""
    from percov2.triton_kernels import int_layernorm

    rows, columns = int_layernorm.block_sizes(dim)
    return Source(
        int_layernorm.int_layernorm_kernel,
        {"residual": "*i32", "gain": "*i16", "out": "*i8", "rows": "i32"},
        {"DIM": dim, "BLOCK_ROWS": rows, "BLOCK_DIM": columns},
        ("residual", "gain", "out"),
    )


def linear(rows: int, terms: int, end: str) -> Source:
    """A linear map of ``terms`` inputs with one of ``ENDS``, for few or many rows."""
    from percov2.triton_kernels import int_linear

    block_rows, block_outputs, block_terms, warps = int_linear.block_sizes(rows, terms)
    what, limit, extra, out = _ENDS[end]
    pointers = {"x": "*i8", "weight": "*i8", "bias": "*i32", "multiplier": "*i8", "shift": "*i8"}
    pointers |= {"extra": extra, "out": out}
    return Source(
        int_linear.int_linear_kernel,
        {**pointers, "rows": "i32", "outputs": "i32"},
        {
            "TERMS": terms,
            "LIMIT": limit,
            "END": getattr(int_linear, what),
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUTPUTS": block_outputs,
            "BLOCK_TERMS": block_terms,
        },
        (*pointers, "outputs"),
        warps,
    )


def attention(head_dim: int) -> Source:
    """Attention with heads of a width that is a power of two from 32 on."""
    from percov2.triton_kernels import stage_attention

    pointers = dict.fromkeys(("queries", "keys", "values", "out", "shifts", "weights"), "*i8")
    places = ("reader_places", "readers", "first_keys", "listed_keys")
    pointers |= {**dict.fromkeys(places, "*i32"), "biases": "*i16"}
    strides = ("query_batch", "query_stride", "key_batch", "key_stride")
    return Source(
        stage_attention.stage_attention_kernel,
        {**pointers, **dict.fromkeys(("reader_count", "list_size", *strides), "i32")},
        {
            "GAIN_BITS": 2,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": head_dim,
            "BLOCK": stage_attention.BLOCK,
            "GROUP": stage_attention.GROUP,
        },
        (*pointers, "list_size", *strides),
    )


def nearest_codes() -> Source:
    """The nearest codebook vector, for vectors whose length is a multiple of 16."""
    from percov2.triton_kernels import nearest

    return Source(
        nearest.nearest_kernel,
        {
            "vectors": "*fp32",
            "codebook": "*fp32",
            "indices": "*i32",
            "rows": "i32",
            "codes": "i32",
            "dim": "i32",
        },
        {"BLOCK_N": nearest.BLOCK_N, "BLOCK_K": nearest.BLOCK_K, "BLOCK_D": nearest.BLOCK_D},
        ("vectors", "codebook", "indices", "dim"),
    )
