"""What methods share that choose among visual tokens before the first decoder layer.

The published ones shorten the prompt there, so that the language model sees contiguous positions. Here tokens keep the
positions that they had, as in every other layer; with rotary positions of several axes that is the only sound way.
"""

from __future__ import annotations

import torch

from dyvte.runtime.reduction import LayerView, Reduction, first_copies


class BeforeDecoder(Reduction):
    """Keeps, before the first layer, the visual tokens that :meth:`choose` names. Rows of one prompt keep the same.

    Models that add visual features after their first layers (deepstack) are refused.
    """

    layers = (0,)

    def choose(self, view: LayerView) -> torch.Tensor:
        """Which visual tokens stay: bool [n, width], read at visual tokens only."""
        raise NotImplementedError(f"{type(self).__name__} does not define choose()")

    def select(self, view: LayerView) -> torch.Tensor:
        chosen = self.choose(view)
        return chosen[first_copies(view).to(chosen.device)]
