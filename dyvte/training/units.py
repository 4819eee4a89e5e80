"""A unit of traces on disk: an Arrow file, and beside it a manifest, written last, that says what the file must hold.

Columns of a unit:

    id, kind, question, answers, traced_answer, text_tokens, visual_tokens
    state      float16 [L * 2d]     visual    float16 [d]
    agreement  float32 [L]          nll, kl   float16 [L]       dense_nll  float32
    visual_counts  int32 [L], under a pruning: the visual tokens that every layer works on without an exit
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from dyvte.provenance import atomic_path, write_json

TENSORS = ("state", "visual", "agreement", "nll", "kl", "dense_nll")


class DamagedUnit(ValueError):
    """A unit whose files are not what was written."""


@dataclass
class Manifest:
    """What a unit holds.

    Attributes:
        index: of each sample in the data set, ascending, as the rows of the file are.
        ids: of the samples.
        digests: :func:`dyvte.data.sample_digest` of each.
        images: :func:`dyvte.data.image_digest` of each image of each.
        answers: the accepted answers of each.
        skipped: samples left out: index, id, file and reason.
        bytes, sha256: of the file; a unit of which every sample was skipped has none.
    """

    index: list[int]
    ids: list[str]
    digests: list[str]
    images: list[list[str]]
    answers: list[list[str]]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0
    sha256: str | None = None


def data_file(folder: Path, number: int) -> Path:
    return folder / "units" / f"{number:06d}.arrow"


def manifest_file(folder: Path, number: int) -> Path:
    return folder / "units" / f"{number:06d}.json"


def write_unit(folder: Path, number: int, rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
    """Writes the rows of a unit, then its manifest: until both are there the unit does not count."""
    (folder / "units").mkdir(exist_ok=True)
    if rows:
        path = data_file(folder, number)
        with atomic_path(path) as fresh:
            with ArrowWriter(path=str(fresh), features=_features(rows[0])) as writer:
                writer.write_batch({name: [row[name] for row in rows] for name in writer.schema.names})
                writer.finalize()
            manifest.bytes, manifest.sha256 = fresh.stat().st_size, sha256_of(fresh)
    write_json(manifest_file(folder, number), asdict(manifest))


def _features(row: Mapping[str, Any]) -> datasets.Features:
    value = datasets.Value

    def numbers(kind: str, name: str) -> datasets.List:
        return datasets.List(value(kind), length=len(row[name]))

    return datasets.Features(
        {name: value("string") for name in ("id", "kind", "question", "traced_answer")}
        | {"answers": datasets.List(value("string")), "text_tokens": value("int32"), "visual_tokens": value("int32")}
        | {name: numbers("float16", name) for name in ("state", "visual", "nll", "kl")}
        | {"agreement": numbers("float32", "agreement"), "dense_nll": value("float32")}
        | ({"visual_counts": numbers("int32", "visual_counts")} if "visual_counts" in row else {})
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, number: int, planned: Sequence[int]) -> Manifest | None:
    """The manifest of a unit; None if the unit was never finished.

    Raises:
        DamagedUnit: it is no manifest of these samples, or the data file is missing or of another size.
    """
    path = manifest_file(folder, number)
    try:
        manifest = Manifest(**json.loads(path.read_text()))
        present = sorted([*manifest.index, *(one["index"] for one in manifest.skipped)])
        columns = (manifest.ids, manifest.digests, manifest.images, manifest.answers)
        whole = all(len(column) == len(manifest.index) for column in columns)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedUnit(f"{path} is damaged: {error}") from error
    if not whole or present != list(planned):
        raise DamagedUnit(f"{path} is damaged: it is not about the samples of the plan")
    if manifest.index:
        file = data_file(folder, number)
        size = file.stat().st_size if file.exists() else None
        if size != manifest.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise DamagedUnit(f"{file} {found} where {manifest.bytes:,} bytes were written")
    return manifest


def verify_unit(folder: Path, number: int, manifest: Manifest) -> None:
    """Reads the data file of a unit and compares it with what was written.

    Raises:
        DamagedUnit: they differ.
    """
    if manifest.index and sha256_of(data_file(folder, number)) != manifest.sha256:
        raise DamagedUnit(f"{data_file(folder, number)} was changed after it was written: its SHA-256 differs")
