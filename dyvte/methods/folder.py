"""FOLDER (arXiv 2501.02430): the most similar visual tokens are merged pairwise, in as many passes as it takes.

Confirmed by the public code (anakin-skywalker-Joseph/Folder: ``folder.py``, the simplified form it recommends, and
``llava/model/folder``, the form inside CLIP). One pass is ToMe's bipartite matching: tokens at even positions each
pick the token at an odd position that they are most similar to, and those with the most similar pick are merged into
it. A pass removes less than half of the tokens; what is left to remove is removed by further passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dyvte.methods.selection import images
from dyvte.runtime.reduction import LayerView, Reduction, first_copies


class Folded(NamedTuple):
    """What a fold leaves.

    Attributes:
        features: [n, tokens - remove, d], the means of what each token is made of.
        sizes: float32 [n, tokens - remove], how many of the original tokens that is.
        columns: long [n, tokens - remove], the position among the original tokens of the one that took the others in.
    """

    features: torch.Tensor
    sizes: torch.Tensor
    columns: torch.Tensor


def merge(
    features: torch.Tensor, remove: int, metric: torch.Tensor | None = None, protect_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The simplified form as the reference computes it, with its factor for size: :func:`fold`, then :func:`factor`.

    The reference leaves the factor out where a single pass removes at least half as many tokens as stay, that is for
    about a third to a half of the tokens; so does this. The means without it are ``fold(...).features``.

    Args:
        features, remove, metric, protect_first: see :func:`fold`.

    Returns:
        [n, tokens - remove, d] and float32 [n, tokens - remove], the number of tokens each is made of; in the original
        order.

    Raises:
        ValueError: fewer than two tokens would stay.
    """
    folded = fold(features, remove, metric, protect_first)
    return scaled(folded, remove), folded.sizes


def scaled(folded: Folded, remove: int) -> torch.Tensor:
    """The features with the factor for size where :func:`merge` has it: [n, tokens - remove, d]."""
    left = folded.features.shape[1]
    if remove == 0 or (remove <= (left + remove - 1) // 2 and remove >= left // 2):
        return folded.features
    return folded.features * factor(folded.sizes).to(folded.features.dtype)[..., None]


def factor(sizes: torch.Tensor) -> torch.Tensor:
    """What a merged token is multiplied with for the number of tokens it is made of: 1 + ln(size)."""
    return 1 + sizes.log()


def fold(
    features: torch.Tensor, remove: int, metric: torch.Tensor | None = None, protect_first: bool = False
) -> Folded:
    """Merges ``remove`` tokens of each sample into similar ones; features are means weighted by size.

    Similarity is the cosine of ``metric``, in float32; of two equal ones the earlier token is taken, on both sides
    (the reference leaves ties to its sort). Between passes the metric is averaged like the features.

    Args:
        features: [n, tokens, d], one image a row: projected features in the reference.
        remove: tokens to remove, 0 ... tokens - 2. The reference's calls are ``int(tokens * share)``.
        metric: [n, tokens, m], what similarity is measured by; None: the features.
        protect_first: whether the first token is a CLS token, which is not merged into another (others may still not
            be merged into it either: it stands at an even position).

    Raises:
        ValueError: fewer than two tokens would stay.
    """
    return _fold(features, features if metric is None else metric, remove, protect_first)


def fold_in_tower(
    hidden: torch.Tensor, remove: int, keys: torch.Tensor, cls_attention: torch.Tensor, alpha: float = 5.0
) -> Folded:
    """The form inside a CLIP tower: tokens that the CLS token attends to are spared.

    It sits in vision layer Lv - 2 between attention and MLP, on hidden states with the CLS token first, which is
    protected. A token's similarity falls by 100 * alpha times the CLS attention it gets; between passes that attention
    is averaged over the merged tokens, not weighted by size. There is no factor for size. After each pass the tokens
    left at even positions come first, then those at odd ones, which is not the order of the image.

    Args:
        hidden: [n, tokens, d].
        remove: tokens to remove, 0 ... tokens - 2; the reference removes r * Lv. (It fails where fewer than 40 tokens
            stay; this does not.)
        keys: [n, tokens, head size], of that layer, averaged over heads.
        cls_attention: [n, tokens], the CLS row of that layer, averaged over heads, weights after softmax.
        alpha: 5 for LLaVA.

    Raises:
        ValueError: fewer than two tokens would stay.
    """
    return _fold(hidden, keys, remove, True, 100 * alpha * cls_attention.float(), in_order=False)


def _fold(
    features: torch.Tensor,
    metric: torch.Tensor,
    remove: int,
    protect_first: bool,
    penalty: torch.Tensor | None = None,
    in_order: bool = True,
) -> Folded:
    n, tokens, _ = features.shape
    if isinstance(remove, bool) or not isinstance(remove, int) or not 0 <= remove <= max(tokens - 2, 0):
        raise ValueError(f"remove must be 0 ... {max(tokens - 2, 0)} for {tokens} tokens, not {remove!r}")
    sums, sizes = features, torch.ones(n, tokens, device=features.device)
    metric, columns = metric.float(), torch.arange(tokens, device=features.device).expand(n, tokens)
    while remove > 0:
        step = min(remove, (sizes.shape[1] - 1) // 2)
        target, stays = _match(metric, step, protect_first, penalty, in_order)
        weighted, total = metric * sizes[..., None], _gather_sums(sizes[..., None], target, step)
        metric = _gather_sums(weighted, target, step) / total
        if penalty is not None:
            members = _gather_sums(torch.ones_like(sizes)[..., None], target, step)
            penalty = (_gather_sums(penalty[..., None], target, step) / members)[..., 0]
        sums, sizes, remove = _gather_sums(sums, target, step), total[..., 0], remove - step
        columns = torch.zeros_like(columns[:, step:]).scatter(1, target[stays].view(n, -1), columns[stays].view(n, -1))
    return Folded((sums / sizes[..., None]).to(features.dtype), sizes, columns)


def _match(
    metric: torch.Tensor, remove: int, protect_first: bool, penalty: torch.Tensor | None, in_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token goes in one pass, long [n, tokens], and whether it is one that stays, bool [n, tokens]."""
    unit = F.normalize(metric, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if penalty is not None:
        similarity = similarity - penalty[:, ::2, None]
    if protect_first:
        similarity[:, 0] = -torch.inf
    pick = similarity.argmax(-1)
    merged = similarity.amax(-1).argsort(dim=1, descending=True, stable=True)[:, :remove]
    stays = torch.ones(metric.shape[:2], dtype=torch.bool, device=metric.device).scatter_(1, 2 * merged, False)
    if in_order:
        place = stays.cumsum(1) - 1
    else:
        even, odd = stays[:, ::2].cumsum(1) - 1, torch.arange(metric.shape[1] // 2, device=metric.device)
        place = torch.zeros_like(stays, dtype=torch.long)
        place[:, ::2] = even
        place[:, 1::2] = odd + even[:, -1:] + 1
    return place.scatter(1, 2 * merged, place.gather(1, 2 * pick.gather(1, merged) + 1)), stays


def _gather_sums(values: torch.Tensor, target: torch.Tensor, removed: int) -> torch.Tensor:
    """Adds up what goes to the same place: [n, tokens, d] to [n, tokens - removed, d]."""
    out = values.new_zeros(values.shape[0], values.shape[1] - removed, values.shape[2])
    return out.scatter_add_(1, target[..., None].expand_as(values), values)


class Folder(Reduction):
    """Merges, before the decoder, the most similar visual tokens of each image, in the simplified form.

    A merged token stands where the one stood that took the others in, with its position; the reference renumbers. An
    image is what stands together in the prompt: tokens of tiles with nothing between them are folded together.

    Args:
        remove: the share of each image's tokens that is removed, 0 <= share < 1, rounded down as in the reference,
            whose settings are .5 and .66; two tokens stay in any case.

    Raises:
        ValueError: another share.
    """

    layers = (0,)

    def __init__(self, remove: float = 0.5):
        if isinstance(remove, bool) or not isinstance(remove, (int, float)) or not 0 <= remove < 1:
            raise ValueError(f"remove must be the share of visual tokens removed, 0 <= share < 1, not {remove!r}")
        self.remove = remove

    def select(self, view: LayerView) -> torch.Tensor:
        kept = self._folded(view)[0]
        return kept[first_copies(view).to(kept.device)]

    def update(self, view: LayerView, keep: torch.Tensor) -> torch.Tensor:
        return self._folded(view)[1]

    def _folded(self, view: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens stay, bool [n, width], and the new states [n, width, d]."""
        return view.group.memo(lambda: self._fold(view), "folded", self, view.group.hidden, view.places)

    def _fold(self, view: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, kept = view.hidden.clone(), view.visual.clone()
        for rows, columns in images(view.visual.to(hidden.device)):
            tokens = columns.shape[1]
            remove = min(int(tokens * self.remove), max(tokens - 2, 0))
            folded = fold(hidden[rows, columns], remove)
            places = columns.gather(1, folded.columns)
            hidden[rows, places] = scaled(folded, remove)
            kept[rows.to(kept.device), columns.to(kept.device)] = False
            kept[rows.to(kept.device), places.to(kept.device)] = True
        return kept, hidden
