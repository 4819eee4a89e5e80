"""VTC-CLS (arXiv 2412.05819): the image's own CLS token says which patches matter, over several vision layers.

Confirmed by the public code (THU-MIG/VTC-CLS, ``cls_token_only``). The patches with the highest scores are kept in
ascending order before the projector, so that the language model sees a shorter prompt with contiguous positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyvte.methods.before_decoder import BeforeDecoder
from dyvte.methods.selection import share_count, top
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import LayerView
from dyvte.runtime.vision import VisionTower


def scores(attentions: Sequence[torch.Tensor | None], start: int) -> torch.Tensor:
    """How much the CLS token attends to each patch, averaged over heads and summed over vision layers.

    The layers are ``start`` ... Lv - 2. The last one is left out because LLaVA takes its features before it, from the
    output of layer Lv - 2: one layer, start = Lv - 2, is the attention of the layer that made the features. The
    reference gives ``start`` on the command line and names no default.

    Args:
        attentions: the CLS row of every vision layer without its own column, each [n, heads, patches], weights after
            softmax; those that do not count may be None. One image (tile) a row: the reference mixes tiles that come
            together, which is a fault of it.
        start: the first layer that counts, 0 ... Lv - 2.

    Returns:
        float32 [n, patches]

    Raises:
        ValueError: no layer is left to count.
    """
    if not 0 <= start <= len(attentions) - 2:
        last = len(attentions) - 2
        raise ValueError(f"start must be 0 ... {last}, not {start}: the last of {last + 2} layers does not count")
    return torch.stack([layer.mean(1, dtype=torch.float32) for layer in attentions[start:-1]]).sum(0)


class VTCCLS(BeforeDecoder):
    """Keeps the patches of each image that its CLS token attends to most.

    Args:
        keep: the share of each image's visual tokens kept, 0 ... 1, rounded half up, at least one unless 0.
        start: the first vision layer that counts, from 0 or, negative, from the last; -2: that of the features alone.

    Raises:
        ValueError: a share outside 0 ... 1. On attaching: the model has no vision tower with a CLS token, or too few
            layers. In a call: there is not one visual token for each patch.
    """

    def __init__(self, keep: float, start: int = -2):
        share_count(keep, torch.tensor(0))
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError(f"start must be a vision layer, not {start!r}")
        self.keep, self.first = keep, start  # start is a method
        self.reads_vision = slice(start, -1)

    def check(self, spec: DecoderSpec) -> None:
        super().check(spec)
        tower = VisionTower(spec.model)
        tower.check_cls()
        scores([torch.zeros(1, 1, 1)] * len(tower.attentions), self._first(len(tower.attentions)))

    def choose(self, view: LayerView) -> torch.Tensor:
        vision, count = view.vision, len(view.vision.tower.attentions)
        first = self._first(count)
        rows = [None] * first + [vision.cls_rows(layer) for layer in range(first, count - 1)] + [None]
        significance = scores(rows, first)
        return view.of_patches(top(significance, int(share_count(self.keep, torch.tensor(significance.shape[1])))))

    def _first(self, count: int) -> int:
        return self.first + count if self.first < 0 else self.first
