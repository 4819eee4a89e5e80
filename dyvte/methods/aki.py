"""AKI (arXiv 2503.02597), modality-mutual attention: visual tokens may see the question that follows them.

Confirmed by the public code (sony/aki, ``_make_modality_mutual_mask``). The published model was trained with this mask;
put to a model that was not, it is an experiment.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.view import LayerView


def mask(visual: torch.Tensor, question: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention in which visual rows see the columns of the question as well.

    In all layers, for the prompt alone: decoding rows are causal. With several images each of them sees the question
    (our reading: the reference unlocks the last one only).

    Args:
        visual: bool [n, s].
        question: bool [n, s], the text after the image up to the token that opens the answer, included in the
            reference, and nothing of the answer.
        valid: bool [n, s], no padding; None: there is none. Columns of padding are seen by nobody.

    Returns:
        bool [n, s, s], rows by columns
    """
    causal = torch.ones(visual.shape[1], visual.shape[1], dtype=torch.bool, device=visual.device).tril()
    seen = causal | visual[:, :, None] & question[:, None, :]
    return seen if valid is None else seen & valid[:, None, :]


class AKI(LayerEdit):
    """Visual tokens see the text after the last image of their prompt, see :func:`mask`; answers are causal.

    Saves nothing. The question is all text of the prompt after its last visual token, the words that open the answer
    included.

    Args:
        layers: the layers edited, from 0; None: all, as published.

    Raises:
        ValueError: on attaching: a layer that the model has not, or attention without such masks.
    """

    def __init__(self, layers: Collection[int] | None = None):
        self.edited = layers

    def sees(self, view: LayerView, seen: torch.Tensor) -> torch.Tensor:
        visual, question = view.visual.to(seen.device), view.after_image().to(seen.device)
        return seen | visual[:, :, None] & question[:, None, :]
