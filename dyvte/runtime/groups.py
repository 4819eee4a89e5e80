"""Groups: samples of a batch that run a layer together, each with the tokens that it still has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from dyvte.runtime.arguments import LENGTHS, MASK, SHARED_STATES, compact_argument
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.kinds import LayerKind
from dyvte.runtime.masks import check_mask, compact_mask, continued_mask, select_mask
from dyvte.runtime.prompt import Prompt, TextReader
from dyvte.runtime.tokens import KeptTokens


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
        flash = "flash" in str(spec.config._attn_implementation)
        rows = self.hidden.shape[1]  # fewer than tokens where the model goes on with the last one alone
        tokens = None if self.whole or rows < self.tokens.width else self.tokens
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


def gather_columns(groups: Sequence[Group], tokens: KeptTokens, length: int) -> torch.Tensor:
    """The states of tokens that no method drops, from wherever the samples of a batch are: [batch, width, d].

    Args:
        groups: every sample of the batch once.
        tokens: of the whole batch.
        length: columns of the prompt.
    """
    if len(groups) == 1 and groups[0].whole:
        return tokens.gather(groups[0].hidden)
    parts = []
    for group in groups:
        device = group.hidden.device
        index = tokens.index[group.samples_on(tokens.index.device)].to(group.tokens.index.device)
        place = group.tokens.places(length).gather(1, index).to(device)
        parts.append(group.hidden[torch.arange(len(place), device=device)[:, None], place])
    return _in_order(parts, groups)


def text_states(groups: Sequence[Group], prompt: Prompt, spec: DecoderSpec) -> torch.Tensor:
    """The text states of a batch whose samples are in these groups, every one once: float32 [batch, 2d]."""
    if len(groups) == 1 and groups[0].whole:
        return prompt.reader(spec.read(groups[0].hidden))
    everyone = [group.memo(lambda g=group: torch.arange(len(g.samples)), "everyone") for group in groups]
    parts = [group.reader(places)(spec.read(group.hidden)) for group, places in zip(groups, everyone)]
    return _in_order(parts, groups)


def _in_order(parts: Sequence[torch.Tensor], groups: Sequence[Group]) -> torch.Tensor:
    device = parts[0].device
    order = torch.cat([group.samples for group in groups]).argsort()
    return torch.cat([part.to(device) for part in parts])[order.to(device)]
