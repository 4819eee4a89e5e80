"""HiMAP (arXiv 2503.13108): first what the text reads from the image, later what the image reads from itself.

Confirmed by the public code (ustc-hyin/HiMAP, ``himap.py``). Layer K1 keeps the visual tokens with the highest
:func:`text_to_image` of the layer before it, layer K2 those with the highest :func:`image_to_image`, positions kept;
LLaVA-1.5: K1 = 2 with half of them, K2 = 8 (15 for long answers) with an eighth. The text of the paper can be read as
weights by query; the code sums over queries, and so do we. It selects anew at every decoding step; we select once.
"""

from __future__ import annotations

import torch

from dyvte.methods.selection import received, rows_after
from dyvte.runtime.reduction import LayerView, TopK


def text_to_image(attention: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """What each visual token gets from all rows after the image, averaged over heads and summed over rows.

    With several images the rows are those after the last one (our reading: the reference knows one image).

    Args:
        attention: [n, heads, s, s] of layer K1 - 1, weights after softmax.
        visual: bool [n, s].
        valid: bool [n, s], no padding; None: there is none. Rows of padding do not count.

    Returns:
        float32 [n, s], 0 at columns that are not visual.
    """
    rows = rows_after(visual) if valid is None else rows_after(visual) & valid
    return received(attention, rows).where(visual, 0)


def image_to_image(attention: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """What each visual token gets from the visual rows, averaged over heads and summed over rows.

    The diagonal counts. Attention is causal, so earlier tokens are seen by more rows and collect more; the reference
    does not correct for it.

    Args:
        attention: [n, heads, s, s] of layer K2 - 1, weights after softmax, over the columns that are still there.
        visual: bool [n, s], the visual tokens among them.

    Returns:
        float32 [n, s], 0 at columns that are not visual.
    """
    return received(attention, visual).where(visual, 0)


class HiMAP(TopK):
    """Keeps what the text reads from the image at layer K1, and of that what the image reads from itself at K2.

    Args:
        layers: K1 and K2, how many decoder layers see all, and all that were left, 1 ... L, counted as exit layers are.
        keep: the shares of *all* visual tokens that go on from K1 and from K2, 0 ... 1; see :meth:`TopK.count`.

    Raises:
        ValueError: the layers do not ascend from 1 on, or a share is none.
    """

    reads_attention = True

    def __init__(self, layers: tuple[int, int] = (2, 8), keep: tuple[float, float] = (0.5, 0.125)):
        if len(layers) != 2 or len(keep) != 2 or not 1 <= layers[0] < layers[1]:
            raise ValueError(
                f"HiMAP prunes at two layers, 1 <= K1 < K2, with a share for each, not {layers} and {keep}"
            )
        super().__init__(dict(zip(layers, keep)))
        self.text_layer = layers[0]

    def score(self, view: LayerView) -> torch.Tensor:
        return view.attention_from(view.after_image() if view.layer == self.text_layer else view.visual)
