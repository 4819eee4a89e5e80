"""What the scoring methods share: attention received, how many to keep, which ones.

One convention for all of them: a share is rounded half up and keeps at least one token unless it is 0; of two equal
scores the earlier token is kept; the order of the sequence never changes. Reference codes take ``int``, ``round`` or
a plain ``topk`` here, which differ by one token and, on ties, from device to device.
"""

from __future__ import annotations

import torch


def share_count(share: float, total: torch.Tensor) -> torch.Tensor:
    """How many of ``total`` a share keeps: rounded half up, at least one unless the share or the total is 0.

    Args:
        share: 0 ... 1.
        total: long, any shape.

    Returns:
        long, the shape of ``total``

    Raises:
        ValueError: a share outside 0 ... 1.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"a share must be a number in 0 ... 1, not {share!r}")
    count = (share * total.double() + 0.5).floor().long()
    return torch.where(total > 0, count.clamp(min=1), 0) if share > 0 else torch.zeros_like(count)


def top(scores: torch.Tensor, count: int | torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """The ``count`` candidates with the highest scores, the earlier one of two that are equal.

    Args:
        scores: float [n, s].
        count: one for all rows, or long [n]; more than there are candidates keeps all of them.
        among: bool [n, s], the candidates; None: all.

    Returns:
        bool [n, s]
    """
    among = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~among).gather(1, order).long().argsort(dim=1, stable=True))  # -inf may be a true score
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return among & (rank < torch.as_tensor(count, device=scores.device).reshape(-1, 1))


def top_within(scores: torch.Tensor, groups: torch.Tensor, share: float) -> torch.Tensor:
    """The share of every group with the highest scores, at least one of each unless the share is 0.

    Args:
        scores: float [n, s].
        groups: long [n, s], the group of each token; negative: none, never kept.
        share: 0 ... 1, see :func:`share_count`.

    Returns:
        bool [n, s]
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    grouped = groups.gather(1, order)
    first = torch.searchsorted(grouped, grouped)
    size = torch.searchsorted(grouped, grouped, right=True) - first
    rank = torch.arange(scores.shape[1], device=scores.device) - first
    kept = (grouped >= 0) & (rank < share_count(share, size))
    return torch.zeros_like(kept).scatter_(1, order, kept)


def received(attention: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """What each column gets: attention averaged over heads, summed over rows.

    FastV reads it with the last prompt row alone, HiMAP with all rows after the image, FoPru with all rows.

    Args:
        attention: [n, heads, q, s], weights after softmax.
        rows: bool [n, q], the rows that count; None: all.

    Returns:
        float32 [n, s]
    """
    mean = attention.mean(1, dtype=torch.float32)
    return mean.sum(1) if rows is None else torch.einsum("nqs,nq->ns", mean, rows.to(mean))


def rows_after(visual: torch.Tensor, inclusive: bool = False) -> torch.Tensor:
    """The positions after the last visual token of each row; all of them where there is none.

    Args:
        visual: bool [n, s].
        inclusive: whether the last visual token itself belongs to them.

    Returns:
        bool [n, s]; right padding is among them, mask it away.
    """
    place = torch.arange(visual.shape[1], device=visual.device)
    last = place.where(visual, -1).amax(1, keepdim=True)
    return place >= last if inclusive else place > last


def images(visual: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images of a batch: visual tokens that stand together, those of one length in one place.

    Args:
        visual: bool [n, s].

    Returns:
        for each length, rows long [images, 1] and columns long [images, length] on the device of ``visual``
    """
    before = torch.nn.functional.pad(visual[:, :-1], (1, 0))
    after = torch.nn.functional.pad(visual[:, 1:], (0, 1))
    rows, starts = (visual & ~before).nonzero(as_tuple=True)
    lengths = (visual & ~after).nonzero(as_tuple=True)[1] - starts + 1
    found = []
    for length in lengths.unique().tolist():
        among = lengths == length
        columns = starts[among, None] + torch.arange(length, device=visual.device)
        found.append((rows[among, None], columns))
    return found
