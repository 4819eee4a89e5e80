"""Attention masks for fewer tokens than the model made its own for.

Wherever the model gave a mask, its rows and columns are selected, so that whatever structure it has is kept (windows,
chunks, prefixes and image blocks that attend both ways). Where it gave none, attention is causal.
"""

from __future__ import annotations

from typing import Any

import torch

from dyvte.runtime.compat import PreTrainedConfig, causal_mask
from dyvte.runtime.kinds import LayerKind
from dyvte.runtime.tokens import KeptTokens

Mask = Any  # bool or float [batch, 1, query, key], [batch, key], or None


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as one that is added to attention scores."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def check_mask(mask: Mask) -> None:
    """Raises ``ValueError`` for a mask whose rows and columns cannot be selected."""
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim in (2, 4)):
        shape = f" {list(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
        raise ValueError(
            f"a {type(mask).__name__}{shape} as attention mask cannot be cut to fewer tokens: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


def select_mask(mask: Mask, samples: torch.Tensor, batch: int) -> Mask:
    """The rows of some samples of the batch; a mask for all samples alike stays as it is."""
    if isinstance(mask, torch.Tensor) and len(mask) == batch > 1:
        return mask.index_select(0, samples.to(mask.device))
    return mask


def compact_mask(
    mask: Mask,
    samples: torch.Tensor,
    tokens: KeptTokens,
    kind: LayerKind,
    config: PreTrainedConfig,
    hidden: torch.Tensor,
) -> Mask:
    """The mask of a layer over a prompt for compacted rows.

    Args:
        mask: as the layer got it for full rows of the whole batch, or for all samples alike.
        samples: rows of the batch, one for each row of ``tokens``.
        tokens: what is kept.
        kind: of the layer.
        config: of the decoder.
        hidden: the compacted hidden states [n, width, d].
    """
    device = mask.device if isinstance(mask, torch.Tensor) else hidden.device
    index, valid = tokens.index.to(device), tokens.valid.to(device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        row = (samples.to(device) if len(mask) > 1 else torch.zeros_like(samples, device=device))[:, None, None]
        compact = mask[row, :, index[:, :, None], index[:, None, :]].permute(0, 3, 1, 2)
        if tokens.ragged:
            blocked = False if compact.dtype == torch.bool else torch.finfo(compact.dtype).min
            compact = compact.masked_fill(~valid[:, None, None, :], blocked)
        return compact
    if isinstance(mask, torch.Tensor):
        return tokens.gather(mask, samples.to(device)).to(mask.dtype) * valid.to(mask.dtype)
    if not kind.attends:
        return valid.long() if tokens.ragged else None
    return causal_mask(config, hidden, valid if tokens.ragged else None)


def continued_mask(
    mask: Mask, new: KeptTokens, held: KeptTokens, past: int, kind: LayerKind, config: PreTrainedConfig
) -> Mask:
    """The mask of an attention layer for a later turn, whose cache holds some columns of the turns before.

    Among the new columns the model's own mask holds, so image blocks keep attending both ways.

    Args:
        mask: as the model made it for all new columns of the same samples; its key columns end with them.
        new: the columns of this turn that are kept, counted from its first one.
        held: the columns that the cache holds, counted from the beginning.
        past: how many columns there were before this turn.
        kind: of the layer.
        config: of the decoder.
    """
    device = held.index.device if mask is None else mask.device
    index, valid = new.index.to(device), new.valid.to(device)
    before, known = held.index.to(device), held.valid.to(device)
    if "flash" in str(config._attn_implementation):
        return torch.cat([known, valid], 1)
    query = past + index[:, :, None]
    start = first_column(torch.cat([known, valid], 1), torch.cat([before, past + index], 1))
    earlier = known[:, None, :].expand(-1, index.shape[1], -1)
    recent = index[:, None, :] <= index[:, :, None]
    for part, columns in ((0, before), (1, past + index)):
        reached = kind.reaches(query, columns[:, None, :], start[:, None, None])
        if reached is not None and part == 0:
            earlier = earlier & reached
        elif reached is not None:
            recent = recent & reached
    if mask is not None:
        own = mask[:, 0, :, -mask.shape[2] :].expand(len(index), -1, -1)
        own = own.gather(1, index[:, :, None].expand(-1, -1, own.shape[2]))
        own = own.gather(2, index[:, None, :].expand(-1, index.shape[1], -1))
        recent = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
    allowed = torch.cat([earlier, recent & valid[:, None, :]], 2)[:, None]
    return allowed if mask is None or mask.dtype == torch.bool else additive(allowed, mask.dtype)


def first_column(valid: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The first column of each row that is not padding: long [batch]."""
    return torch.where(valid, columns, columns.amax(1, keepdim=True)).amin(1)
