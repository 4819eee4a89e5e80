"""PAR (arXiv 2410.07278, first "TRSM"): what the prompt does not ask for, then what says the same thing twice.

Only the abstract and summaries can be read: external redundancy goes by semantic retrieval with the prompt, internal
redundancy by a router over clusters of a similarity graph. No code is public and no formula is confirmed; all of this
is our reading. Keep :func:`relevance`'s top share (``selection.top``), then :func:`route` those that are left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dyvte.methods.before_decoder import BeforeDecoder
from dyvte.methods.selection import share_count, top, top_within
from dyvte.runtime.reduction import LayerView


def relevance(visual: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The cosine of each visual token with the prompt token that is nearest to it.

    Args:
        visual: [n, tokens, d], projected features.
        text: [n, words, d], input embeddings of the prompt.
        mask: bool [n, words], which words ask; None: all.

    Returns:
        float32 [n, tokens], -1 ... 1; -inf where no word asks.
    """
    cosine = F.normalize(visual.float(), dim=-1) @ F.normalize(text.float(), dim=-1).transpose(1, 2)
    return (cosine if mask is None else cosine.masked_fill(~mask[:, None], -torch.inf)).amax(-1)


def clusters(visual: torch.Tensor, threshold: float, among: torch.Tensor | None = None) -> torch.Tensor:
    """Connected parts of the graph that joins visual tokens whose cosine is at least ``threshold``.

    Args:
        visual: [n, tokens, d].
        threshold: -1 ... 1.
        among: bool [n, tokens], the tokens of the graph; None: all.

    Returns:
        long [n, tokens], the smallest position of the part; -1 outside the graph.
    """
    n, tokens, _ = visual.shape
    among = torch.ones(n, tokens, dtype=torch.bool, device=visual.device) if among is None else among
    unit = F.normalize(visual.float(), dim=-1)
    joined = (unit @ unit.transpose(1, 2) >= threshold) & among[:, :, None] & among[:, None, :]
    joined |= torch.eye(tokens, dtype=torch.bool, device=visual.device)  # a zero vector is not even like itself
    label = torch.arange(tokens, device=visual.device).expand(n, tokens)
    while True:
        smallest = torch.where(joined, label[:, None, :], tokens).amin(-1)
        if torch.equal(smallest, label):
            return label.where(among, -1)
        label = smallest


def route(relevance: torch.Tensor, clusters: torch.Tensor, share: float) -> torch.Tensor:
    """The share of every cluster that is most relevant, at least one of each, the earlier one of two equal ones.

    Args:
        relevance: float [n, tokens].
        clusters: long [n, tokens], negative: outside.
        share: 0 ... 1.

    Returns:
        bool [n, tokens]
    """
    return top_within(relevance, clusters, share)


class PAR(BeforeDecoder):
    """Keeps, before the decoder, visual tokens like a word of the prompt, and of those alike the most relevant.

    The settings are ours. How many tokens stay follows from the clusters: at most the share ``keep``, and no less than
    one for each cluster.

    Args:
        keep: the share of each prompt's visual tokens that are most relevant, 0 ... 1, rounded half up.
        threshold: the cosine from which on two of them say the same thing, -1 ... 1.
        share: of every cluster, 0 ... 1, rounded half up, at least one unless 0.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(self, keep: float = 0.5, threshold: float = 0.9, share: float = 0.5):
        for part in (keep, share):
            share_count(part, torch.tensor(0))
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not -1 <= threshold <= 1:
            raise ValueError(f"threshold must be a cosine, -1 ... 1, not {threshold!r}")
        self.keep, self.threshold, self.share = keep, threshold, share

    def choose(self, view: LayerView) -> torch.Tensor:
        hidden, visual = view.hidden, view.visual
        scores = relevance(hidden, hidden, view.words().to(hidden.device)).to(visual.device)
        asked = top(scores, share_count(self.keep, view.total), visual)
        return route(scores, clusters(hidden, self.threshold, asked.to(hidden.device)).to(visual.device), self.share)
