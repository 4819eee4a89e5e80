"""Parting groups of samples by what they lose, and joining those of like widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dyvte.runtime.cache_rows import group_cache
from dyvte.runtime.groups import Group
from dyvte.runtime.tokens import KeptTokens

# Rows are padded to the widest of their group, and every group is one more call of the layer: samples join a group
# as long as they are at least this share of its width.
LIKE_WIDTH = 0.5


def split(group: Group, keep: torch.Tensor, fewer: Sequence[bool], left: Sequence[bool]) -> list[Group]:
    """Parts a group into the samples that lose tokens and those that do not.

    Args:
        keep: bool [n, width], the tokens that stay.
        fewer: for each sample, whether it loses any.
        left: for each sample, whether it has visual tokens left.
    """
    losing = torch.tensor(fewer)
    has = torch.tensor(left)
    still = torch.zeros(len(losing), dtype=torch.bool)
    still[group.reducible] = True
    parts = []
    for places in ((~losing).nonzero().flatten(), losing.nonzero().flatten()):
        if len(places) == 0:
            continue
        rows = places.to(group.hidden.device)
        samples, cache = group.samples[places], None if group.cache is None else group_cache()
        if bool(losing[places[0]]):
            here = places.to(keep.device)
            among = KeptTokens.from_mask(keep[here])
            tokens = KeptTokens(group.tokens.index[here].gather(1, among.index), among.valid, among.ragged)
            hidden = among.gather(group.hidden[rows])
            reducible = (still & has)[places].nonzero().flatten()
            parts.append(Group(group.prompt, samples, tokens, hidden, reducible, cache))
        elif len(places) == len(losing):
            parts.append(group)
        else:
            tokens, reducible = (
                group.tokens.rows(places.to(group.tokens.index.device)),
                still[places].nonzero().flatten(),
            )
            parts.append(Group(group.prompt, samples, tokens, group.hidden[rows], reducible, cache, group.whole))
    return parts


def join(groups: Sequence[Group]) -> Group:
    """One group of compacted groups, its rows padded on the left to the widest, in the order of the batch."""
    if len(groups) == 1:
        return groups[0]
    width, device = max(group.tokens.width for group in groups), groups[0].hidden.device

    def pad(value: torch.Tensor, fill: Any) -> torch.Tensor:
        short = width - value.shape[1]
        return value if short == 0 else nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (short, 0), value=fill)

    # Places that hold nothing must still name different columns, so they name what is kept elsewhere of the row.
    index = torch.cat([_widen(group.tokens, width, group.prompt.shape[1]) for group in groups])
    valid = torch.cat([pad(group.tokens.valid, False) for group in groups])
    hidden = torch.cat([pad(group.hidden.to(device), 0) for group in groups])
    samples, order = torch.cat([group.samples for group in groups]).sort()
    reducible = torch.cat([group.samples[group.reducible] for group in groups])
    here = order.to(index.device)
    tokens = KeptTokens(index[here], valid[here], ragged=len({group.tokens.width for group in groups}) > 1 or any(
        group.tokens.ragged for group in groups
    ))  # fmt: skip
    cache = None if groups[0].cache is None else group_cache()
    places = torch.isin(samples, reducible).nonzero().flatten()
    return Group(groups[0].prompt, samples, tokens, hidden[order.to(device)], places, cache)


def _widen(tokens: KeptTokens, width: int, length: int) -> torch.Tensor:
    """The index of compact tokens with more places on the left, for columns that are not kept."""
    if tokens.width == width:
        return tokens.index
    keep = torch.zeros(len(tokens.index), length, dtype=torch.bool, device=tokens.index.device)
    keep.scatter_(1, tokens.index, torch.ones_like(tokens.index, dtype=torch.bool))
    others = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, : width - tokens.width]
    return torch.cat([others, tokens.index], 1)


def regroup(parts: Sequence[Group]) -> list[Group]:
    """Few groups of like widths, the widest first: padding costs work, groups cost calls."""
    parts = sorted(parts, key=lambda group: (not group.whole, -group.tokens.width))
    bins: list[list[Group]] = []
    for part in parts:
        if bins and not bins[-1][0].whole and part.tokens.width >= LIKE_WIDTH * bins[-1][0].tokens.width:
            bins[-1].append(part)
        else:
            bins.append([part])
    return [join(together) for together in bins]
