"""Measurements of the peers' coders in their own environment, on percov2's data."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from percov2.bench.cases import Case
from percov2.bench.timing import Effort, Record

__all__ = ["Peers"]

_TIMING = Path(__file__).with_name("timing.py")


class Peers:
    """The environment with constriction, torchac, CompressAI and torch-ans.

    Args:
        python: path of its Python interpreter. ``benchmarks/peers.sh`` makes the environment.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, python: Path) -> None:
        if not python.is_file():
            raise ValueError(f"no peers at {python}; make them with: bash benchmarks/peers.sh")
        # Links stay, because an interpreter finds its environment by its own path.
        self.python = python.absolute()

    def _environment(self) -> dict[str, str]:
        folder = self.python.parent
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        kept |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return kept | {
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, for torchac
            "CXX": str(folder / "optimizing-c++"),  # torchac would compile without optimisation
            "TORCH_EXTENSIONS_DIR": str(folder.parent / "torch_extensions"),
        }

    def _ask(self, case: Case | None, sections: tuple[str, ...], effort: Any) -> Record:
        task = {"sections": sections, "effort": effort, "timing": str(_TIMING)}
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
            if case is not None:
                np.save(folder / "logits.npy", case.logits)
                np.save(folder / "symbols.npy", case.symbols)
            script = self.python.parent.parent / "peer_coders.py"  # benchmarks/peer_coders.py
            command = [str(self.python), "-P", str(script), name]
            environment, pipe = self._environment(), subprocess.PIPE
            done = subprocess.run(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            answer = folder / "answer.json"
            if done.returncode == 0 and answer.is_file():
                return json.loads(answer.read_text(encoding="utf-8"))
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        again = "make them again with: bash benchmarks/peers.sh"
        raise RuntimeError(f"the peers at {self.python} failed: {lines[-1]}; {again}")

    def versions(self) -> dict[str, str]:
        """Return the versions of the peers. Raise RuntimeError if an import fails."""
        return self._ask(None, (), None)["versions"]

    def measure(self, case: Case, sections: tuple[str, ...], effort: Effort | None) -> list[Record]:
        """Return the records of all peers on a case, without times if ``effort`` is None.

        The records are like those of ``percov2.bench.coders``, with one difference. Instead of
        ``bytes`` and ``ideal_bytes`` they have ``stream_bytes``, the number of bytes of each image.

        Raises:
            RuntimeError: a peer fails or decodes wrong symbols.
        """
        limits = None if effort is None else asdict(effort)
        return self._ask(case, sections, limits)["records"]
