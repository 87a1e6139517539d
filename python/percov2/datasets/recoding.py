"""Compression or restoration of whole units: shards, tables and loose files."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from percov2.batching import Outcome, current_item
from percov2.datasets.rows import CompressImages, DecompressImages
from percov2.datasets.shards import DAMAGE, Checked, Sample, samples_of, write_sample
from percov2.datasets.units import Unit, finished_record, store_record
from percov2.extras import require
from percov2.files import check_kind
from percov2.images import ENDINGS
from percov2.models.backbone import BackboneOptions
from percov2.options import DecodeOptions, EncodeOptions
from percov2.places import Found, exists, is_local, open_for_reading, open_for_writing, read

__all__ = ["Recoder"]

_MOST_BYTES = 1 << 30
_ROWS_AT_ONCE = 64


class _NoPicture(ValueError):
    """A sample without a picture, which is copied."""


def _reason(error: Exception | None, about: str) -> str:
    """Return an error in one line; that of another file than ``about`` names it."""
    if isinstance(error, OSError) and error.strerror:
        other = error.filename not in (None, about)
        return f"{error.filename}: {error.strerror}" if other else error.strerror
    return " ".join(str(error).split())


class Recoder:
    """A worker that compresses or restores units, with one codec.

    Args:
        options: encoding options to compress, decoding options to restore.
        model, device, backbone, jobs, batch_size: as for ``CompressImages``.
        column: column of a table's pictures or files; None for "image" or "pcv2".

    Raises:
        ValueError: the model, the device or an option does not exist.
    """

    def __init__(
        self,
        options: EncodeOptions | DecodeOptions,
        model: str | Path = "tiny",
        device: str | None = None,
        backbone: BackboneOptions | None = None,
        *,
        column: str | None = None,
        jobs: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        place = model, device, backbone
        size: dict[str, Any] = {"jobs": jobs, "batch_size": batch_size}
        self._column = column or ("image" if isinstance(options, EncodeOptions) else "pcv2")
        self._rows: CompressImages | DecompressImages
        if isinstance(options, EncodeOptions):
            self._rows = CompressImages(*place, options=options, column=self._column, **size)
            self._taken = tuple(ending[1:] for ending in ENDINGS)
            self._made, self._suffix = "pcv2", ".pcv2"
        else:
            self._rows = DecompressImages(
                *place, options=options, column=self._column, form="PNG", **size
            )
            self._taken, self._made, self._suffix = ("pcv2",), "png", ".png"
        self._inputs: list[str] = []
        codec = self._rows.codec
        self.settings: dict[str, Any] = {
            "result": self._made,
            "model": codec.config.name,
            "ids": {rate.name: codec.model_id(rate.name) for rate in codec.config.rates},
            "options": {k: v for k, v in vars(options).items() if v is not None},
        }

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Recode a unit unless it is finished, and return its record.

        A record has the number of pictures, the bytes of their files, the number of samples without
        a picture that were copied, and the faults: lists of a key and a message. A unit that is
        damaged as a whole has an "error" and no output.

        Raises:
            ValueError: the unit was finished with other settings.
        """
        if (record := finished_record(unit, self.settings)) is not None:
            return record | {"finished_before": True}
        work: dict[str, Callable[[Unit, dict[str, Any]], None]] = {
            "shard": self._shard,
            "table": self._table,
            "files": self._files,
        }
        self._inputs = []
        begin = time.monotonic()
        sources = [one.name for one in unit.sources]
        record = {"sources": sources, "target": unit.target, "settings": self.settings}
        record |= {"pictures": 0, "bytes": 0, "copied": 0, "faults": []}
        if unit.record:
            store_record(unit, record | {"begun": True})
        try:
            work[unit.kind](unit, record)
        except (*DAMAGE, ValueError) as error:
            text = _reason(error, sources[0])
            named = isinstance(error, OSError) and error.filename is not None
            if unit.kind != "files":  # whose output does not exist
                record |= {"pictures": 0, "bytes": 0, "copied": 0}
            return record | {"error": text if named else f"not a {unit.kind}, or damaged: {text}"}
        record["seconds"] = time.monotonic() - begin
        if unit.record:
            store_record(unit, record)
        return record

    def current_input(self) -> str | None:
        """Return the name of the picture or file that this thread works on, for warnings."""
        index = current_item()
        return self._inputs[index] if index is not None else None

    def _count(self, record: dict[str, Any], key: str, outcome: Outcome[bytes]) -> None:
        if outcome.value is None:
            record["faults"].append([key, _reason(outcome.error, key)])
        else:
            record["pictures"] += 1
            record["bytes"] += len(outcome.value)

    def _shard(self, unit: Unit, record: dict[str, Any]) -> None:
        (source,) = unit.sources
        with (
            open_for_reading(source.name) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=Checked) as tar,
            open_for_writing(unit.target) as out,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as made,
        ):
            samples = self._noted(source.name, samples_of(tar))
            for outcome in self._rows.files_of(samples, self._picture_in):
                sample: Sample = outcome.input
                members: dict[str, Any] = sample.members
                if isinstance(outcome.error, _NoPicture):
                    write_sample(made, sample.key, members)
                    record["copied"] += 1
                    continue
                self._count(record, sample.key, outcome)
                if outcome.value is None:
                    continue
                taken = self._taken_from(sample)
                renamed = {self._made if name == taken else name: members[name] for name in members}
                write_sample(made, sample.key, renamed | {self._made: outcome.value})

    def _noted(self, source: str, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self._inputs.append(f"{source}: {sample.key}")
            yield sample

    def _taken_from(self, sample: Sample) -> str | None:
        return next((name for name in sample.members if name.lower() in self._taken), None)

    def _picture_in(self, sample: Sample) -> bytes:
        name = self._taken_from(sample)
        if sample.too_large:
            raise ValueError(sample.too_large)
        if sample.repeated:
            raise ValueError(f"two members are named {sample.repeated}")
        if name is None:
            raise _NoPicture("the sample has no picture")
        others = (one for one in sample.members if one != name and one.lower() == self._made)
        for other in others:
            raise ValueError(f"its member {other} would be lost; the result has this name")
        return sample.members[name]

    def _files(self, unit: Unit, record: dict[str, Any]) -> None:
        def target(found: Found) -> str:
            return unit.target + found.below.rpartition(".")[0] + self._suffix

        def load(found: Found) -> bytes:
            return read(found.name, _MOST_BYTES)

        todo: list[Found] = []
        for one in unit.sources:
            if not exists(target(one)):
                todo.append(one)
                continue
            try:
                if is_local(target(one)):
                    check_kind(Path(target(one)), compressed=self._made == "pcv2")
            except ValueError as error:
                record["faults"].append([one.name, f"{target(one)}: {error}"])
        record["skipped"] = len(unit.sources) - len(todo) - len(record["faults"])
        self._inputs = [one.name for one in todo]
        for outcome in self._rows.files_of(todo, load):
            made = outcome
            if outcome.value is not None:
                try:
                    with open_for_writing(target(outcome.input)) as stream:
                        stream.write(outcome.value)
                except OSError as error:
                    made = Outcome(outcome.input, error=error)
            self._count(record, outcome.input.name, made)

    def _table(self, unit: Unit, record: dict[str, Any]) -> None:
        require("ray", "a parquet file", "pyarrow")
        import pyarrow
        import pyarrow.parquet

        (source,) = unit.sources
        row = 0
        with open_for_reading(source.name) as stream, open_for_writing(unit.target) as out:
            writer = None
            try:
                for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(_ROWS_AT_ONCE):
                    if self._column not in batch.schema.names:
                        names = ", ".join(batch.schema.names)
                        raise ValueError(f"no column {self._column!r}; there are {names}")
                    values = np.empty(len(batch), object)
                    values[:] = batch.column(self._column).to_pylist()
                    self._inputs = [f"{source.name}: {row + i}" for i in range(len(values))]
                    made = self._rows({self._column: values})
                    name = "pcv2" if "pcv2" in made else "image"
                    results = made[name]
                    for i, (result, error) in enumerate(zip(results, made["error"], strict=True)):
                        fault = ValueError(error) if error else None
                        self._count(record, str(row + i), Outcome(i, result, fault))
                    row += len(batch)
                    others = {
                        key: batch.column(key)
                        for key in batch.schema.names
                        if key != self._column and key not in made
                    }
                    columns = {key: pyarrow.array(list(made[key])) for key in made}
                    columns[name] = pyarrow.array(list(results), pyarrow.binary())
                    table = pyarrow.table(others | columns)
                    writer = writer or pyarrow.parquet.ParquetWriter(out, table.schema)
                    writer.write_table(table)
            except pyarrow.ArrowException as error:
                raise ValueError(str(error)) from error
            finally:
                if writer is not None:
                    writer.close()
            if writer is None:
                raise ValueError("the table has no rows")
