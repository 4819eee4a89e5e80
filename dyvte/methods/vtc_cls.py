"""VTC-CLS (arXiv 2412.05819): the image's own CLS token says which patches matter, over several vision layers.

Confirmed by the public code (THU-MIG/VTC-CLS, ``cls_token_only``). The patches with the highest scores are kept in
ascending order before the projector, so that the language model sees a shorter prompt with contiguous positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def scores(attentions: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """How much the CLS token attends to each patch, averaged over heads and summed over vision layers.

    The layers are ``start`` ... Lv - 2. The last one is left out because LLaVA takes its features before it, from the
    output of layer Lv - 2: one layer, start = Lv - 2, is the attention of the layer that made the features. The
    reference gives ``start`` on the command line and names no default.

    Args:
        attentions: the CLS row of every vision layer without its own column, each [n, heads, patches], weights after
            softmax. One image (tile) a row: the reference mixes tiles that come together, which is a fault of it.
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
