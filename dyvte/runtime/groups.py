"""Groups: samples of a batch that run a layer together, each with the tokens that it still has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from dyvte.runtime.arguments import LENGTHS, MASK, SHARED_STATES, compact_argument
from dyvte.runtime.cache import group_cache
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.kinds import LayerKind
from dyvte.runtime.masks import check_mask, compact_mask, continued_mask, select_mask
from dyvte.runtime.prompt import Prompt, TextReader
from dyvte.runtime.tokens import KeptTokens

# Rows are padded to the widest of their group, and every group is one more call of the layer: samples join a group
# as long as they are at least this share of its width.
LIKE_WIDTH = 0.5


class Group:
    """Samples with the tokens that they still have.

    Attributes:
        samples: long [n] on the CPU, rows of the batch.
        tokens: their tokens [n, width], columns of the prompt.
        hidden: [n, width, d].
        whole: whether all columns of the prompt are there, in place, padding included.
        reducible: long [m] on the CPU, places among ``samples`` of those from which something may still be taken.
        cache: where the layers' keys and values go; the model's own, or one of the group's.
    """

    def __init__(
        self,
        prompt: Prompt,
        samples: torch.Tensor,
        tokens: KeptTokens,
        hidden: torch.Tensor,
        reducible: torch.Tensor,
        cache: Cache | None,
        whole: bool = False,
    ):
        self.prompt, self.samples, self.tokens, self.hidden = prompt, samples, tokens, hidden
        self.reducible, self.cache, self.whole = reducible, cache, whole
        self._memo: dict[Any, tuple[Any, Any]] = {}
        self._shared: Any = None
        self._masks: dict[tuple[str, int | None], Any] = {}  # of the layer of each kind that ran last

    def memo(self, make: Callable[[], Any], name: Any, *of: Any) -> Any:
        """``make()``, or what it gave before for the same objects, which are kept so that their ids stay theirs."""
        key = (name, *map(id, of))
        if key not in self._memo:
            self._memo[key] = make(), of
        return self._memo[key][0]

    def samples_on(self, device: torch.device) -> torch.Tensor:
        """The samples, there; brought once, since every copy from the host makes a GPU's queue run dry."""
        return self.memo(lambda: self.samples.to(device), device)

    @property
    def visual(self) -> torch.Tensor:
        """bool [n, width], the visual tokens."""

        def find() -> torch.Tensor:
            grid = self.prompt.visual
            found = self.tokens.gather(grid, self.samples_on(grid.device))
            return found & self.tokens.valid

        return self.memo(find, "visual")

    @property
    def staying(self) -> torch.Tensor:
        """bool [n, width], what every layer runs on in any case, see :attr:`Prompt.staying`."""

        def find() -> torch.Tensor:
            if not self.whole:
                return self.tokens.valid & ~self.visual
            grid = self.prompt.staying
            return grid[self.samples_on(grid.device)]

        return self.memo(find, "staying")

    @property
    def keys(self) -> KeptTokens:
        """The tokens as a cache holds them: padding that the layers run on is nobody's key."""

        def mark() -> KeptTokens:
            grid = self.prompt.valid
            valid = self.tokens.valid & self.tokens.gather(grid, self.samples_on(grid.device))
            return KeptTokens(self.tokens.index, valid, self.tokens.ragged)

        return self.memo(mark, "keys")

    def reader(self, places: torch.Tensor) -> TextReader:
        """Reads the text states of the samples at some places of the group."""

        def make() -> TextReader:
            device = self.prompt.tail.index.device
            tail = self.prompt.tail.rows(self.samples[places].to(device))
            rows = places.to(device)
            if not self.whole:
                place = self.tokens.rows(rows.to(self.tokens.index.device)).places(self.prompt.shape[1])
                tail = KeptTokens(place.to(device).gather(1, tail.index), tail.valid, tail.ragged)
            everyone = len(places) == len(self.samples)
            return TextReader(tail, rows, self.tokens.width, whole=everyone)

        return self.memo(make, "reader", places)

    def arguments(
        self, kind: LayerKind, given: Mapping[str, Any], spec: DecoderSpec, held: KeptTokens | None, past: int
    ) -> dict[str, Any]:
        """What a layer of ``kind`` is given for these samples: their rows and columns of everything.

        Args:
            given: the layer's arguments for the whole batch, the hidden states and the cache left out.
            held: what the model's cache holds of the turns before, for the whole batch.
            past: columns of the turns before.
        """
        batch = self.prompt.shape[0]
        samples = self.samples if self._some else None
        tokens = None if self.whole else self.tokens
        flash = "flash" in str(spec.config._attn_implementation)
        rows = self.hidden.shape[1]  # fewer than tokens where the model goes on with the last one alone
        if rows < self.tokens.width:
            tokens = None
        fitted = {}
        for name, value in given.items():
            if name == MASK and kind.source is not None:
                mask = self._masks[kind.name, kind.span]
                fitted[name] = mask[:, :, -rows:] if mask is not None and mask.ndim == 4 else mask
            elif name == MASK:
                fit = functools.partial(self._mask, value, kind, spec, held, past)
                fitted[name] = self._masks[kind.name, kind.span] = self.memo(fit, (name, kind), value, held)
            elif name == "position_ids" and rows < self.tokens.width and value is not None:
                fitted[name] = compact_argument(name, value, samples, None, batch)[..., -rows:]
            elif name == SHARED_STATES:
                fitted[name] = self._shared_states(value)
            elif name in LENGTHS:
                fitted[name] = None
            elif name == "position_ids" and flash and not self.whole:
                fitted[name] = None  # gaps would read as several packed sequences; rotations are applied already
            else:
                fit = functools.partial(compact_argument, name, value, samples, tokens, batch)
                fitted[name] = self.memo(fit, name, value)
        return fitted

    @property
    def _some(self) -> bool:
        everyone = torch.arange(self.prompt.shape[0])
        return self.memo(lambda: not torch.equal(self.samples, everyone), "some")

    def _mask(self, mask: Any, kind: LayerKind, spec: DecoderSpec, held: KeptTokens | None, past: int) -> Any:
        check_mask(mask)
        if held is not None and kind.attends:
            mask = select_mask(mask, self.samples, self.prompt.shape[0])
            before = held.rows(self.samples_on(held.index.device))
            return continued_mask(mask, self.tokens, before, past, kind, spec.config)
        if self.whole:
            return select_mask(mask, self.samples, self.prompt.shape[0])
        return compact_mask(mask, self.samples, self.tokens, kind, spec.config, self.hidden)

    def _shared_states(self, value: Any) -> Any:
        """States that layers of one pass hand on to each other: a store of the group's own."""
        if self._shared is None:
            self._shared = value if self.whole and not self._some else type(value)()
        return self._shared


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
