"""Pruning at the knee, in the manner of arXiv 2409.01162 (image text interaction, later "Sparsity Meets Similarity").

Only the abstract can be read: how similar patches are to the CLS token is long-tailed, each image is cut where its
sorted curve bends, and a second cut in the language model goes by the relation of tokens to the text. No code is
public, so all formulas are our reading: similarity is the CLS attention of the vision layer that features are taken
from, the bend is the point farthest below the chord, and the second cut puts the same rule to what the text rows of a
decoder layer give each visual token, ``selection.received(attention, text)``.
"""

from __future__ import annotations

import torch

from dyvte.methods.selection import top
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import LayerView, Reduction, first_copies
from dyvte.runtime.vision import VisionTower


def knee(scores: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """How many scores lie before the bend of the sorted curve.

    Sorted from high to low, the scores are points over 0 ... m - 1. The bend is the one farthest below the straight
    line from the first to the last (distance along the scores; across the line it is proportional), the first of
    several. Those before it are the head, it and the rest the tail. A curve nowhere below its chord has no tail.

    Args:
        scores: float [n, s].
        among: bool [n, s], the candidates; None: all.

    Returns:
        long [n], 1 ... m, or 0 without a candidate.
    """
    among = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    curve = scores.double().masked_fill(~among, -torch.inf).sort(dim=1, descending=True).values
    total = among.sum(1, keepdim=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    inside = place < total
    first, last = curve[:, :1], curve.gather(1, (total - 1).clamp(min=0))
    chord = first + (last - first) * place / (total - 1).clamp(min=1)
    below = (chord - curve).masked_fill(~inside, 0)
    bend, depth = below.argmax(1), below.amax(1)
    slack = 1e-9 * (first - last)[:, 0]  # what rounding makes of a straight line
    return bend.where(depth > slack, total[:, 0])


class ImageTextInteraction(Reduction):
    """Keeps the head of each image's CLS attention, and of that the head of what the text attends to.

    How many that is follows from the curves: another number for every image. Positions stay (whoever cuts before the
    decoder renumbers).

    Args:
        layer: of the second cut: how many decoder layers see all that the first left, 1 ... L; 2 is our choice.

    Raises:
        ValueError: a layer below 1. On attaching: the model has no vision tower with a CLS token. In a call: there is
            not one visual token for each patch.
    """

    reads_attention = True
    reads_vision = slice(-2, -1)

    def __init__(self, layer: int = 2):
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer must be a number of decoder layers, 1 or more, not {layer!r}")
        self.layers = (0, layer)

    def check(self, spec: DecoderSpec) -> None:
        super().check(spec)
        VisionTower(spec.model).check_cls()

    def select(self, view: LayerView) -> torch.Tensor:
        if view.layer == 0:
            scores = view.vision.cls_rows(len(view.vision.tower.attentions) - 2).mean(1)
            chosen = view.of_patches(top(scores, knee(scores)))
        else:
            scores = view.attention_from(view.after_image())
            visual = view.visual.to(scores.device)
            chosen = top(scores, knee(scores, visual), visual)
        return chosen[first_copies(view).to(chosen.device)]
