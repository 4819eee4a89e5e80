"""Implicit alignment (IMA, arXiv 2405.16700) and skipped computations (arXiv 2410.09454) of frozen language models.

Confirmed by the public code (mshukor/ima-lmms). In the layers of a regular pattern it skips whole blocks (the layer's
input goes on), attentions or FFNs (then without the norm before them), for all rows or visual rows, in the prompt or
while decoding. A skipped block reuses the keys and values of the layer before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F

from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.feed_forward import by_rows
from dyvte.runtime.view import LayerView


def alignment(hidden: torch.Tensor, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The implicit alignment of one layer: the cosine of the mean visual and the mean text state of a sample.

    The papers find it to rise with a model's accuracy. (Their figures also compare an image with the texts of other
    samples and average over all pairs.)

    Args:
        hidden: [n, s, d] after some layer.
        visual, text: bool [n, s]; padding is in neither.

    Returns:
        float32 [n], -1 ... 1; 0 for a sample without visual or without text tokens.
    """

    def mean(mask: torch.Tensor) -> torch.Tensor:
        total = torch.einsum("nsd,ns->nd", hidden.float(), mask.float())
        return total / mask.sum(1, keepdim=True).clamp(min=1)

    return F.cosine_similarity(mean(visual), mean(text), dim=-1)


def skipped_layers(num_layers: int, interval: int | Sequence[int], start: int = 0, end: int | None = None) -> list[int]:
    """The layers that a pattern skips: those between ``start`` and ``end``, both excluded, that ``interval`` divides.

    Args:
        num_layers: L.
        interval: 1 or more; several divide the layers into as many stages of ``L // stages`` layers, the last stage
            taking what is over.
        start: 0-based; the first layer is never skipped.
        end: None: the last layer, as in the reference.

    Returns:
        layers, 0-based, ascending

    Raises:
        ValueError: an interval below 1, or more of them than layers.
    """
    intervals = [interval] if isinstance(interval, int) else list(interval)
    if not 1 <= len(intervals) <= num_layers or min(intervals) < 1:
        raise ValueError(f"interval must be 1 or more, at most one for each of {num_layers} layers, not {interval}")
    length = num_layers // len(intervals)
    end = num_layers - 1 if end is None else end
    return [
        layer
        for layer in range(max(start, 0) + 1, min(end, num_layers))
        if layer % intervals[min(layer // length, len(intervals) - 1)] == 0
    ]


class SkipComputations(LayerEdit):
    """In some layers attention, FFN or both add nothing to some tokens.

    A skipped FFN is really not computed. What a skipped attention saves is theoretical: it runs, since other tokens
    read its keys, and what it gives to those that skip it is thrown away. (The reference gives a skipped block the keys
    of the layer before; here they are the layer's own.)

    Args:
        layers: the layers edited, from 0; None: all. :func:`skipped_layers` for the published patterns.
        part: "block", "attention" or "ffn".
        rows: "visual": visual tokens; "prompt": the whole prompt; "all": the answer, too.

    Raises:
        ValueError: another part or other rows. On attaching: a layer that the model has not.
    """

    def __init__(self, layers: Collection[int] | None, part: str = "ffn", rows: str = "visual"):
        if part not in ("block", "attention", "ffn") or rows not in ("visual", "prompt", "all"):
            raise ValueError(
                f"part must be 'block', 'attention' or 'ffn' and rows 'visual', 'prompt' or 'all', not {part!r} and "
                f"{rows!r}"
            )
        self.edited, self.part, self.rows = layers, part, rows
        self.decoding = rows == "all"

    def attention(self, view: LayerView | None, output: torch.Tensor) -> torch.Tensor:
        return output if self.part == "ffn" else output.masked_fill(self._skipping(view, output)[..., None], 0)

    def ffn(
        self, view: LayerView | None, ffn: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor
    ) -> torch.Tensor:
        return ffn(states) if self.part == "attention" else by_rows(states, self._skipping(view, states), ffn, None)

    def _skipping(self, view: LayerView | None, states: torch.Tensor) -> torch.Tensor:
        """bool [n, width]"""
        if self.rows == "visual":
            return view.visual.to(states.device)
        if self.rows == "prompt" and view.prompt.answer is not None:  # answers that come in one pass with their prompt
            return ~view.tokens.gather(view.prompt.answer, view.samples).to(states.device)
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
