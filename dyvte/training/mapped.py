"""Columns of many units, read where they lie: a file is mapped while its rows are copied, and no longer."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from dyvte.training.units import TENSORS, data_file

OPEN = 64  # units whose texts stay mapped


class MappedUnits:
    """Where the numbers of units lie in their Arrow files; of each unit no more than that is held."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.places = array("i"), array("i")  # of each unit its folder and its number
        self.offsets = {name: array("q") for name in TENSORS}
        self.types: dict[str, np.dtype] = {}
        self.sizes: dict[str, int] = {}  # of a row

    def __len__(self) -> int:
        return len(self.places[0])

    def add(self, folder: Path, number: int) -> None:
        """Takes in a unit."""
        with pyarrow.memory_map(str(data_file(folder, number))) as file:
            start, table = file.read_buffer().address, self._read(file)
            for name in TENSORS:
                (column,) = table.column(name).chunks  # a unit is written as one batch
                values = column.flatten() if hasattr(column, "flatten") else column
                self.types[name] = np.dtype(values.type.to_pandas_dtype())
                self.sizes[name] = len(values) // len(column)
                at = values.buffers()[1].address - start + values.offset * self.types[name].itemsize
                self.offsets[name].append(at)
        if self.folders[-1:] != [folder]:
            self.folders.append(folder)
        for values, value in zip(self.places, (len(self.folders) - 1, number)):
            values.append(value)

    def rows(self, name: str, unit: int, rows: np.ndarray) -> np.ndarray:
        """Some rows of a numeric column: [len(rows), size]."""
        kind, size = self.types[name], self.sizes[name]
        count = (int(rows.max()) + 1) * size
        with self._map(unit) as file:
            values = file.read_at(count * kind.itemsize, self.offsets[name][unit])  # a view: only what is used is read
            return np.frombuffer(values, kind, count).reshape(-1, size)[rows]

    def texts(self, unit: int) -> pyarrow.Table:
        """The columns of a unit that are no numbers to learn from."""
        with self._map(unit) as file:
            return self._read(file).drop_columns(list(TENSORS))

    def _map(self, unit: int) -> pyarrow.MemoryMappedFile:
        folder, number = (values[unit] for values in self.places)
        return pyarrow.memory_map(str(data_file(self.folders[folder], number)))

    @staticmethod
    def _read(file: pyarrow.MemoryMappedFile) -> pyarrow.Table:
        file.seek(0)
        return pyarrow.ipc.open_stream(file).read_all()


class MappedRows:
    """A numeric column of many units: rows are read when asked for, so it takes no memory however many there are.

    Functions of torch take it as the tensor [n, *shape] that it stands for, and read all of it.

    Args:
        units: what holds the column.
        name: of the column.
        unit, row: whole numbers [n] each, where every row is.
        shape: of a row.
    """

    def __init__(self, units: MappedUnits, name: str, unit: torch.Tensor, row: torch.Tensor, shape: Sequence[int]):
        self.units, self.name, self.unit, self.row = units, name, unit, row
        self.shape = torch.Size([len(unit), *shape])
        self.dtype = torch.from_numpy(np.empty(0, units.types[name])).dtype

    def __len__(self) -> int:
        return len(self.unit)

    def __getitem__(self, index: Any) -> torch.Tensor:
        unit, row = self.unit[index], self.row[index]
        out = np.empty((unit.numel(), self.shape[1:].numel()), self.units.types[self.name])
        rows = row.flatten().numpy()
        order = np.argsort(unit.flatten().numpy(), kind="stable")  # every unit is opened once
        numbers, starts = np.unique(unit.flatten().numpy()[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, starts[1:])):
            out[places] = self.units.rows(self.name, number, rows[places])
        return torch.from_numpy(out).view(*unit.shape, *self.shape[1:])

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """The rows in order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(a[:] if isinstance(a, cls) else a for a in args), **kwargs or {})


class MappedTexts(Sequence[dict[str, Any]]):
    """The other columns of many units, a dictionary a sample; units are opened as they are needed.

    Args:
        units: what holds them.
        unit, row: whole numbers [n] each, where every sample is.
    """

    def __init__(self, units: MappedUnits, unit: torch.Tensor, row: torch.Tensor):
        self.units, self.unit, self.row = units, unit, row
        self._table = lru_cache(OPEN)(units.texts)

    def __len__(self) -> int:
        return len(self.unit)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return MappedTexts(self.units, self.unit[index], self.row[index])
        return self._table(int(self.unit[index])).slice(int(self.row[index]), 1).to_pylist()[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def column(self, name: str) -> list[Any]:
        """One column of all samples."""
        columns = [self.units.texts(unit).column(name).to_pylist() for unit in range(len(self.units))]
        return [columns[u][r] for u, r in zip(self.unit.tolist(), self.row.tolist())]
