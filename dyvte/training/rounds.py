"""Who traces what when: the unfinished units dealt out among ranks, in step where they share a model.

Where every rank has a copy of the model it takes its units one after the other. Ranks that share its weights (FSDP2,
ZeRO-3) take a unit each at a time, and one that has fewer batches repeats one until all are done, since a layer's
weights come only when all ranks ask for them. Ranks that share its work (tensor parallel) run the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dyvte.data import Readable, Sample, TooManyErrors, image_digest, sample_digest
from dyvte.loading import Sharing
from dyvte.ranks import Ranks
from dyvte.training.plan import Plan
from dyvte.training.units import Manifest

Trace = Callable[[list[Sample]], list[dict[str, Any]]]
Batch = list[tuple[int, Sample]]


@dataclass(frozen=True)
class Unit:
    """A unit as it was traced.

    Attributes:
        number: in the plan; None if another rank writes it.
        rows, manifest: see :func:`dyvte.training.units.write_unit`.
        samples: how many are done with it, the skipped ones included.
    """

    number: int | None
    rows: list[dict[str, Any]]
    manifest: Manifest
    samples: int


class Rounds:
    """The unfinished units of a plan, as one rank goes through them.

    Args:
        todo: the unfinished units, the same list on all ranks.
        readable: the samples; what it has skipped so far all ranks know of.
        sharing: what of the model ranks have in common, see :func:`dyvte.loading.sharing`.
    """

    def __init__(self, plan: Plan, todo: Sequence[int], readable: Readable, ranks: Ranks, sharing: Sharing):
        self.plan, self.todo, self.readable, self.ranks = plan, list(todo), readable, ranks
        self.sharing: Sharing = sharing if ranks.world_size > 1 else "none"
        self._known, self._skipped = len(readable.skipped), ranks.counter()

    def run(self, trace: Trace) -> Iterator[Unit]:
        """Traces unit after unit."""
        stride = 1 if self.sharing == "work" else self.ranks.world_size
        for start in range(0, len(self.todo), stride):
            dealt = self.todo[start : start + stride]
            place = 0 if self.sharing == "work" else self.ranks.rank
            number = dealt[place] if place < len(dealt) else None
            if self.sharing == "none":
                self.ranks.check()
                if number is not None:
                    read = self._read(number)
                    yield self._unit(number, read, self._rows(trace, self.plan.batches(read)))
                continue
            read = [] if number is None else self._read(number)
            rows = self._in_step(trace, self.plan.batches(read), dealt)
            if number is not None:
                yield self._unit(number, read, rows)

    def _rows(self, trace: Trace, batches: Sequence[Batch]) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        for batch in batches:
            rows |= {index: row for (index, _), row in zip(batch, trace([sample for _, sample in batch]))}
        return rows

    def _in_step(self, trace: Trace, batches: Sequence[Batch], dealt: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The rows of the batches; as many steps as the rank with the most of them takes."""
        counts = self.ranks.gather(len(batches))
        if self.sharing == "work" and len(set(counts)) > 1:
            raise ValueError(
                f"ranks read {counts} batches of the same unit: see to it that all machines read the same files"
            )
        rows, steps = self._rows(trace, batches), max(counts)
        if steps > len(batches):
            again = batches[-1] if batches else self._borrowed(dealt, counts)
            for _ in range(steps - len(batches)):
                trace([sample for _, sample in again])
        return rows

    def _borrowed(self, dealt: Sequence[int], counts: Sequence[int]) -> Batch:
        """A batch of the first rank that has any."""
        owner = next(rank for rank, count in enumerate(counts) if count)
        others = Readable(self.readable.samples, "skip", self.readable.max_errors + len(self.plan.units[dealt[owner]]))
        return self.plan.batches(list(others.at(self.plan.units[dealt[owner]])))[-1]

    def _read(self, number: int) -> Batch:
        """The readable samples of a unit.

        Raises:
            TooManyErrors: all ranks together have skipped too many.
        """
        before = len(self.readable.skipped)
        read = list(self.readable.at(self.plan.units[number]))
        more = len(self.readable.skipped) - before
        writes = self.sharing != "work" or self.ranks.first
        total = self._known + self._skipped(more if writes else 0)
        if total > self.readable.max_errors:
            raise TooManyErrors(list(self.readable.skipped.values()), self.readable.max_errors, total)
        return read

    def _unit(self, number: int, read: Batch, rows: dict[int, dict[str, Any]]) -> Unit:
        mine = self.sharing != "work" or self.ranks.first
        images = [[image_digest(image) for image in sample.images] for _, sample in read]
        planned = set(self.plan.units[number])
        manifest = Manifest(
            index=[index for index, _ in read],
            ids=[sample.id for _, sample in read],
            digests=[sample_digest(sample, some) for (_, sample), some in zip(read, images)],
            images=images,
            answers=[list(sample.answers) for _, sample in read],
            skipped=[one for one in self.readable.record() if one["index"] in planned],
        )
        return Unit(number if mine else None, [rows[i] for i in manifest.index], manifest, len(planned) * mine)
