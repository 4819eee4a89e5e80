"""Keeping only some visual tokens from one layer on: the baselines an early exit is compared with.

FastV (arXiv 2403.06764) keeps those that the last prompt token attends to most; random pruning keeps as many of any.
Both prune once, at a fixed layer, and can be combined with an exit policy, which later lets the rest go, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from dyvte.evaluation.costs import layer_flops, prefill_flops
from dyvte.methods.exits import ExitPolicy, NeverExit
from dyvte.runtime.attention import AttentionRows, call_arguments, find_attention
from dyvte.runtime.tokens import Columns, find_decoder, smallest_exit, underlying_model
from dyvte.runtime.withdrawal import VisualExit, VisualMask


@dataclass
class Pruning:
    """Keeps a share of each sample's visual tokens after ``layer`` layers; subclasses say which.

    Calling it with a model gives the context manager, so it works as a policy of ``dyvte.evaluation.evaluate``.

    Attributes:
        layer: K, how many decoder layers see all visual tokens, 1 ... L, counted as exit layers are.
        keep: the share of visual tokens kept, 0 ... 1; see :meth:`count`.
        exit: decides when the others leave as well; None: never.
    """

    layer: int
    keep: float
    exit: ExitPolicy | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer must be a number of decoder layers, 1 or more, not {self.layer!r}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 <= self.keep <= 1:
            raise ValueError(f"keep must be the share of visual tokens kept, 0 ... 1, not {self.keep!r}")
        if self.exit is not None and not isinstance(self.exit, ExitPolicy):
            raise ValueError(f"exit must be an ExitPolicy such as dyvte.FixedExit(6), not {type(self.exit).__name__}")

    def __call__(self, model: nn.Module) -> AbstractContextManager[PrunedModel]:
        return visual_pruning(model, self)

    def count(self, visual: int) -> int:
        """How many of a sample's visual tokens are kept: the share, rounded half up; at least one unless it is 0."""
        return max(math.floor(self.keep * visual + 0.5), 1) if self.keep > 0 and visual > 0 else 0

    def scores(self, visual: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
        """The tokens with the highest scores are kept; the earlier one of two that are equal.

        Args:
            visual: bool [n, sequence], the visual tokens of each sample.
            attention: float32 [n, sequence] from the last prompt token in layer K, mean over heads; None unless
                ``reads_attention``.

        Returns:
            float [n, sequence], read at visual tokens only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define scores()")

    @property
    def reads_attention(self) -> bool:
        """Whether :meth:`scores` needs the attention of layer K."""
        return False

    def visual_places(self, visual: int, exit_layer: int) -> int:
        """Visual tokens that the layers work on, summed over layers.

        Args:
            visual: visual tokens of the prompt.
            exit_layer: how many layers see any of them, 1 ... L.
        """
        whole = min(self.layer, exit_layer)
        return whole * visual + (exit_layer - whole) * self.count(visual)

    def prefill_flops(self, config: PreTrainedConfig, text: int, visual: int, exit_layer: int) -> int:
        """Like ``costs.prefill_flops``, with pruning: all tokens, then the kept ones, then text alone.

        What it takes to read a row of attention (the keys of one layer a second time, one query) is counted as well.

        Args:
            config: of the decoder.
            text: text tokens of the prompt.
            visual: its visual tokens.
            exit_layer: how many layers see any visual tokens, 1 ... L.

        Raises:
            ValueError: an exit layer, or the layer of the rule, outside 1 ... L.
        """
        layers = config.num_hidden_layers
        if not 1 <= self.layer <= layers:
            raise ValueError(f"layer {self.layer} is outside 1 ... {layers}")
        whole = min(self.layer, exit_layer)
        flops = prefill_flops(config, text, visual, exit_layer)
        flops -= (exit_layer - whole) * layer_flops(config, text + visual)
        flops += (exit_layer - whole) * layer_flops(config, text + self.count(visual))
        if self.reads_attention and visual > 0 and exit_layer >= self.layer:
            size, heads, tokens = config.hidden_size, config.num_attention_heads, text + visual
            head_dim = getattr(config, "head_dim", None) or size // heads
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            flops += 2 * head_dim * (tokens * size * kv_heads + heads * (size + tokens))
        return flops


@dataclass
class FastV(Pruning):
    """Keeps the visual tokens that the last prompt token attends to most in layer K, averaged over heads.

    Layer K is the last one with all visual tokens: with K = 2, the paper's, the scores are those of the second layer,
    and the third is the first to do without the others. The paper's R is what is dropped, 1 - ``keep``.
    """

    layer: int = 2
    keep: float = 0.5

    @property
    def reads_attention(self) -> bool:
        return True

    def scores(self, visual: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
        return attention


@dataclass
class RandomPruning(Pruning):
    """Keeps any visual tokens, as many as FastV would.

    Every prompt draws anew from a generator of its own, sample after sample, so a seed gives the same tokens whatever
    the batch size and whatever else is drawn. Without a cache (``use_cache=False``) every step is a prompt of its own.
    """

    layer: int = 2
    keep: float = 0.5
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, not {self.seed!r}")
        self.generator = torch.Generator().manual_seed(self.seed)

    def scores(self, visual: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
        scores = torch.zeros(visual.shape)
        for row, own in zip(scores, visual.cpu()):
            row[own] = torch.rand(int(own.sum()), generator=self.generator)
        return scores.to(visual.device)


@contextmanager
def visual_pruning(
    model: nn.Module,
    rule: Pruning,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Iterator[PrunedModel]:
    """Runs ``model`` with visual tokens pruned, and withdrawn if the rule has an exit, within the ``with`` block.

    What is dropped is gone from hidden states, attention and cache of the layers after; positions stay. Batches,
    padding, beams, caches and refusals are as in :func:`dyvte.visual_exit`.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``. Its attention
            implementation stays as it is.
        rule: :class:`FastV`, :class:`RandomPruning` or your own.
        visual_mask: as in :func:`dyvte.visual_exit`.
        decoder: as in :func:`dyvte.visual_exit`.

    Yields:
        A handle; ``handle.layers`` holds each sample's exit layer and ``handle.kept`` its visual tokens kept.

    Raises:
        ValueError: model, rule or a later call do not fit; the message says what to do.
    """
    handle = PrunedModel(model, rule, visual_mask, decoder)
    try:
        yield handle
    finally:
        handle.detach()


class PrunedModel(VisualExit):
    """A pruning rule at work on a model. Made by :func:`visual_pruning`.

    Attributes:
        layers: long [batch], the exit layer of each sample in the latest prompt, that is after how many layers its
            last visual tokens were gone; L if some stayed to the end.
        kept: long [batch], how many visual tokens it had left after layer K; all of them, where it could not be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Pruning,
        visual_mask: VisualMask | None = None,
        decoder: str | nn.Module | None = None,
    ):
        if not isinstance(rule, Pruning):
            raise ValueError(f"rule must be a Pruning such as FastV(layer=2, keep=0.5), not {type(rule).__name__}")
        found = find_decoder(underlying_model(model), decoder)
        first, last = smallest_exit(underlying_model(model), found), len(found.layers)
        if not first <= rule.layer <= last:
            raise ValueError(
                f"layer {rule.layer} is outside {first} ... {last}: choose after how many of the {last} decoder layers "
                "visual tokens are dropped"
            )
        attention = find_attention(found.layers[rule.layer - 1]) if rule.reads_attention else None
        self.rule = rule
        self.kept: torch.Tensor | None = None
        self._keep: torch.Tensor | None = None
        self._pruned: Columns | None = None
        self._attention: torch.Tensor | None = None
        self._read: AttentionRows | None = None
        self._asked = 0
        super().__init__(model, rule.exit or NeverExit(), visual_mask, decoder)
        if attention is not None:
            self._hooks.append(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))
            self._hooks.append(attention.register_forward_hook(self._after_attention, with_kwargs=True))

    @property
    def _last_tokens(self) -> Columns:
        """Where the last prompt token of each sample is that the model still runs in full."""
        tail = self._pass.prompt.tail
        tail = tail.rows(self._pass.main.rows.to(tail.index.device))
        return Columns(tail.index[:, -1:], tail.valid[:, -1:], tail.ragged)

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        run = self._pass
        if run is None or self._inside or run.main.columns is not None:
            return
        self._read = AttentionRows(module, call_arguments(module, args, kwargs), self._last_tokens)
        weights = [group.sum(1) for group in self._read]
        mean = sum(weights[1:], weights[0])[:, 0, -run.length :] / self._read.query.shape[1]
        self._attention = mean.new_zeros(run.batch, run.length)
        self._attention[run.main.rows.to(mean.device)] = mean

    def _after_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        read, self._read = self._read, None
        if read is not None and not self._inside and not read.checked:
            read.check(output, self._last_tokens)

    def _start(self, hidden: torch.Tensor, mask: Any, cache: Cache | None) -> Any:
        self._keep, self._pruned, self._attention, self._read, self._asked = None, None, None, None, 0
        run = super()._start(hidden, mask, cache)
        if run is not None:
            self.kept = run.prompt.visual.sum(1).cpu()
        return run

    def _part(self, index: int, hidden: torch.Tensor, run: Any) -> torch.Tensor:
        if index <= self._asked:  # once a layer, also where pruning turned out to drop nothing
            return hidden
        self._asked = index
        return super()._part(index, hidden, run)

    def _over_prompt(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """Prunes the samples that have not left when ``rule.layer`` layers are done, and lets them leave later."""
        run = self._pass
        if index == self.rule.layer and run.main.columns is None:
            hidden = self._prune(self._part(index, hidden, run))
        elif self._keep is not None and run.main.columns is self._pruned:
            hidden = self._part_pruned(index, hidden)
        return super()._over_prompt(index, layer, hidden, kwargs)

    def _prune(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drops visual tokens from the rows the model goes on with; they have all their columns."""
        run = self._pass
        if run.main.columns is not None:  # everybody has just left
            return hidden
        prompt, rows = run.prompt, run.main.rows
        device = prompt.visual.device
        visual = prompt.visual[rows.to(device)] & prompt.can_leave[rows].to(device)[:, None]
        scores = self._scores(visual, rows)
        order = scores.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=device).expand_as(order))
        count = torch.tensor([self.rule.count(n) for n in visual.sum(1).tolist()], device=device)
        kept = visual & (rank < count[:, None])
        if bool((kept == visual).all()):
            return hidden
        self._keep = prompt.text | prompt.visual
        self._keep[rows.to(device)] &= ~visual | kept
        self.kept = (self._keep & prompt.visual).sum(1).cpu()
        return self._compact(hidden)

    def _scores(self, visual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rule's scores; rows of one sample (beams) stand together and get the same ones."""
        given = self._prompt_tokens(self._generate_call)
        times = max(self._pass.batch // len(given), 1) if given is not None else 1
        sample = (rows // times).to(visual.device)
        first = torch.ones_like(sample, dtype=torch.bool)
        first[1:] = sample[1:] != sample[:-1]
        attention = self._attention
        if attention is not None:
            attention = attention[rows.to(attention.device)].to(visual.device)[first]
        scores = self.rule.scores(visual[first], attention)
        if not isinstance(scores, torch.Tensor) or scores.shape != visual[first].shape:
            raise ValueError(f"{type(self.rule).__name__}.scores() must return scores {list(visual[first].shape)}")
        return scores.float().to(visual.device)[first.cumsum(0) - 1]

    def _compact(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows the model goes on with, in full length, without what was pruned."""
        run = self._pass
        rows = run.main.rows.to(self._keep.device)
        run.main.columns = self._pruned = Columns.of(self._keep[rows])
        run.made = {}
        return run.main.columns.take(hidden)

    def _part_pruned(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Lets pruned samples leave: the exit reads and keeps text only, so the rows are put back in place for it."""
        run = self._pass
        earliest = self.min_layer - self.policy.lookahead
        if index < earliest or (run.planned is not None and bool((run.planned[run.main.rows] > index).all())):
            return hidden
        group, columns = run.main, run.main.columns
        full = hidden.new_zeros(len(hidden), run.length, hidden.shape[-1])
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        full[row, columns.index.to(hidden.device)] = hidden * columns.valid.to(hidden)[..., None]
        group.columns = None
        full = self._part(index, full, run)
        if run.main is group:  # nobody left
            group.columns = columns
            return hidden
        return full if run.main.columns is not None else self._compact(full)

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run = None if self._inside else self._pass
        result = super()._after_layer(index, layer, args, kwargs, output)
        if run is not None and self._pass is None:
            gone = run.prompt.can_leave & (self.kept == 0)  # nothing was kept, so the pruning was the exit
            self.layers = self.layers.where(~gone, self.layers.clamp(max=self.rule.layer))
        return result
