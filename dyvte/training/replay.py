"""Traces that come and go: samples traced round by round, and the latest of them kept to learn from again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from dyvte.data import Sample
from dyvte.heads import ExitHeadsConfig
from dyvte.training.labels import labels_of
from dyvte.training.learner import Batch, key
from dyvte.training.parallel import Group

Trace = Callable[[list[Sample]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Example:
    """A trace to learn from: float16 states [L, 2d] and mean visual token [d], and bool labels [columns]."""

    id: str
    state: torch.Tensor
    visual: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, row: Mapping[str, Any], config: ExitHeadsConfig) -> Example:
        """From a row of :func:`dyvte.training.tracer.trace_samples`, with the labels that such heads learn."""
        agreement = torch.from_numpy(np.array(row["agreement"]))[None]
        agreement[:, : config.min_layer - 1] = 0  # exits that the model does not allow count as changed answers
        nll = torch.from_numpy(np.array(row["nll"])).float()[None]
        labels = labels_of(config.label_rule, agreement, nll, torch.tensor([row["dense_nll"]]))[0]
        state = torch.from_numpy(np.array(row["state"])).view(config.num_layers, -1)
        decided = labels[[e - 1 for e in config.decided]]
        return cls(row["id"], state, torch.from_numpy(np.array(row["visual"])), decided)


class Stream:
    """Samples in rounds. What is batched with what does not depend on how many ranks trace.

    Args:
        indices: of the samples that are traced, once in each pass.
        trace: traces a batch on this rank.
        sharing: what ranks have in common of the model, see :func:`dyvte.loading.sharing`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        indices: Sequence[int],
        trace: Trace,
        group: Group,
        *,
        round_size: int,
        batch_size: int,
        passes: int = 1,
        seed: int = 0,
        sharing: str = "none",
    ):
        self.samples, self.indices, self.trace, self.group = samples, list(indices), trace, group
        self.round_size, self.batch_size, self.seed, self.sharing = round_size, batch_size, seed, sharing
        self.rounds = -(-len(self.indices) // round_size)  # of a pass
        self.passes, self._order = passes, lru_cache(1)(self._shuffled)

    def __len__(self) -> int:
        return self.passes * self.rounds

    def seen(self, number: int) -> int:
        """How many traces there are before a round."""
        whole, part = divmod(number, self.rounds)
        return whole * len(self.indices) + part * self.round_size

    def run(self, number: int) -> dict[int, dict[str, Any]]:
        """Traces a round.

        Returns:
            The rows that fell to this rank, by their number among all traces.
        """
        rank, size = self.group.rank, self.group.size
        batches, found = self._batches(number), {}
        stride = 1 if self.sharing == "work" else size  # batches that are traced at once
        for start in range(0, len(batches), stride):
            own = start + (rank if stride > 1 else 0)
            # Ranks that share weights must all call the model: one without a batch repeats another's.
            batch = batches[min(own, len(batches) - 1)] if self.sharing != "none" or own < len(batches) else []
            with self.group.together():
                rows = self.trace([self.samples[index] for _, index in batch]) if batch else []
            if own < len(batches) and (stride > 1 or own % size == rank):
                found |= {serial: row for (serial, _), row in zip(batch, rows)}
        return found

    def _batches(self, number: int) -> list[list[tuple[int, int]]]:
        """Serial numbers and indices of a round, like lengths together."""
        first, part = self.seen(number), number % self.rounds
        order = self._order(number // self.rounds)[part * self.round_size : (part + 1) * self.round_size]
        members = [(first + place, self.indices[i]) for place, i in enumerate(order)]
        lengths = getattr(self.samples, "lengths", None)
        if lengths is not None:
            members.sort(key=lambda one: (lengths[one[1]], one))
        return [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]

    def _shuffled(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(key(self.seed, "pass", number))
        return torch.randperm(len(self.indices), generator=generator).tolist()


class Replay:
    """The latest traces. Each rank keeps those it traced.

    Args:
        size: how many are kept, over all ranks.
        config: of the heads that learn.
    """

    def __init__(self, size: int, config: ExitHeadsConfig):
        self.size, self.seen = size, 0
        self.shape, self.columns = (config.num_layers, 2 * config.hidden_size), len(config.decided)
        self.examples: dict[int, Example] = {}

    def add(self, examples: Mapping[int, Example], seen: int) -> None:
        """Takes in this rank's traces.

        Args:
            seen: how many there have been by then, over all ranks.
        """
        self.seen = seen
        oldest = seen - self.size
        kept = self.examples | examples
        self.examples = {serial: example for serial, example in kept.items() if serial >= oldest}

    def draw(self, count: int, seed: int) -> tuple[int, list[int], Callable[[Sequence[int]], Batch]]:
        """A batch of different traces: how many, this rank's places in it, and what reads those."""
        first = max(0, self.seen - self.size)
        generator = torch.Generator().manual_seed(seed)
        serials = (first + torch.randperm(self.seen - first, generator=generator)[:count]).tolist()
        mine = [place for place, serial in enumerate(serials) if serial in self.examples]
        return len(serials), mine, lambda places: self._read([serials[place] for place in places])

    def _read(self, serials: Sequence[int]) -> Batch:
        chosen = [self.examples[serial] for serial in serials]
        state = torch.empty(len(chosen), *self.shape, dtype=torch.float16)
        labels = torch.empty(len(chosen), self.columns, dtype=torch.bool)
        for row, one in enumerate(chosen):
            state[row], labels[row] = one.state, one.labels
        return state, labels, lambda rows: [chosen[row].id for row in rows]

    def parts(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's states and mean visual tokens, part by part."""
        kept = list(self.examples.values())
        for start in range(0, len(kept), size):
            part = kept[start : start + size]
            yield torch.stack([one.state for one in part]), torch.stack([one.visual for one in part])
