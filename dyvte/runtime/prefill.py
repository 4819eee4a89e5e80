"""One forward pass over the prompt of a turn, in which every sample has its own tokens at every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache

from dyvte.runtime.arguments import cache_name, check_arguments, tensors
from dyvte.runtime.attention import AttentionCall
from dyvte.runtime.bypass import Detour
from dyvte.runtime.decisions import Decisions
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.pass_cache import PassCache
from dyvte.runtime.placement import loaded
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.tokens import KeptTokens
from dyvte.runtime.verdict import not_finite
from dyvte.runtime.vision import VisionAttention


class PromptPass:
    """The groups of a prompt on their way through the layers.

    Attributes:
        groups: the samples of the batch; each runs every layer once. At first one group of all samples and tokens.
        decisions: what reductions say about it.
        counts: for each layer run so far, (samples, visual tokens of each) of its groups.
        kept: for each layer run so far, (samples, tokens) of its groups.
    """

    def __init__(
        self, spec: DecoderSpec, prompt: Prompt, hidden: torch.Tensor, cache: Cache | None, past: torch.Tensor
    ):
        """
        Args:
            hidden: the embeddings that enter the decoder [batch, sequence, d].
            cache: the model's; None without one.
            past: bool [batch, columns of the turns before], what is not padding there.
        """
        self.spec, self.prompt, self.cache = spec, prompt, PassCache(spec, prompt, cache, past)
        self.batch, self.length = prompt.shape
        everyone, may = torch.arange(self.batch), prompt.can_leave.nonzero().flatten()
        whole = KeptTokens.whole(prompt.valid)
        self.groups = [Group(prompt, everyone, whole, hidden, may, cache, whole=True)]
        self.decisions = Decisions(spec, self.batch)
        self.current: Group | None = None  # the one whose layer is running
        self.attention: dict[int, AttentionCall] = {}  # by group, of the layer that ran last
        self.vision: VisionAttention | None = None
        self.counts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.kept: list[list[tuple[torch.Tensor, KeptTokens]]] = []
        self._checked: set[tuple[str, ...]] = set()  # names of arguments
        self.returns_tuple = False
        self._returned: torch.Tensor | None = None

    def start(self, method: Reduction) -> None:
        """Asks a method what it has to say about this prompt."""
        self.decisions.start(method, self.groups[0])

    def run(self, index: int, forward: Callable[..., Any], hidden: torch.Tensor, given: dict[str, Any]) -> Any:
        """Runs decoder layer ``index`` for every group; what the layer would have returned for the first of them.

        After the last layer everything is back where it was, with zeros at the tokens that are gone.

        Args:
            forward: of the layer.
            hidden: as the model hands them on: those of the first group.
            given: the layer's other arguments, as for the whole batch.
        """
        if index != len(self.counts):
            raise ValueError(
                f"{type(self.spec.decoder).__name__} runs decoder layer {index} after {len(self.counts)} others: "
                "tokens can be withdrawn only where every layer runs once, in order. Use the model without the exit"
            )
        self._receive(index, hidden)
        self._reduce(index)
        self.attention.clear()
        bypass = self.decisions.bypasses.get(index)
        detours = [] if bypass is None else [Detour(group, bypass, index, self.spec) for group in self.groups]
        working = [detour.part for detour in detours] or self.groups
        self._note(working)
        name, last = cache_name(given), index == self.spec.num_layers - 1
        others: tuple | None = None  # what the layer returns beside its states
        with loaded(self.spec.layers[index], len(working)):
            for group in working:
                self.current = group
                group.hidden = group.hidden.to(hidden.device)
                states = self.spec.by_layers(group.hidden)
                output = forward(states, **self._arguments(index, group, given, name))
                states, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
                group.hidden = self.spec.by_rows(states)
                if others and not self.cache.serves(index, group):
                    others = self._other_outputs(index, group, others)
        self.current = None
        self.cache.merge(index, working)
        for detour in detours:
            detour.rejoin()
        result = self._full() if last else self.groups[0].hidden
        if last and not self._dense:
            self._check_finite(result)
        result = self.spec.by_layers(result)
        self._returned, self.returns_tuple = result, others is not None
        return result if others is None else (result, *others)

    def _other_outputs(self, index: int, group: Group, others: tuple) -> tuple:
        """What a layer that ran for one group returns beside its states, as if for the whole batch."""
        if tensors(others):
            raise ValueError(
                f"decoder layer {index} of {type(self.spec.model).__name__} returns tensors beside its states (keys "
                "and values, in old code), which cannot be put together for samples that hold different tokens: call "
                "the model with use_cache=False, or without the exit"
            )
        return tuple(self.cache.cache if other is group.cache else other for other in others)

    def _arguments(self, index: int, group: Group, given: dict[str, Any], name: str | None) -> dict[str, Any]:
        if self.cache.serves(index, group):
            return given
        if tuple(given) not in self._checked:
            check_arguments(self.spec.layers[index], given, self.batch, self.length)
            self._checked.add(tuple(given))
        others = {key: value for key, value in given.items() if key != name}
        held = self.cache.held(index)
        arguments = group.arguments(self.spec.kinds[index], others, self.spec, held, self.cache.length)
        if name is not None:
            arguments[name] = self.cache.prepare(index, group, held)
        return arguments

    def release(self) -> None:
        """Lets go of states and caches; what was kept where stays known."""
        self.groups, self.attention = [], {}
        self.cache, self.decisions, self.vision, self._returned = None, None, None, None

    def _receive(self, index: int, hidden: torch.Tensor) -> None:
        group, before = self.groups[0], self._returned
        if before is not None and not self._dense and self._is_last_row(index, hidden, before):
            for other in self.groups:  # only layers that read other layers' keys are left: no other row matters
                other.hidden = other.hidden[:, -1:]
        elif before is not None and not self._dense and hidden is not before:
            moved = hidden.device != before.device or hidden.dtype != before.dtype
            if hidden.shape != before.shape or not (moved or hidden.data_ptr() == before.data_ptr()):
                raise ValueError(
                    f"the model changes the hidden states before decoder layer {index}, when some visual tokens are "
                    "gone: they cannot be withdrawn so early. Choose a later layer, or use it without the exit"
                )
        group.hidden = self.spec.by_rows(hidden)

    def _is_last_row(self, index: int, hidden: torch.Tensor, before: torch.Tensor) -> bool:
        """Whether the model goes on with the last row alone, as Gemma 4 does for ``logits_to_keep=1``."""
        if self.spec.kinds[index].source is None or self.spec.stream is not None or hidden.ndim != 3:
            return False
        last = before[:, -1:]
        return before.shape[1] > 1 and hidden.shape == last.shape and hidden.data_ptr() == last.data_ptr()

    @property
    def _dense(self) -> bool:
        """Whether every sample still has all its tokens."""
        return len(self.groups) == 1 and self.groups[0].whole

    def _reduce(self, index: int) -> None:
        """What goes before layer ``index``."""
        self.groups = self.decisions.reduce(index, self.groups, self.attention, self.vision)

    def _note(self, groups: Sequence[Group]) -> None:
        self.counts.append([(g.samples, g.memo(lambda g=g: g.visual.sum(1), "count")) for g in groups])
        self.kept.append([(g.samples, g.tokens) for g in groups])

    def _full(self) -> torch.Tensor:
        """The states of all samples and columns, with zeros at what is gone."""
        if self._dense:
            return self.groups[0].hidden
        like = self.groups[0].hidden
        one = like.shape[1] < self.groups[0].tokens.width  # the last row is all that the model went on with
        full = like.new_zeros(self.batch, 1 if one else self.length, *like.shape[2:])
        for group in self.groups:
            rows = group.samples_on(full.device)
            if group.whole or one:
                full[rows] = group.hidden.to(full.device)
            else:
                # Places that hold nothing write their zeros to columns that are gone anyway.
                states = group.hidden.where(group.tokens.valid[(..., *[None] * (like.ndim - 2))], 0)
                full[rows[:, None], group.tokens.index.to(full.device)] = states.to(full.device)
        return full

    def _check_finite(self, hidden: torch.Tensor) -> None:
        """Raises ``ValueError`` if the last token of a prompt came out as NaN or infinite."""
        tail = self.prompt.tail
        there = hidden.shape[1] == self.length and tail.index.device == hidden.device
        last = tail.gather(hidden)[:, -1] if there else hidden[:, -1]
        fine = last.isfinite().flatten(1).all(1) | ~tail.valid[:, -1].to(hidden.device)
        if not bool(fine.all()):
            raise ValueError(not_finite((~fine).nonzero().flatten().tolist(), self.spec.num_layers))
