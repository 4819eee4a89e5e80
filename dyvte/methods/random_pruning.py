"""Random pruning: as many visual tokens as FastV would keep, but any. What a method with scores must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyvte.methods.draws import row_keys, uniform
from dyvte.runtime.reduction import LayerView, Reduction, TopK


class RandomPruning(TopK):
    """Keeps any visual tokens, from one layer on.

    Draws belong to the prompt, as those of :class:`~dyvte.RandomExit` do.

    Args:
        layer: K, how many decoder layers see all visual tokens, 1 ... L, counted as exit layers are.
        keep: the share of visual tokens kept, 0 ... 1; see :meth:`TopK.count`.
        seed: other seeds, other tokens.
    """

    def __init__(self, layer: int = 2, keep: float = 0.5, seed: int = 0):
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer must be a number of decoder layers, 1 or more, not {layer!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        super().__init__({layer: keep})
        self.layer, self.keep, self.seed = layer, keep, seed
        self.names: Sequence[str] | None = None

    def keyed(self, keys: Sequence[str]) -> RandomPruning:
        pruning = RandomPruning(self.layer, self.keep, self.seed)
        pruning.names = keys
        return pruning

    def start(self, view: LayerView) -> Reduction:
        return _Drawn(self.shares, row_keys(view, self.seed, self.names))


class _Drawn(TopK):
    """The draws of one prompt."""

    def __init__(self, shares: dict[int, float], keys: list[int]):
        super().__init__(shares)
        self.keys = keys

    def score(self, view: LayerView) -> torch.Tensor:
        scores = torch.zeros(view.visual.shape, dtype=torch.float64)
        for row, own, sample in zip(scores, view.visual.cpu(), view.samples.tolist()):
            row[own] = uniform(self.keys[sample], int(own.sum()))
        return scores
