"""Some tokens of a [batch, sequence] grid, kept compact."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class KeptTokens:
    """Which columns of a [batch, sequence] grid are kept, compacted to the right.

    Attributes:
        index: long [batch, width], the column each place comes from; distinct within a row.
        valid: bool [batch, width]; False on the left of rows that keep fewer columns than ``width``.
        ragged: whether any place is not valid.
    """

    index: torch.Tensor
    valid: torch.Tensor
    ragged: bool
    _reordered: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def from_mask(cls, keep: torch.Tensor) -> KeptTokens:
        """The columns where ``keep`` (bool [batch, sequence]) is True, in order; at least one place wide."""
        counts = keep.sum(1)
        width, fewest = max(int(counts.max()), 1), int(counts.min())
        index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
        return cls(index, keep.gather(1, index), ragged=fewest < width)

    @classmethod
    def whole(cls, valid: torch.Tensor) -> KeptTokens:
        """Every column, in place; ``valid`` [batch, sequence] is False at padding."""
        return cls(torch.arange(valid.shape[1], device=valid.device).expand_as(valid), valid, ragged=True)

    @property
    def width(self) -> int:
        return self.index.shape[1]

    def rows(self, rows: torch.Tensor) -> KeptTokens:
        """The same columns for some rows of the batch."""
        return KeptTokens(self.index[rows], self.valid[rows], self.ragged)

    def reordered(self, order: torch.Tensor) -> KeptTokens:
        """Like :meth:`rows`; the same object for the same ``order``, so that layers go on sharing their tokens."""
        if not self._reordered or self._reordered[0] is not order:
            self._reordered[:] = order, self.rows(order.to(self.index.device))
        return self._reordered[1]

    def gather(self, grid: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """[batch or 1, sequence, ...] -> [n, width, ...], where n rows of the grid are chosen by ``rows``, or all."""
        index = self.index.to(grid.device)
        if len(grid) == 1:
            return grid[0][index]
        rows = torch.arange(len(index), device=grid.device) if rows is None else rows.to(grid.device)
        return grid[rows[:, None], index]

    def places(self, sequence: int) -> torch.Tensor:
        """Where each column is kept: long [batch, sequence], to be read at kept columns only."""
        inverse = self.index.new_zeros(len(self.index), sequence)
        place = torch.arange(self.width, device=self.index.device).expand_as(self.index)
        return inverse.scatter_(1, self.index, place)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Where text states are read and decided on: as they were when the heads were trained, whatever autocast is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
