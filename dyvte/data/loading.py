"""Rows from files and from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from dyvte.data.errors import DamageError

JSON_FILES = (".json", ".jsonl")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


class Table(Sequence[dict[str, Any]]):
    """Rows of a ``datasets`` table, in which pictures are still bytes or names of files.

    The library itself would decode every picture of a row, wanted or not, and say of none which one is broken.
    """

    def __init__(self, data: datasets.Dataset):
        pictures = [name for name, feature in data.features.items() if _has_pictures(feature)]
        self.data, self.column_names = data, data.column_names
        self._text = data.select_columns([name for name in data.column_names if name not in pictures])
        self._pictures = data.select_columns(pictures).with_format("arrow") if pictures else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self._text[index]) if self._text.column_names else {}
        return row if self._pictures is None else row | self._pictures[index].to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._text) if self._pictures is None else super().__iter__()

    def column(self, name: str) -> list[Any]:
        """All values of a column that holds no pictures."""
        return list(self.data[name])

    def filled(self, name: str) -> list[bool]:
        """Which rows have a value, or a list with any, in a column; no picture is read for it."""
        if self._pictures is None or name not in self._pictures.column_names:
            return [value not in (None, "", []) for value in self.column(name)]
        values = self._pictures.select_columns([name])[:].column(name)
        if pa.types.is_struct(values.type):
            return pc.is_valid(values).to_pylist()
        return pc.greater(pc.fill_null(pc.list_value_length(values), 0), 0).to_pylist()

    def part(self, names: Iterable[str]) -> Table:
        """The same rows with these columns alone."""
        return Table(self.data.select_columns(list(names)))

    def select(self, rows: Sequence[int]) -> Table:
        """Some of the rows, in this order."""
        return Table(self.data.select(rows))


def _has_pictures(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_has_pictures, feature.values()))
    return isinstance(feature, datasets.Image) or _has_pictures(getattr(feature, "feature", {}))


def load_table(config: Mapping[str, Any], name: str | None, split: str | None) -> Table:
    """The rows of a data set on the hub, a folder or a file of it.

    Args:
        config: a data config, for its ``path`` and ``revision``.
        name: the configuration of the data set.
        split: the split; may be left out where there is one.

    Raises:
        ValueError: there is no such thing.
    """
    path = Path(str(config["path"]))
    if name is not None and (path / name).is_dir() and not (path / "README.md").exists():
        path, name = path / name, None  # a folder for each configuration, without the card that names them
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(str(path))
        elif path.is_file():
            files = {split or "train": str(path)}
            data = datasets.load_dataset(BUILDERS[path.suffix], name, data_files=files, split=split)
        else:
            data = datasets.load_dataset(str(path), name, split=split, revision=config.get("revision"))
    except Exception as error:  # the library raises a dozen kinds, all of which mean a wrong source
        raise ValueError(
            f"cannot load {path} (configuration {name!r}): {error}. Give the id of a data set on the hub or a folder "
            "of parquet, arrow, json or csv files as `path`, and its configuration as `name`"
        ) from error
    if isinstance(data, datasets.Dataset):
        return Table(data)
    if split is None and len(data) == 1:
        split = next(iter(data))
    if split not in data:
        raise ValueError(f"{path} has no split {split!r}: choose from {', '.join(map(str, data))}")
    return Table(data[split])


def load_json(path: Path) -> list[Any]:
    """The rows of a JSON file, whose values need not be of one type: a list of them, or one on each line.

    A line that is no JSON is a :class:`DamageError` in the place of its row.

    Raises:
        ValueError: there is no such file, or neither a list nor any row can be read from it.
    """
    if path.suffix not in JSON_FILES or not path.is_file():
        raise ValueError(
            f"there is no JSON file {path}: give a .json or .jsonl file as `path`, or set format to messages where the "
            "rows are on the hub or in other files"
        )
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"[":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}. Download or write it again") from error
    rows: list[Any] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                rows.append(DamageError(f"line {number} is not valid JSON: {error}"))
    if not any(isinstance(row, Mapping) for row in rows):
        first = "it is empty" if not rows else str(rows[0])[:200]
        raise ValueError(f"{path} holds neither a list of rows nor one row on each line: {first}")
    return rows
