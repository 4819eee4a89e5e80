"""FastV (arXiv 2403.06764): from one layer on, only the visual tokens that the last prompt token attends to most."""

from __future__ import annotations

import torch

from dyvte.runtime.reduction import LayerView, TopK


class FastV(TopK):
    """Keeps the visual tokens that the last prompt token attends to most in layer K, averaged over heads.

    Layer K is the last one with all visual tokens: with K = 2, the paper's, the scores are those of the second layer,
    and the third is the first to do without the others. The paper's R is what is dropped, 1 - ``keep``.

    Args:
        layer: K, how many decoder layers see all visual tokens, 1 ... L, counted as exit layers are.
        keep: the share of visual tokens kept, 0 ... 1; see :meth:`TopK.count`.
    """

    reads_attention = True

    def __init__(self, layer: int = 2, keep: float = 0.5):
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer must be a number of decoder layers, 1 or more, not {layer!r}")
        super().__init__({layer: keep})
        self.layer, self.keep = layer, keep

    def score(self, view: LayerView) -> torch.Tensor:
        return view.attention_from(view.last_token())
