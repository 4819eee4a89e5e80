"""What reductions say about a prompt while it goes through the layers, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dyvte.runtime.attention import AttentionCall
from dyvte.runtime.bypass import Bypass, by_layer
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.regroup import regroup, split
from dyvte.runtime.verdict import Verdict
from dyvte.runtime.view import LayerView
from dyvte.runtime.vision import VisionAttention


class Decisions:
    """Asks the reductions of one prompt, and takes away what they drop.

    Attributes:
        exits: long [batch] on the CPU, after how many layers the last visual token of each sample was gone.
        bypasses: by layer, who chooses the tokens that it works on.
    """

    def __init__(self, spec: DecoderSpec, batch: int):
        self.spec, self.exits = spec, torch.full((batch,), spec.num_layers)
        self.bypasses: dict[int, Bypass] = {}
        self._reductions: list[Reduction] = []
        self._verdicts: dict[int, list[Verdict]] = {}

    def start(self, method: Reduction, everyone: Group) -> None:
        """Asks a method what it has to say about the prompt of a group, that of the whole batch."""
        view = LayerView(everyone, torch.arange(len(everyone.samples)), 0, self.spec)
        self.bypasses = by_layer(method.parts())
        started = [part.start(view) for part in method.parts()]
        self._reductions = [reduction for reduction in started if reduction.layers is None or reduction.layers]
        for reduction in self._reductions:
            places = _places(everyone, reduction)
            if len(places) and reduction.reads_text:
                everyone.reader(places)  # here the host waits anyway; later a GPU's queue would run dry

    def reduce(
        self,
        index: int,
        groups: Sequence[Group],
        attention: Mapping[int, AttentionCall],
        vision: VisionAttention | None,
    ) -> list[Group]:
        """Asks whose turn it is before layer ``index``, all about the same tokens; drops what any of them drops.

        Args:
            attention: of the layer before, by group.
            vision: that of the vision tower.

        Returns:
            the groups that go on.
        """
        for reduction in self._reductions:
            layer = index + reduction.lookahead
            if (index > 0 or layer == 0) and self._asks(reduction, layer):
                for group in groups:
                    self._ask(reduction, group, layer, attention.get(id(group)), vision)
        verdicts = self._verdicts.pop(index, None)
        return list(groups) if verdicts is None else self._apply(index, groups, verdicts)

    def _asks(self, reduction: Reduction, layer: int) -> bool:
        allowed = self.spec.first <= layer <= self.spec.largest
        return allowed and (reduction.layers is None or layer in reduction.layers)

    def _ask(
        self,
        reduction: Reduction,
        group: Group,
        layer: int,
        attention: AttentionCall | None,
        vision: VisionAttention | None,
    ) -> None:
        places = _places(group, reduction)
        if len(places) == 0:
            return
        view = LayerView(group, places, layer, self.spec, attention, vision)
        keep = reduction.select(view)
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.shape != view.shape:
            raise ValueError(f"{type(reduction).__name__}.select() must return bool {list(view.shape)}")
        update = reduction.update(view, keep)
        if update is not None and self.spec.stream is not None:
            raise ValueError(
                f"{type(reduction).__name__} replaces states, and every token of {type(self.spec.decoder).__name__} "
                "has several: choose a method that only drops tokens"
            )
        if update is not None and (reduction.lookahead or update.shape != view.hidden.shape):
            raise ValueError(
                f"{type(reduction).__name__}.update() must return states {list(view.hidden.shape)}, and needs the "
                "states of the layer itself: leave lookahead at 0"
            )
        self._verdicts.setdefault(layer, []).append(Verdict(view, keep, update))

    def _apply(self, index: int, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> list[Group]:
        """Takes away what verdicts said, where they said anything."""
        updates = [verdict for verdict in verdicts if verdict.update is not None]
        if len({id(verdict.view.group) for verdict in updates}) < len(updates):
            raise ValueError(f"two reductions replace states before decoder layer {index}: give them different layers")
        for verdict in updates:
            verdict.update_states()
        said = [verdict for verdict in verdicts if verdict.takes()]
        if not said:
            return list(groups)
        parts: list[Group] = []
        for group in groups:
            keep = group.visual
            for verdict in said:
                keep = verdict.narrow(group, keep)
            fewer, left = torch.stack([(group.visual & ~keep).any(1), keep.any(1)]).tolist()
            if True in fewer:
                self.exits[group.samples[torch.tensor(fewer) & ~torch.tensor(left)]] = index
                parts += split(group, keep | group.staying, fewer, left)
            else:
                parts.append(group)
        return regroup(parts)


def _places(group: Group, reduction: Reduction) -> torch.Tensor:
    """The samples of a group that a reduction may take something from."""
    if reduction.admitted is None:
        return group.reducible
    admitted = reduction.admitted
    return group.memo(lambda: group.reducible[admitted[group.samples[group.reducible]]], "admitted", reduction)
