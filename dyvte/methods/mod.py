"""Tokens that bypass a layer and return, in the manner of VideoLLM-MoD (arXiv 2408.16730).

The abstract confirms that in chosen layers about 80 % of the vision tokens of every frame skip attention and FFN, that
text never does, and that a trained module decides; no code is public. Its form (a linear score per token, the layer's
update weighted by it, as in mixture of depths) is our reading. Tokens that bypass a layer are no keys there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from dyvte.methods.selection import share_count, top_within
from dyvte.runtime.bypass import Bypass
from dyvte.runtime.view import LayerView


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


def frames(visual: torch.Tensor) -> torch.Tensor:
    """The number of the frame or image that each visual token belongs to: those that stand together.

    Args:
        visual: bool [n, s].

    Returns:
        long [n, s], -1 for text
    """
    first = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
    return (first.cumsum(1) - 1).where(visual, -1)


class MoD(Bypass):
    """In some layers most tokens of every frame bypass attention and FFN, and are no keys there, for answers neither.

    The work is really not done, and the layer's cache really smaller. Without a trained router it is an experiment.

    Args:
        layers: the layers that are bypassed, from 0.
        router: the states that enter a layer, [n, width, d], to a score for each token, [n, width]; the highest go
            through the layer. A trained one, or any rule such as ``lambda states: states.norm(dim=-1)``.
        share: of every frame, see :func:`route`.
        weighted: whether the layer's update of a token is multiplied with its score, as with a trained router.

    Raises:
        ValueError: a share outside 0 ... 1. On attaching: a layer that the model has not, or to which it adds visual
            features.
    """

    def __init__(
        self,
        layers: Collection[int],
        router: Callable[[torch.Tensor], torch.Tensor],
        share: float = 0.2,
        weighted: bool = False,
    ):
        share_count(share, torch.tensor(0))
        self.bypassed, self.router, self.share, self.weighted = tuple(layers), router, share, weighted

    def routes(self, view: LayerView) -> torch.Tensor:
        number = view.tokens.gather(frames(view.prompt.visual), view.samples).where(view.visual, -1)
        return route(self.router(view.hidden).to(number.device), number, self.share)

    def weights(self, view: LayerView) -> torch.Tensor | None:
        return self.router(view.hidden) if self.weighted else None
