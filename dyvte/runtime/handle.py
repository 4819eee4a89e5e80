"""The door to the engine: a method put on a model, and what it did to every prompt."""

from __future__ import annotations

import functools
import operator
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dyvte.runtime.adaptation import without_skipped
from dyvte.runtime.adapted_layers import Adaptations
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.edits import Edits, LayerEdit
from dyvte.runtime.engine import Engine
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.reading import attention_layers, tower_of
from dyvte.runtime.reduction import Reduction, as_reduction
from dyvte.runtime.view import LayerView

RECORDED = 4096  # prompts


@contextmanager
def reduce_tokens(
    model: nn.Module,
    method: Reduction,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Iterator[Handle]:
    """Runs ``model`` with visual tokens taken away as ``method`` says, within the ``with`` block.

    What is taken is gone from hidden states, attention and cache of the layers after; positions stay.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``; the one whose ``generate``
            or ``forward`` is called, not a part of it, whose caller could not be checked.
        method: an exit policy, a pruning, or any :class:`~dyvte.runtime.reduction.Reduction`; ``a & b`` for both.
        visual_mask: bool [batch, sequence], True at visual tokens, where ``input_ids`` cannot show them; or a callable
            that gets the keyword arguments of the model's call (those of ``generate`` included) and returns it, such
            as :class:`~dyvte.SplicedVisualMask`. A tensor describes the first prompt of a conversation.
        decoder: the module that owns the decoder layers as ``.layers``, or the dotted path to it from ``model``; found
            by itself in models of transformers.

    Yields:
        A :class:`Handle`, which tells what was done.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: model, method or a later call do not fit; the message says what to do.
    """
    handle = attach(model, method, visual_mask, decoder)
    try:
        yield handle
    finally:
        handle.detach()


def visual_exit(
    model: nn.Module,
    policy: Reduction,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Any:
    """:func:`reduce_tokens` for an exit policy, see :mod:`dyvte.methods.exits`."""
    return reduce_tokens(model, policy, visual_mask, decoder)


def edit_layers(
    model: nn.Module,
    *edits: LayerEdit,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Any:
    """:func:`reduce_tokens` for edits of layers; with reductions, ``reduce_tokens(model, edit & reduction)``."""
    if not edits:
        raise ValueError("edit_layers needs at least one edit, such as dyvte.methods.HollowAttention")
    return reduce_tokens(model, functools.reduce(operator.and_, edits), visual_mask, decoder)


def attach(
    model: nn.Module,
    method: Reduction,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Handle:
    """Like :func:`reduce_tokens`, but until ``handle.detach()`` is called."""
    return Handle(model, method, visual_mask, decoder)


class PromptRecord:
    """What was done to a batch of prompts; worked out when it is asked for, since a GPU would wait for it.

    Attributes:
        layers: long [batch], the exit layer of each sample: how many layers worked on any of its visual tokens. A
            sample that has none, or whose prompt ends in one, counts as never leaving (L).
    """

    def __init__(self, run: PromptPass):
        prompt = run.prompt
        self._layers, self._batch = run.spec.num_layers, run.batch
        self.layers, self._counts = run.decisions.exits, run.counts
        self._visual, self._text = prompt.visual.sum(1), prompt.text.sum(1)
        self._keyless = [layer for layer, kind in enumerate(run.spec.kinds) if kind.name == "tokenwise"]
        self._width = [max(tokens.width for _, tokens in groups) for groups in run.kept]

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """long [L, batch], how many visual tokens every layer worked on."""
        counts = torch.zeros(self._layers, self._batch, dtype=torch.long)
        known: dict[int, torch.Tensor] = {}
        for layer, groups in enumerate(self._counts):
            for samples, count in groups:
                counts[layer, samples] = known.setdefault(id(count), count.cpu())
        return counts

    @functools.cached_property
    def visual(self) -> torch.Tensor:
        """long [batch], the visual tokens of each prompt."""
        return self._visual.cpu()

    @functools.cached_property
    def text(self) -> torch.Tensor:
        """long [batch], all its other tokens, padding left out."""
        return self._text.cpu()

    @functools.cached_property
    def cached(self) -> torch.Tensor:
        """long [L, batch], the tokens of each prompt that every layer's cache holds."""
        cached = self.text + self.counts
        cached[self._keyless] = 0
        return cached

    @property
    def width(self) -> torch.Tensor:
        """long [L], the places that every layer's cache has for each sample of the batch; the rest is padding."""
        return torch.tensor(self._width)


class Handle:
    """A method at work on a model. Made by :func:`reduce_tokens` and :func:`attach`.

    What it tells belongs to the thread that called the model.

    Attributes:
        method: as given.
        spec: what is known of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Reduction,
        visual_mask: VisualMask | None = None,
        decoder: str | nn.Module | None = None,
    ):
        self.method = as_reduction(method)
        self.spec = DecoderSpec.of(model, decoder)
        method.check(self.spec)
        self.spec = without_skipped(self.spec, method.parts())
        tower = tower_of(self.spec, method)  # before anything is attached
        self._edits = Edits(self.spec, [part for part in method.parts() if isinstance(part, LayerEdit)])
        self._adaptations = Adaptations(self.spec, method.parts())
        self._told = threading.local()
        self._engine = Engine(
            self.spec, visual_mask, self._begin, self._finish, method.check_rows, attention_layers(self.spec, method)
        )
        self._vision = tower() if tower is not None else None
        self._edits.attach(self._editing)
        self._adaptations.attach(self._editing, lambda: self._engine.run.cache.cache)

    def detach(self) -> None:
        """The model is as it was. Caches filled meanwhile are not usable without the method."""
        self._adaptations.remove()
        self._edits.remove()
        self._engine.remove()
        if self._vision is not None:
            self._vision.remove()

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.spec.num_layers

    @property
    def min_layer(self) -> int:
        """The smallest exit layer that the model allows."""
        return self.spec.min_layer

    @property
    def record(self) -> list[PromptRecord]:
        """One entry for each batch of prompts since attaching, the latest last; the latest 4,096 of them."""
        return list(getattr(self._told, "record", ()))

    @property
    def _latest(self) -> PromptRecord | None:
        told = getattr(self._told, "record", None)
        return told[-1] if told else None

    @property
    def layers(self) -> torch.Tensor | None:
        """long [batch], the exit layers of the latest prompts, see :class:`PromptRecord`; None before the first."""
        return None if self._latest is None else self._latest.layers

    @property
    def counts(self) -> torch.Tensor | None:
        """long [L, batch], the visual tokens that every layer worked on in the latest prompts; None before."""
        return None if self._latest is None else self._latest.counts

    def kept(self, layer: int) -> torch.Tensor:
        """The columns of the latest prompts that a decoder layer worked on: bool [batch, sequence].

        Args:
            layer: counted from 0.

        Raises:
            ValueError: no prompt has been run in this thread, or there is no such layer.
        """
        run: PromptPass | None = getattr(self._told, "latest", None)
        if run is None:
            raise ValueError("no prompt has been run yet in this thread: call the model first")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} is outside 0 ... {self.num_layers - 1}")
        kept = torch.zeros(run.prompt.shape, dtype=torch.bool, device=run.prompt.visual.device)
        for samples, tokens in run.kept[layer]:
            rows = samples.to(kept.device)
            kept[rows[:, None], tokens.index.to(kept.device)] = tokens.valid.to(kept.device)
        return (kept & run.prompt.valid).cpu()

    def _editing(self, layer: int) -> LayerView | None:
        """What a layer is running on; None while it decodes."""
        group = self._engine.run.current if self._engine.run is not None else None
        return None if group is None else LayerView(group, torch.arange(len(group.samples)), layer, self.spec)

    def _begin(self, prompt: Any, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> PromptPass:
        run = PromptPass(self.spec, prompt, hidden, cache, past)
        run.vision = self._vision.take() if self._vision is not None else None
        run.start(self.method)
        return run

    def _finish(self, run: PromptPass) -> None:
        if not hasattr(self._told, "record"):
            self._told.record = deque(maxlen=RECORDED)
        self._told.record.append(PromptRecord(run))
        run.release()
        self._told.latest = run
