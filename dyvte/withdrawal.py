"""Withdrawing the visual tokens of a running model, per sample, from the layer on that a policy names.

Forward hooks on the decoder layers do all of it. During the prompt's pass, samples that leave are compacted to their
text rows; while some have left and others have not, each layer runs once for the short rows and once for the full
ones, so a batch costs what its samples cost. After the last layer the rows are put back where they were, with zeros
at the visual tokens. While decoding, layers whose cache was compacted get a mask of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dyvte.layout import WithdrawnLayer, compact_arguments, compact_mask, select_rows, sliding_window
from dyvte.policies import ExitPolicy
from dyvte.tokens import Columns, Prompt, find_decoder, underlying_model, visual_token_ids

VisualMask = torch.Tensor | Callable[[dict[str, Any]], torch.Tensor]


@contextmanager
def visual_exit(model: nn.Module, policy: ExitPolicy, visual_mask: VisualMask | None = None) -> Iterator[VisualExit]:
    """Runs ``model`` with visual tokens withdrawn as ``policy`` decides, within the ``with`` block.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        policy: see :mod:`dyvte.policies`.
        visual_mask: bool [batch, sequence], True at visual tokens, where ``input_ids`` cannot show them; or a callable
            that gets the keyword arguments of the model's call and returns it.

    Yields:
        A handle; ``handle.layers`` holds the exit layer of each sample after a call (long [batch]).

    Raises:
        ValueError: model, policy or a later call do not fit; the message says what to do.
    """
    handle = attach(model, policy, visual_mask)
    try:
        yield handle
    finally:
        handle.detach()


def attach(model: nn.Module, policy: ExitPolicy, visual_mask: VisualMask | None = None) -> VisualExit:
    """Like :func:`visual_exit`, but until ``handle.detach()`` is called."""
    return VisualExit(model, policy, visual_mask)


class _Group:
    """Samples of a batch that have the same columns left: all (``columns`` None) or the text only."""

    def __init__(self, rows: torch.Tensor, columns: Columns | None, hidden: torch.Tensor | None = None):
        self.rows, self.columns, self.hidden = rows, columns, hidden
        self.cache = DynamicCache()


class _PromptPass:
    """One forward pass over a prompt: who has left, and the side group that runs beside the model's own rows."""

    def __init__(self, prompt: Prompt, cache: Cache | None, length: int, num_layers: int):
        self.prompt, self.cache, self.length = prompt, cache, length
        self.batch = len(prompt.can_leave)
        self.exits = torch.full((self.batch,), num_layers)
        self.planned: torch.Tensor | None = None
        self.main = _Group(torch.arange(self.batch), None)
        self.side: _Group | None = None
        self.masks: dict[tuple[int, int], Any] = {}
        self.columns: Columns | None = None


class VisualExit:
    """A policy at work on a model. Made by :func:`visual_exit` and :func:`attach`.

    Attributes:
        layers: long [batch], the exit layer of each sample in the latest prompt; None before the first. A sample with
            no visual tokens, or whose prompt ends in one, counts as never leaving (``L``).
    """

    def __init__(self, model: nn.Module, policy: ExitPolicy, visual_mask: VisualMask | None = None):
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy must be an ExitPolicy such as dyvte.FixedExit(4), not {type(policy).__name__}")
        self.model, self.policy, self.visual_mask = underlying_model(model), policy, visual_mask
        self.decoder = find_decoder(self.model)
        self.config = getattr(self.decoder, "config", self.model.config)
        self.num_layers = len(self.decoder.layers)
        self.visual_ids = None if visual_mask is not None else visual_token_ids(self.model)
        self.windows = [sliding_window(layer, self.config, i) for i, layer in enumerate(self.decoder.layers)]
        policy.check(self.num_layers, self.config.hidden_size, getattr(self.model.config, "_name_or_path", None))
        if any(self.windows) and "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "flash attention counts the window of sliding layers in cached places, which shift once visual tokens "
                "are gone: load the model with attn_implementation='sdpa' or 'eager'"
            )
        self.layers: torch.Tensor | None = None
        self._seen: dict[str, Any] = {}
        self._pass: _PromptPass | None = None
        self._masks: dict[tuple[int, int | None], Any] = {}
        self._inside = False
        self._consumed = True
        self._hooks = []
        for module in dict.fromkeys([self.model, self.decoder]):
            names = list(inspect.signature(module.forward).parameters)
            before = functools.partial(self._before_model, names)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for index, layer in enumerate(self.decoder.layers):
            before, after = functools.partial(self._before_layer, index), functools.partial(self._after_layer, index)
            self._hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(after, with_kwargs=True))
        self._guard_generate()

    def detach(self) -> None:
        """Removes every hook; the model is as it was. Caches filled meanwhile are not usable without the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop("generate", None)
        self._pass = None

    # Before any work: what cannot be right is refused.

    def _guard_generate(self) -> None:
        """Chunks of a prompt look like later turns to a forward hook, so ``generate`` is asked before it starts."""
        generate = getattr(self.model, "generate", None)
        if generate is None:
            return

        @functools.wraps(generate)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
            for name, remedy in (
                ("prefill_chunk_size", "the exit is decided on the whole prompt: leave prefill_chunk_size unset"),
                ("cache_implementation", "only dynamic caches can hold fewer tokens: leave cache_implementation unset"),
            ):
                value = kwargs.get(name, getattr(given, name, None))
                if value is not None and value != "dynamic":
                    raise ValueError(f"{name}={value!r} does not work with visual exit: {remedy}")
            return generate(*args, **kwargs)

        self.model.generate = guarded

    def _before_model(self, names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._consumed or module is self.model:  # some models call their inner one directly
            self._seen, self._pass, self._consumed = {}, None, False
        given = dict(zip(names, args)) | kwargs
        for name in ("input_ids", "attention_mask", "inputs_embeds"):
            if self._seen.get(name) is None:
                self._seen[name] = given.get(name)
        self._seen.setdefault("call", given)
        if given.get("labels") is not None:
            raise ValueError(
                "labels do not work with visual exit: the prediction of the first text token comes from a visual token "
                "that is gone. Compute the loss from the logits of the text tokens, or detach the exit for training"
            )
        cache = given.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise ValueError(
                f"{type(cache).__name__} has a fixed size and cannot hold fewer tokens in later layers: "
                "use a DynamicCache (the default of generate)"
            )

    # Hooks on the decoder layers.

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return None
        positional = len(args) > 0
        hidden = args[0] if positional else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if index == 0:
            self._masks, self._consumed = {}, True
            self._pass = self._start(hidden, kwargs.get("attention_mask"), cache)
            return None
        if self._pass is None:
            changed = self._while_decoding(index, hidden, kwargs)
        else:
            changed = self._over_prompt(index, layer, hidden, kwargs)
        if changed is None:
            return None
        hidden, kwargs = changed
        if positional:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run = self._pass
        if self._inside or run is None:
            return None
        if run.side is not None and run.cache is not None:
            self._merge_caches(index, run)
        if index < self.num_layers - 1:
            return None
        self._pass, self.layers = None, run.exits
        if run.main.columns is None and run.side is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        full = hidden.new_zeros(run.batch, run.length, hidden.shape[-1])
        run.main.hidden = hidden
        for group in (run.main, run.side):
            if group is None:
                continue
            rows = group.rows.to(full.device)
            if group.columns is None:
                full[rows] = group.hidden
            else:
                # Places that hold nothing write their zeros to columns that are gone anyway.
                text = group.hidden * group.columns.valid.to(hidden)[..., None]
                full[rows[:, None], group.columns.index.to(full.device)] = text.to(full.device)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _start(self, hidden: torch.Tensor, mask: Any, cache: Cache | None) -> _PromptPass | None:
        """A prompt pass, or None where the cache already holds one."""
        batch, length = hidden.shape[:2]
        visual = self._visual(batch, length, hidden.device, self._prompt_has_passed(cache))
        if self._prompt_has_passed(cache):
            if visual is not None and bool(visual.any()):
                raise ValueError(
                    "new visual tokens after a prompt that is already in the cache are not supported: "
                    "start a new cache with the whole conversation"
                )
            return None
        self._check_cache(cache)
        run = _PromptPass(Prompt.of(visual, self._valid(visual, mask)), cache, length, self.num_layers)
        run.planned = self.policy.plan(batch, self.num_layers)
        if run.planned is not None:
            run.planned = torch.where(run.prompt.can_leave, run.planned, self.num_layers)
        return run

    @staticmethod
    def _prompt_has_passed(cache: Cache | None) -> bool:
        return cache is not None and cache.get_seq_length() > 0

    def _check_cache(self, cache: Cache | None) -> None:
        if cache is None:
            return
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        if not isinstance(cache, Cache) or not plain or getattr(cache, "offloading", False):
            raise ValueError(
                f"the cache {cache!r} has layers that cannot hold fewer tokens than the prompt: "
                "use a DynamicCache (the default of generate), without offloading"
            )

    def _visual(self, batch: int, length: int, device: torch.device, passed: bool) -> torch.Tensor | None:
        """bool [batch, length], or None if a later call cannot show them."""
        if self.visual_mask is not None:
            if passed:
                return None
            mask = self.visual_mask(self._seen.get("call", {})) if callable(self.visual_mask) else self.visual_mask
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape[-1] != length:
                shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"visual_mask must be bool [{batch}, {length}] like the prompt, not {shape}")
            if len(mask) != batch:
                if len(mask) == 0 or batch % len(mask):
                    raise ValueError(f"visual_mask has {len(mask)} rows but the batch has {batch}: give one per sample")
                mask = mask.repeat_interleave(batch // len(mask), 0)  # beams and num_return_sequences
            return mask.to(device)
        ids = self._seen.get("input_ids")
        if ids is None or ids.shape[1] != length:
            if passed:
                return None
            raise ValueError(
                "the prompt came as inputs_embeds, which do not show where the visual tokens are: pass visual_mask "
                "(bool [batch, sequence], True at visual tokens) to visual_exit"
            )
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device)).to(device)

    def _valid(self, visual: torch.Tensor, mask: Any) -> torch.Tensor:
        """bool [batch, length]: what is not padding."""
        given = self._seen.get("attention_mask")
        if isinstance(given, torch.Tensor) and given.ndim == 2:
            return given[:, -visual.shape[1] :].bool().to(visual.device)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask.bool()
        if isinstance(given, torch.Tensor) and given.ndim == 4:
            raise ValueError("a 4-D attention_mask does not say which tokens are padding: pass one [batch, sequence]")
        return torch.ones_like(visual)

    def _over_prompt(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """Lets samples leave before layer ``index``, and runs the layer for those that left while others stay."""
        run = self._pass
        if run.main.columns is None:
            hidden = self._part(index, hidden, run)
        if run.main.columns is None and run.side is None:
            return None
        if run.side is not None:
            arguments = self._arguments(run.side, hidden, kwargs, run)
            self._inside = True
            try:
                output = layer(run.side.hidden, **arguments)
            finally:
                self._inside = False
            run.side.hidden = output[0] if isinstance(output, tuple) else output
            return hidden, self._arguments(run.main, hidden, kwargs, run)
        arguments = self._arguments(run.main, hidden, kwargs, run)
        if run.cache is not None:
            self._put_layer(run.cache, index, WithdrawnLayer(run.main.columns, run.length))
            arguments["past_key_values"] = run.cache
        return hidden, arguments

    def _part(self, index: int, hidden: torch.Tensor, run: _PromptPass) -> torch.Tensor:
        """Moves the samples that leave at exit layer ``index`` to the side; returns the rows the model goes on with."""
        rows = run.main.rows
        if run.planned is not None:
            leaving = run.planned[rows] <= index
        else:
            asked = run.prompt.can_leave[rows]
            leaving = torch.zeros(len(rows), dtype=torch.bool)
            if asked.any():
                which = rows if asked.all() else rows[asked]
                state = hidden if asked.all() else hidden[asked.to(hidden.device)]
                leaving[asked] = self.policy.leaves(index, run.prompt.text_state(state, which.to(hidden.device))).cpu()
        if not leaving.any():
            return hidden
        run.exits[rows[leaving]] = index
        if run.columns is None:
            run.columns = Columns.of(run.prompt.text)
        gone, stay = rows[leaving], rows[~leaving]
        compact = run.columns.rows(gone.to(run.columns.index.device)).take(hidden[leaving.to(hidden.device)])
        if run.side is not None:
            gone, compact = torch.cat([run.side.rows, gone]), torch.cat([run.side.hidden.to(compact.device), compact])
        if len(stay) > 0:
            run.side = _Group(gone, run.columns.rows(gone.to(run.columns.index.device)), compact)
            run.main = _Group(stay, None)
            run.masks = {}
            return hidden[(~leaving).to(hidden.device)]
        # Everybody has left: the short rows are all there is, in the order of the batch.
        order = gone.argsort()
        run.main, run.side = _Group(gone[order], run.columns), None
        run.masks = {}
        return compact[order.to(compact.device)]

    def _arguments(self, group: _Group, hidden: torch.Tensor, kwargs: dict[str, Any], run: _PromptPass) -> dict:
        arguments = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "past_key_values")}
        mask = kwargs.get("attention_mask")
        if len(group.rows) < run.batch:
            arguments = select_rows(arguments, group.rows, run.batch)
        key = (id(mask), id(group))
        if key not in run.masks:
            selected = select_rows(mask, group.rows, run.batch) if len(group.rows) < run.batch else mask
            if group.columns is not None:
                like = hidden if group.hidden is None else group.hidden
                selected = compact_mask(selected, group.columns, self.config, like)
            run.masks[key] = selected
        if group.columns is not None:
            arguments = compact_arguments(arguments, group.columns, run.length)
        if "past_key_values" in kwargs:
            arguments["past_key_values"] = None if run.cache is None else group.cache
        return arguments | {"attention_mask": run.masks[key]}

    @staticmethod
    def _put_layer(cache: Cache, index: int, layer: DynamicLayer) -> None:
        if index < len(cache.layers):
            cache.layers[index] = layer
        else:
            cache.layers.append(layer)

    def _merge_caches(self, index: int, run: _PromptPass) -> None:
        """Writes the keys and values of both groups into the model's cache: full rows as they are, short ones right."""
        like = run.main.cache.layers[index]
        device = run.columns.index.device
        merged = WithdrawnLayer(self._merged_columns(run, device), run.length)
        merged.lazy_initialization(like.keys, like.values)
        for name in ("keys", "values"):
            full = getattr(like, name)
            together = full.new_zeros(run.batch, full.shape[1], run.length, full.shape[3])
            together[run.main.rows.to(full.device)] = full
            short = getattr(run.side.cache.layers[index], name)
            together[run.side.rows.to(full.device), :, run.length - short.shape[2] :] = short.to(full.device)
            setattr(merged, name, together)
        self._put_layer(run.cache, index, merged)
        for group in (run.main, run.side):
            group.cache.layers[index].reset()

    @staticmethod
    def _merged_columns(run: _PromptPass, device: torch.device) -> Columns:
        key = (0, id(run.side))
        if key not in run.masks:
            index = torch.arange(run.length, device=device).repeat(run.batch, 1)
            valid = (run.prompt.text | run.prompt.visual).clone()
            side, short = run.side.rows.to(device), run.side.columns
            valid[side] = False
            index[side, run.length - short.index.shape[1] :] = short.index
            valid[side, run.length - short.index.shape[1] :] = short.valid
            run.masks[key] = Columns(index, valid, ragged=True)
        return run.masks[key]

    def _while_decoding(
        self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """A mask of its own for a layer whose cache was compacted: the model made one for layer 0."""
        cache = kwargs.get("past_key_values")
        if cache is None or index >= len(cache.layers) or not isinstance(cache.layers[index], WithdrawnLayer):
            return None
        layer = cache.layers[index]
        key = (id(layer.columns), self.windows[index])
        if key not in self._masks:
            attention_mask = self._seen.get("attention_mask")
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
                attention_mask = None
            self._masks[key] = layer.mask(self.config, hidden, attention_mask, self.windows[index])
        return hidden, kwargs | {"attention_mask": self._masks[key], "position_ids": None}
