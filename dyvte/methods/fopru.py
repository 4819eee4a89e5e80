"""FoPru (arXiv 2411.14164): vision attention ranks the patches, alone or by whole rows of the grid.

The paper's abstract confirms the two strategies, by rank and by row, and that kept tokens return to their original
order; no code is public. All formulas here are our reading: the attention of the vision layer that features are taken
from, averaged over heads; a token's significance is what all tokens give it; a row's is the mean of its tokens.
"""

from __future__ import annotations

import math

import torch

from dyvte.methods.before_decoder import BeforeDecoder
from dyvte.methods.selection import received, share_count, top
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import LayerView
from dyvte.runtime.vision import VisionTower


def scores(attention: torch.Tensor, cls_token: bool = True) -> torch.Tensor:
    """The significance of each patch: its column of the attention map, averaged over heads, summed over all rows.

    Args:
        attention: [n, heads, tokens, tokens] of the vision layer before the last, weights after softmax.
        cls_token: whether the first token is no patch; its row counts, its column is left out.

    Returns:
        float32 [n, patches]
    """
    return received(attention)[:, int(cls_token) :]


def by_rank(significance: torch.Tensor, keep: float) -> torch.Tensor:
    """The share of all patches with the highest significance, rounded half up, the earlier one of two equal ones.

    Args:
        significance: [n, patches].
        keep: 0 ... 1.

    Returns:
        bool [n, patches]
    """
    return top(significance, _count(significance, keep))


def by_row(significance: torch.Tensor, keep: float, width: int) -> torch.Tensor:
    """The grid rows with the highest mean significance, as many as it takes to keep the share, the upper of equal ones.

    Args:
        significance: [n, patches], row after row of a grid.
        keep: 0 ... 1, of all patches; a row begun is kept whole, so that rather more are kept than fewer.
        width: patches in a row of the grid.

    Returns:
        bool [n, patches]

    Raises:
        ValueError: the patches do not fill rows of this width.
    """
    if width < 1 or significance.shape[1] % width:
        raise ValueError(f"{significance.shape[1]} patches do not fill rows of {width}")
    means = significance.unflatten(1, (-1, width)).mean(2)
    return top(means, -(-_count(significance, keep) // width)).repeat_interleave(width, 1)


def _count(significance: torch.Tensor, keep: float) -> int:
    return int(share_count(keep, torch.tensor(significance.shape[1])))


class FoPru(BeforeDecoder):
    """Keeps the patches of each image, or rows of its grid, that the vision tower attends to most.

    Args:
        keep: the share of each image's visual tokens kept, 0 ... 1; see :func:`by_rank` and :func:`by_row`.
        by: "rank", or "row" for whole rows of a square grid.

    Raises:
        ValueError: a share outside 0 ... 1, or another strategy. On attaching: the model has no vision tower that can
            be read. In a call: there is not one visual token for each patch, or patches form no square.
    """

    reads_vision = slice(-2, -1)

    def __init__(self, keep: float, by: str = "rank"):
        share_count(keep, torch.tensor(0))
        if by not in ("rank", "row"):
            raise ValueError(f"by must be 'rank' or 'row', not {by!r}")
        self.keep, self.by = keep, by

    def check(self, spec: DecoderSpec) -> None:
        super().check(spec)
        VisionTower(spec.model)

    def choose(self, view: LayerView) -> torch.Tensor:
        tower = view.vision.tower
        significance = scores(view.vision.weights(len(tower.attentions) - 2), tower.cls)
        if self.by == "rank":
            return view.of_patches(by_rank(significance, self.keep))
        side = math.isqrt(significance.shape[1])
        if side * side != significance.shape[1]:
            raise ValueError(f"{significance.shape[1]} patches form no square grid: choose by='rank'")
        return view.of_patches(by_row(significance, self.keep, side))
