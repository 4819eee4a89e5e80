"""Traces as they are read: columns that stay on the disk, and what they were made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyvte.data import DatasetDigest
from dyvte.training.identity import FORMAT, PROVENANCE, check_mixable
from dyvte.training.plan import PLAN
from dyvte.training.units import (
    TENSORS,
    DamagedUnit,
    Manifest,
    MappedRows,
    MappedTexts,
    column_of,
    map_unit,
    read_manifest,
    verify_unit,
)


@dataclass(frozen=True)
class Content:
    """What the samples of traces show, as SHA-256 digests of 32 bytes.

    Attributes:
        samples: uint8 [n, 32], see :func:`dyvte.data.sample_digest`.
        images: uint8 [m, 32], see :func:`dyvte.data.image_digest`, of all samples in order.
        owner: [m], the sample that shows each image.
    """

    samples: np.ndarray
    images: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[str], images: Sequence[Sequence[str]]) -> Content:
        """From hexadecimal digests, those of the images sample by sample."""
        owner = np.repeat(np.arange(len(images)), [len(some) for some in images])
        return cls(_bytes(samples), _bytes([digest for some in images for digest in some]), owner)

    def select(self, index: np.ndarray) -> Content:
        """Those of some samples, in their order."""
        start = np.searchsorted(self.owner, index)
        count = np.searchsorted(self.owner, index, side="right") - start
        owner = np.repeat(np.arange(len(index)), count)
        shown = np.repeat(start - np.cumsum(count) + count, count) + np.arange(len(owner))
        return Content(self.samples[index], self.images[shown], owner)

    def sketch(self) -> dict[str, torch.Tensor]:
        """What heads remember of the samples they were trained on, see :class:`dyvte.ExitHeads`."""
        return {"samples": torch.from_numpy(short(self.samples)), "images": torch.from_numpy(short(self.images))}

    @staticmethod
    def joined(parts: Sequence[Content]) -> Content:
        starts = np.cumsum([0, *(len(part.samples) for part in parts)])
        return Content(
            np.concatenate([part.samples for part in parts]),
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.owner + start for part, start in zip(parts, starts)]),
        )


def short(digests: np.ndarray) -> np.ndarray:
    """The first 64 bits of digests, sorted, each once: enough to tell millions of samples apart."""
    return np.unique(np.ascontiguousarray(digests[:, :8]).view(np.int64))


def _bytes(digests: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)


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
    data, contents, places, prunings = [], [], [], []
    units: list[tuple[Path, int]] = []
    columns: dict[str, list[Any]] = {name: [] for name in (*TENSORS, "answers")}
    for folder in map(Path, folders):
        record = _read_json(folder / PROVENANCE, f"{folder} holds no traces: make some with `dyvte trace`")
        if record.get("format") != FORMAT:
            raise ValueError(f"{folder} holds traces of another version of dyvte: trace again, into another folder")
        if first is not None:
            check_mixable(folder, first, record)
        first = first or record
        prunings.append(record.get("pruning"))
        data.append(record["data"])
        index, place, content = [], [], []
        for number, manifest in _units(folder, record["samples"]):
            if not manifest.index:
                continue
            index += manifest.index
            place.append(np.stack([np.full(len(manifest.index), len(units)), np.arange(len(manifest.index))], 1))
            content.append(Content.of(manifest.digests, manifest.images))
            units.append((folder, number))
            table = map_unit(folder, number)
            for name in TENSORS:
                columns[name].append(column_of(table, name))
            columns["answers"].append(table.column("answers").combine_chunks())
        if not index:
            raise ValueError(f"every sample of {folder} was skipped, see its manifests: there are no traces")
        order = np.argsort(index)
        contents.append(Content.joined(content).select(order))
        places.append(np.concatenate(place)[order])
    unit, row = torch.from_numpy(np.concatenate(places)).T.contiguous()
    layers, size = first["num_layers"], first["hidden_size"]
    shapes = {"state": (layers, 2 * size), "visual": (size,), "dense_nll": ()}
    mapped = {name: MappedRows(columns[name], unit, row, shapes.get(name, (layers,))) for name in TENSORS}
    agreement = mapped["agreement"][:]
    agreement[:, : first.get("min_layer", 1) - 1] = 0  # exits that the model does not allow count as changed answers
    content, digest = Content.joined(contents), DatasetDigest()
    for shown, u, r in zip(content.samples, unit.tolist(), row.tolist()):
        digest.update(shown.tobytes().hex(), columns["answers"][u][r].as_py())
    return TraceSet(
        **mapped | {"agreement": agreement, "dense_nll": mapped["dense_nll"][:]},
        rows=MappedTexts(units, unit, row),
        provenance=first | {"data": data, "content": digest.hexdigest(), "pruning": _common(prunings)},
        content=content,
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
    plan = _read_json(folder / PLAN, f"{folder} has no {PLAN}: {again}")
    finished, done, damaged = [], 0, []
    for number, planned in enumerate(plan["units"]):
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
        yield number, read_manifest(folder, number, plan["units"][number])
