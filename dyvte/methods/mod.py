"""Tokens that bypass a layer and return, in the manner of VideoLLM-MoD (arXiv 2408.16730).

The abstract confirms that in chosen layers about 80 % of the vision tokens of every frame skip attention and FFN, that
text never does, and that a trained module decides; no code is public. Its form (a linear score per token, the layer's
update weighted by it, as in mixture of depths) is our reading. Tokens that bypass a layer are no keys there.
"""

from __future__ import annotations

import torch

from dyvte.methods.selection import top_within


def route(scores: torch.Tensor, frames: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """Which tokens a layer works on: all text, and the share of each frame with the highest scores.

    Args:
        scores: float [n, s]; those of text are not read.
        frames: long [n, s], the number of the frame (or image) a visual token belongs to; -1 for text.
        share: 0 ... 1, rounded half up within each frame, at least one token unless 0; the earlier of two equal ones.

    Returns:
        bool [n, s]; padding counts as text, mask it away.
    """
    return (frames < 0) | top_within(scores, frames, share)


def combine(
    hidden: torch.Tensor, update: torch.Tensor, routed: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The states after the layer: ``hidden + weight * update`` where it worked, ``hidden`` elsewhere.

    Args:
        hidden: [n, s, d] before the layer.
        update: [n, s, d], what the layer adds to it; not read at tokens that bypass it.
        routed: bool [n, s].
        weights: [n, s], the scores of the trained router, 1 for text; None: 1, as for an untrained router.
    """
    added = update if weights is None else update * weights[..., None].to(update.dtype)
    return torch.where(routed[..., None], hidden + added, hidden)
