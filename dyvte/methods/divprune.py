"""DivPrune (arXiv 2503.02175): keep the visual tokens that are farthest from each other (max-min diversity).

Confirmed by the public code (vbdi/divprune, ``llava_arch.py``), which prunes the projected features before the
decoder, positions renumbered, and rounds its count with Python's ``round``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dyvte.methods.before_decoder import BeforeDecoder
from dyvte.methods.selection import share_count
from dyvte.runtime.reduction import LayerView


def select(features: torch.Tensor, count: int | torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """The greedy answer to the max-min diversity problem under the cosine distance.

    The first token is the one whose nearest other token is farthest away; every further one is farthest from its
    nearest selected token; the earlier of two equal ones. A selected token is never selected again, which the
    reference leaves to rounding where tokens are equal.

    Args:
        features: [n, tokens, d].
        count: how many to keep, one for all rows, or long [n]; more than there are candidates keeps all of them.
        among: bool [n, tokens], the candidates; None: all.

    Returns:
        bool [n, tokens]
    """
    n, tokens, _ = features.shape
    device = features.device
    among = torch.ones(n, tokens, dtype=torch.bool, device=device) if among is None else among
    count = torch.as_tensor(count, device=device).expand(n).minimum(among.sum(1))
    unit = F.normalize(features.float(), dim=-1)
    distance = (1 - unit @ unit.transpose(1, 2)).masked_fill(~among[:, None], torch.inf)
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    nearest = distance.masked_fill(itself, torch.inf).amin(-1)
    kept = torch.zeros_like(among)
    row = torch.arange(n, device=device)
    for index in range(int(count.max()) if n else 0):
        best = nearest.masked_fill(kept | ~among, -torch.inf).argmax(1)
        kept[row, best] |= index < count
        latest = distance[row, best]
        nearest = latest if index == 0 else nearest.minimum(latest)
    return kept


class DivPrune(BeforeDecoder):
    """Keeps, before the decoder, the visual tokens of each prompt that are farthest from each other.

    Args:
        keep: the share of all visual tokens of the prompt kept, 0 ... 1, rounded half up, at least one unless 0.

    Raises:
        ValueError: a share outside 0 ... 1.
    """

    def __init__(self, keep: float):
        share_count(keep, torch.tensor(0))
        self.keep = keep

    def choose(self, view: LayerView) -> torch.Tensor:
        return select(view.hidden, share_count(self.keep, view.total), view.visual)
