"""HiMAP (arXiv 2503.13108): first what the text reads from the image, later what the image reads from itself.

Confirmed by the public code (ustc-hyin/HiMAP, ``himap.py``). Layer K1 keeps the visual tokens with the highest
:func:`text_to_image` of the layer before it, layer K2 those with the highest :func:`image_to_image`, positions kept;
LLaVA-1.5: K1 = 2 with half of them, K2 = 8 (15 for long answers) with an eighth. The text of the paper can be read as
weights by query; the code sums over queries, and so do we. It selects anew at every decoding step; we select once.
"""

from __future__ import annotations

import torch

from dyvte.methods.selection import received, rows_after


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
