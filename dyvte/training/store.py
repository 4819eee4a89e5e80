"""Traces as they are read: columns that stay on the disk, and what they were made from."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyvte.data import DatasetDigest
from dyvte.training.content import Content, Shuffled
from dyvte.training.identity import FORMAT, PROVENANCE, check_mixable
from dyvte.training.mapped import MappedRows, MappedTexts, MappedUnits
from dyvte.training.plan import PLAN
from dyvte.training.units import TENSORS, DamagedUnit, Manifest, read_manifest, verify_unit


@dataclass
class TraceSet:
    """All traces of a data set. Those from a folder stay there but for ``agreement`` and ``dense_nll``.

    Attributes:
        state: float16 [n, L, 2d]; index it, or ``split`` it.
        visual: float16 [n, d].
        agreement, nll, kl: [n, L]; column e - 1 stands for exit layer e, see ``trace.Trace``.
        dense_nll: float32 [n].
        rows: per sample its id, kind, question, answers, traced answer and token counts.
        provenance: model, revision, data, dtype and versions.
        content: digests of the samples, where they are known.
    """

    state: torch.Tensor | MappedRows
    visual: torch.Tensor | MappedRows
    agreement: torch.Tensor
    nll: torch.Tensor | MappedRows
    kl: torch.Tensor | MappedRows
    dense_nll: torch.Tensor
    rows: Sequence[dict[str, Any]]
    provenance: dict[str, Any]
    content: Content | None = None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def num_layers(self) -> int:
        return self.agreement.shape[1]

    @property
    def kinds(self) -> list[str]:
        if isinstance(self.rows, MappedTexts):
            return self.rows.column("kind")
        return [row["kind"] for row in self.rows]

    @property
    def exits(self) -> list[int]:
        """The exit layers that were traced, L left out."""
        traced = self.provenance.get("exits")
        return list(range(1, self.num_layers)) if traced is None else traced

    def select(self, index: torch.Tensor | Sequence[int]) -> TraceSet:
        """Some of the samples, by index, in memory."""
        index = torch.as_tensor(index)
        tensors = {name: getattr(self, name)[index] for name in TENSORS}
        content = self.content
        if content is not None:
            content = content.select(index.numpy())
        return TraceSet(
            **tensors | {name: tensors[name].float() for name in ("nll", "kl")},
            rows=[self.rows[i] for i in index.tolist()],
            provenance=self.provenance,
            content=content,
        )


def load_traces(*folders: str | os.PathLike) -> TraceSet:
    """Traces from one or more folders, all of the same model, in the order of their samples.

    Every file is read once and compared with its SHA-256; after that states are read as they are needed.

    Raises:
        ValueError: a folder without traces, an unfinished or damaged one, or traces that do not go together.
    """
    if not folders:
        raise ValueError("no trace folder was named")
    first: dict[str, Any] | None = None
    data, prunings, contents, places = [], [], [], []
    units, digest = MappedUnits(), DatasetDigest()
    for folder in map(Path, folders):
        record = _read_json(folder / PROVENANCE, f"{folder} holds no traces: make some with `dyvte trace`")
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder} holds traces of another version of dyvte: trace again, into another folder")
        if first is not None:
            check_mixable(folder, first, record)
        first = first or record
        prunings.append(record.get("pruning"))
        data.append(record["data"])
        content, place = _read_folder(folder, record["samples"], units, digest)
        contents.append(content)
        places.append(place)
    unit, row = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*places))
    layers, size = first["num_layers"], first["hidden_size"]
    shapes = {"state": (layers, 2 * size), "visual": (size,), "dense_nll": ()}
    mapped = {name: MappedRows(units, name, unit, row, shapes.get(name, (layers,))) for name in TENSORS}
    agreement = mapped["agreement"][:]
    agreement[:, : first.get("min_layer", 1) - 1] = 0  # exits that the model does not allow count as changed answers
    return TraceSet(
        **mapped | {"agreement": agreement, "dense_nll": mapped["dense_nll"][:]},
        rows=MappedTexts(units, unit, row),
        provenance=first | {"data": data, "content": digest.hexdigest(), "pruning": _common(prunings)},
        content=Content.joined(contents),
    )


def _read_folder(
    folder: Path, samples: int, units: MappedUnits, digest: DatasetDigest
) -> tuple[Content, tuple[np.ndarray, np.ndarray]]:
    """Adds a folder to the units and to the digest; what its samples show, and the unit and row of each, in order."""
    index, unit, row, shuffled = array("q"), array("i"), array("B"), Shuffled()
    for number, manifest in _units(folder, samples):
        count = len(manifest.index)
        if count:
            index.extend(manifest.index)
            unit.extend([len(units)] * count)
            row.extend(range(count))
            shuffled.add(manifest.digests, manifest.images, manifest.answers)
            units.add(folder, number)
    if not index:
        raise ValueError(f"every sample of {folder} was skipped, see its manifests: there are no traces")
    order = np.argsort(np.frombuffer(index, np.int64))
    shuffled.update(digest, order)
    return shuffled.content(order), (
        np.frombuffer(unit, np.int32)[order],
        np.frombuffer(row, np.uint8)[order],
    )


def _common(prunings: list[Any]) -> Any:
    """The pruning that all were traced on top of; a list of them where they differ, which heads may learn from."""
    return prunings[0] if all(pruning == prunings[0] for pruning in prunings) else prunings


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(missing) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder and trace again") from error


def _units(folder: Path, samples: int) -> Iterator[tuple[int, Manifest]]:
    """All units of a folder, each as it was written.

    Raises:
        ValueError: some are missing or damaged.
    """
    again = "run `dyvte trace` again, it goes on where it stopped"
    planned_units = _read_json(folder / PLAN, f"{folder} has no {PLAN}: {again}")["units"]
    ends = np.cumsum([0, *map(len, planned_units)])
    indices = np.fromiter(chain.from_iterable(planned_units), np.int64, ends[-1])
    del planned_units  # lists of numbers are many times as large
    finished, done, damaged = array("i"), 0, []
    for number in range(len(ends) - 1):
        planned = indices[ends[number] : ends[number + 1]].tolist()
        try:
            manifest = read_manifest(folder, number, planned)
            if manifest is not None:
                verify_unit(folder, number, manifest)
                finished.append(number)
                done += len(planned)
        except DamagedUnit as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"{len(damaged)} units are damaged ({damaged[0]}): {again} and makes them anew")
    if done != samples:
        raise ValueError(f"{folder} holds {done} of {samples} traces: {again}")
    for number in finished:
        yield number, read_manifest(folder, number, indices[ends[number] : ends[number + 1]].tolist())
