"""SGL (arXiv 2412.03324): a small MLLM's attention prunes a large one's visual tokens, or spares it altogether.

Confirmed by the public code (NUS-HPC-AI-Lab/SGL). The small model answers first; what its layers, heads and rows gave
each visual token ranks the tokens of the large model, which keeps the first ``int(n * ratio)`` at layer
``int(L * prune_layer)``. The code never lets the small answer stand; that its :func:`decision` is compared with a
threshold is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyvte.methods.selection import rows_after


def aggregate(
    prompt: Sequence[torch.Tensor],
    steps: Sequence[Sequence[torch.Tensor]],
    visual: torch.Tensor,
    valid: torch.Tensor | None = None,
    generated: torch.Tensor | None = None,
    inclusive: bool = True,
) -> torch.Tensor:
    """The importance of each visual token: attention summed over layers, heads and rows of the small model.

    Rows are those of the prompt from the last visual token on, and that of every decoding step. The paper speaks of
    the prompt tokens after the image; the code begins one row earlier, with the last visual token, and so does the
    default here. The last generated token is never fed, so it has no row.

    Args:
        prompt: attention of each layer over the prompt, [n, heads, s, s], weights after softmax.
        steps: for each decoding step the attention of each layer, [n, heads, 1, s + generated tokens]; columns after
            the prompt are not read.
        visual: bool [n, s]. The reference also scores the separators between tiles, from the first visual token to the
            last; mark them here to have them scored.
        valid: bool [n, s], no padding; None: there is none.
        generated: bool [n, steps], which steps belong to a sample's answer; None: all. A sample that has ended while
            others go on must not count what it pads with.
        inclusive: whether the row of the last visual token counts.

    Returns:
        float32 [n, s], 0 at columns that are not visual.
    """
    rows = rows_after(visual, inclusive)
    rows = (rows if valid is None else rows & valid).float()
    total = sum(torch.einsum("nqs,nq->ns", layer.sum(1, dtype=torch.float32), rows) for layer in prompt)
    for index, step in enumerate(steps):
        given = sum(layer[..., : visual.shape[1]].sum((1, 2), dtype=torch.float32) for layer in step)
        total = total + (given if generated is None else given * generated[:, index, None])
    return total.where(visual, 0)


def confidence(probabilities: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The geometric mean of the small model's probabilities of its own greedy answer.

    Args:
        probabilities: [..., tokens], the largest probability at each step.
        mask: bool [..., tokens], the tokens of the answer; None: all.

    Returns:
        float32 [...], 0 ... 1; 1 for an empty answer.
    """
    log, length = _log(probabilities, mask)
    return (log.sum(-1) / length.clamp(min=1)).exp()


def consistency(probabilities: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The probability of the same answer once the small model has been pruned by its own importance.

    The reference prunes at layer 0 to 5 % of the visual tokens and takes the product, not the geometric mean.

    Args:
        probabilities: [..., tokens], of each token of the answer, under teacher forcing.
        mask: bool [..., tokens], the tokens of the answer; None: all.

    Returns:
        float32 [...], 0 ... 1; 1 for an empty answer.
    """
    return _log(probabilities, mask)[0].sum(-1).exp()


def decision(confidence: torch.Tensor, consistency: torch.Tensor) -> torch.Tensor:
    """The mean of both; above a threshold the large model is not asked. Our reading: no code computes it."""
    return (confidence + consistency) / 2


def _log(probabilities: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(probabilities, dtype=torch.bool) if mask is None else mask
    return probabilities.float().log().where(mask, 0), mask.sum(-1)
