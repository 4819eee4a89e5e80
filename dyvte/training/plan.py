"""The plan of a trace: which samples make up which unit of work. It is written before the first unit.

Units are what ranks share and what a restart repeats. The plan fixes what is batched with what, so any rank computes
any unit with the same bits, and the number of ranks may change on the way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dyvte.data import Sample
from dyvte.provenance import fingerprint

PLAN = "plan.json"
MAX_UNIT = 32  # samples
WINDOW = 64  # units among which samples of one length are sought


@dataclass(frozen=True)
class Plan:
    """Units of samples.

    Attributes:
        units: indices of the samples of each unit, ascending.
        batch_size: samples per forward pass, inside a unit.
        seed: of the order of the samples.
    """

    units: list[list[int]]
    batch_size: int
    seed: int

    @classmethod
    def of(
        cls, count: int, batch_size: int, unit_size: int, seed: int = 0, lengths: Sequence[int] | None = None
    ) -> Plan:
        """Every unit is a random part of the samples; where lengths are known, a random part of those of one length.

        Args:
            count: how many samples there are.
            unit_size: samples per unit; the last unit may be smaller.
            lengths: something that grows with the text of each sample.

        Raises:
            ValueError: a size out of range.
        """
        if not isinstance(unit_size, int) or not 1 <= unit_size <= MAX_UNIT:
            raise ValueError(f"unit_size must be 1 ... {MAX_UNIT} samples, what a kill may cost, not {unit_size!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size!r}")
        draw = random.Random(seed)
        order = draw.sample(range(count), count)
        if lengths is not None:
            window = WINDOW * unit_size
            parts = (sorted(order[i : i + window], key=lengths.__getitem__) for i in range(0, count, window))
            order = [index for part in parts for index in part]
        units = [sorted(order[i : i + unit_size]) for i in range(0, count, unit_size)]
        whole = count // unit_size
        draw_order = draw.sample(range(whole), whole)
        return cls([units[i] for i in draw_order] + units[whole:], batch_size, seed)

    def batches(self, samples: Sequence[tuple[int, Sample]]) -> list[list[tuple[int, Sample]]]:
        """The readable samples of a unit, with their indices, as they run: like sizes of image and text together."""

        def size(one: tuple[int, Sample]) -> tuple[int, int, int]:
            index, sample = one
            return (
                sum(i.width * i.height for i in sample.images),
                len(sample.question) + len(str(sample.history)),
                index,
            )

        order = sorted(samples, key=size)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Changes with which samples make up which unit."""
        return fingerprint([self.units, self.seed])
