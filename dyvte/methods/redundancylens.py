"""RedundancyLens (arXiv 2501.19036): visual tokens see their neighbours only, and few neurons; the layers that bear it.

Confirmed by a detailed summary and two re-implementations that agree in all but what is marked here; the authors' code
could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F

from dyvte.methods.selection import share_count, top
from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.feed_forward import FeedForward, NeuronEdit
from dyvte.runtime.tokens import KeptTokens
from dyvte.runtime.view import LayerView

Projection = torch.nn.Module | torch.Tensor


def hollow_mask(visual: torch.Tensor, window: int) -> torch.Tensor:
    """Which columns each row may see under Hollow Attention.

    A visual row sees itself and the ``window`` visual tokens before it, counted in visual tokens, so text between
    images takes no place (our reading of "the preceding R visual tokens"; the re-implementations count positions, and
    one of them counts the token itself). Visual rows see all text before them and text rows everything before them.

    Args:
        visual: bool [n, s].
        window: R, 256 in the paper; 0: a visual row sees no other visual token.

    Returns:
        bool [n, s, s], rows by columns, causal. Padding is not masked here.

    Raises:
        ValueError: a negative window.
    """
    if window < 0:
        raise ValueError(f"window must be a number of visual tokens, 0 or more, not {window}")
    count = visual.cumsum(1)
    far = count[:, :, None] - count[:, None, :] > window
    causal = torch.ones(visual.shape[1], visual.shape[1], dtype=torch.bool, device=visual.device).tril()
    return causal & ~(far & visual[:, :, None] & visual[:, None, :])


def probes(visual: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """The visual tokens that are asked for their activations, evenly spaced: numbers ``floor(i * total / count)``.

    The paper draws them at random; a re-implementation takes every tenth, and so do we: a forward pass that draws
    numbers answers differently in another batch. The share is unconfirmed.

    Args:
        visual: bool [n, s].
        share: of each row's visual tokens, rounded half up, at least one.

    Returns:
        bool [n, s]
    """
    total = visual.sum(1, keepdim=True)
    count = share_count(share, total)
    number = visual.cumsum(1) - 1
    return visual & ((-number * count) % total.clamp(min=1) < count)


def neurons(
    hidden: torch.Tensor,
    gate: Projection,
    up: Projection | None,
    act: Callable[[torch.Tensor], torch.Tensor],
    keep: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The neurons of an FFN that the probes activate most, by the mean of |act(gate x) * up x| over probes.

    All visual rows then use these rows of ``gate`` and ``up`` and these columns of the down projection, whose bias
    stays; text rows use all neurons.

    Args:
        hidden: [n, p, d], what the FFN gets at the probes.
        gate, up: the projections as modules or as weights [neurons, d]; up None: an FFN without a gate, act(gate x).
        act: the activation.
        keep: the share of neurons, .2 in the paper; rounded half up, at least one.
        mask: bool [n, p], the probes of each sample where their numbers differ; None: all.

    Returns:
        long [n, k], ascending; of two equal neurons the first.
    """
    activation = act(_project(gate, hidden))
    if up is not None:
        activation = activation * _project(up, hidden)
    activation = activation.float().abs()
    if mask is not None:
        activation = activation * mask[..., None]
    total = activation.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    scores = activation.sum(1) / total
    count = int(share_count(keep, torch.tensor(scores.shape[1])))
    return top(scores, count).nonzero()[:, 1].view(len(scores), count)


def _project(projection: Projection, hidden: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, projection) if isinstance(projection, torch.Tensor) else projection(hidden)


def rank_layers(
    evaluate: Callable[[Sequence[int]], Sequence[float]],
    num_layers: int,
    last: int = 0,
    alpha: float = 2.0,
    count: int | None = None,
) -> list[int]:
    """The order in which layers are reduced, the most redundant first: a greedy search, the last layers given.

    The last ``last`` layers come first, deepest first, without a search. Then every round tries each other layer on
    top of those ranked so far and takes the one that hurts least: the sum over tasks of the score's change from the
    model with no layer reduced, losses times ``alpha``. The deeper of two equal layers is taken (our reading), and
    scores are summed as they are (our reading): give them in one unit. Attention and FFN are ranked apart.

    Args:
        evaluate: from the layers that are reduced, 0-based, to a score for each task, higher is better. Called once
            without any, then once for each trial.
        num_layers: L.
        last: the paper's L_p.
        alpha: 2 in the paper.
        count: stop once that many are ranked; None: all.

    Returns:
        layers, 0-based

    Raises:
        ValueError: ``last`` or ``count`` outside 0 ... L.
    """
    count = num_layers if count is None else count
    if not (0 <= last <= num_layers and 0 <= count <= num_layers):
        raise ValueError(f"last {last} and count {count} must lie in 0 ... {num_layers}")
    ranked = list(range(num_layers - 1, -1, -1))[: min(last, count)]
    if len(ranked) == count:
        return ranked
    original = evaluate([])

    def worth(layer: int) -> float:
        changes = [score - before for score, before in zip(evaluate([*ranked, layer]), original, strict=True)]
        return sum(change * (alpha if change < 0 else 1.0) for change in changes)

    while len(ranked) < count:
        ranked.append(max(sorted(set(range(num_layers)) - set(ranked), reverse=True), key=worth))
    return ranked


class HollowAttention(LayerEdit):
    """Visual tokens see, of all visual tokens, the last few before them; see :func:`hollow_mask`.

    Counted among the visual tokens that are still there. What it saves is theoretical: the kernels compute what the
    mask hides.

    Args:
        layers: the layers edited, from 0; None: all. The first of :func:`rank_layers` for attention.
        window: R, visual tokens.

    Raises:
        ValueError: a negative window. On attaching: a layer that the model has not, or attention without such masks.
    """

    def __init__(self, layers: Collection[int] | None, window: int = 256):
        if isinstance(window, bool) or not isinstance(window, int) or window < 0:
            raise ValueError(f"window must be a number of visual tokens, 0 or more, not {window!r}")
        self.edited, self.window = layers, window

    def sees(self, view: LayerView, seen: torch.Tensor) -> torch.Tensor:
        visual = view.visual.to(seen.device)
        both = visual[:, :, None] & visual[:, None, :]
        return seen & (hollow_mask(visual, self.window) | ~both)


class ProbeFFN(NeuronEdit):
    """Visual tokens use the neurons that a few of them, the probes, activate most; see :func:`neurons`.

    The other neurons are really not computed for them: weights are sliced, sample by sample. Probes are drawn anew in
    every layer, from the visual tokens that are still there.

    Args:
        layers: the layers edited, from 0; None: all. The first of :func:`rank_layers` for the FFN.
        probe: the share of visual tokens that are probes, see :func:`probes`.
        keep: the share of neurons kept.

    Raises:
        ValueError: a share outside 0 ... 1. On attaching: a layer that the model has not, or an FFN whose neurons
            cannot be told apart.
    """

    def __init__(self, layers: Collection[int] | None, probe: float = 0.1, keep: float = 0.2):
        for share in (probe, keep):
            share_count(share, torch.tensor(0))
        self.edited, self.probe, self.keep = layers, probe, keep

    def neurons(self, view: LayerView, parts: FeedForward, states: torch.Tensor) -> Sequence[torch.Tensor]:
        asked = KeptTokens.from_mask(probes(view.visual.to(states.device), self.probe))
        return neurons(asked.gather(states), parts.gate, parts.up, parts.act, self.keep, asked.valid)
