"""Networks of the small model in ONNX Runtime: graphs whose weights lie in a safetensors file.

``percov2 train export`` writes the graphs. A graph names its weights as the safetensors file does
and holds the file's SHA-256. The file's tensors are given to the session by name, so
that one copy of the weights serves both runtimes.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from percov2.models.stored_tensors import MOST_BYTES, read_weights
from percov2.stored_files import one_line, read_regular

__all__ = ["WEIGHTS_HASH", "Graph"]

WEIGHTS_HASH = "percov2.weights"
"""Key of a graph's metadata: SHA-256 of its safetensors file, hexadecimal."""

_SESSIONS: WeakSet[ort.InferenceSession] = WeakSet()
"""Sessions with threads of their own."""


def _keep_sessions_for_ever() -> None:
    """Keep inherited sessions in a forked child, where their threads do not exist.

    The end of such a session would wait for its threads for ever.
    """
    for session in _SESSIONS:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_sessions_for_ever)


class Graph:
    """A network that ONNX Runtime runs on the CPU: arrays by name in, one array out.

    Args:
        path: the graph; ``model.safetensors`` is in its folder.
        threads: threads of one call.
        prefix: the graph's tensors are those whose names begin so.
        int8: give the graph the stored int8 matrices and their factors instead of float32 tensors.
        extra: further tensors of the graph, by name, which are computed instead of stored.

    Raises:
        ValueError: a graph or weights that are missing, damaged or not made for each other.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        prefix: str = "",
        int8: bool = False,
        extra: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        self._path, weights = path, path.with_name("model.safetensors")
        if not path.exists():
            raise ValueError(
                f"{path.parent} contains no {path.name}; write it with `percov2 train export`, or "
                "use runtime 'torch'"
            )
        graph = read_regular(path, MOST_BYTES)
        tensors, weights_hash = read_weights(weights, prefix, int8)
        tensors |= extra or {}
        self._threads, self._graph, self._names = threads, graph, list(tensors)
        self._kept = [ort.OrtValue.ortvalue_from_numpy(value) for value in tensors.values()]
        try:
            self._open()
        except Exception as error:  # the runtime raises errors of its own types
            reason = one_line(error)
            raise ValueError(f"{path} is damaged or does not match {weights}: {reason}") from error
        made_for = self._session.get_modelmeta().custom_metadata_map.get(WEIGHTS_HASH)
        if made_for != weights_hash:
            raise ValueError(
                f"{path} was made for other weights than {weights}; write it again with "
                "`percov2 train export`"
            )

    def _open(self) -> None:
        """Make a session, whose threads belong to this process."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors reach the caller as exceptions
        options.add_external_initializers(self._names, self._kept)
        self._session = ort.InferenceSession(
            self._graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        self._process = os.getpid()
        if self._threads > 1:
            _SESSIONS.add(self._session)

    def __call__(self, **inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return the graph's output for its inputs by name; ValueError if it does not fit them."""
        if self._process != os.getpid():
            self._open()
        try:
            (output,) = self._session.run(None, inputs)
        except Exception as error:  # the runtime raises errors of its own types
            shapes = ", ".join(f"{name} {value.shape}" for name, value in inputs.items())
            raise ValueError(
                f"{self._path} does not accept {shapes}; it does not match the model's config.json "
                f"or another network of the folder: {one_line(error)}"
            ) from error
        return output
