"""Withdrawing the visual tokens of a running model, per sample, from the layer on that a policy names.

Forward hooks on the decoder layers do all of it. During the prompt's pass, samples that leave are compacted to their
text rows; while some have left and others have not, each layer runs once for the short rows and once for the full
ones, so a batch costs what its samples cost. After the last layer the rows are put back where they were, with zeros
at the visual tokens. While decoding, layers whose cache was compacted get a mask of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dyvte.methods.exits import ExitPolicy
from dyvte.runtime.layout import (
    WithdrawnLayer,
    compact_arguments,
    compact_mask,
    continued_mask,
    held_columns,
    layer_call,
    select_rows,
    sliding_windows,
)
from dyvte.runtime.tokens import (
    Columns,
    Prompt,
    SplicedVisualMask,
    TextReader,
    find_decoder,
    override,
    smallest_exit,
    underlying_model,
    visual_token_ids,
)

VisualMask = torch.Tensor | Callable[[dict[str, Any]], torch.Tensor]


@contextmanager
def visual_exit(
    model: nn.Module,
    policy: ExitPolicy,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Iterator[VisualExit]:
    """Runs ``model`` with visual tokens withdrawn as ``policy`` decides, within the ``with`` block.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``; the one whose ``generate``
            or ``forward`` is called, not a part of it, whose caller could not be checked.
        policy: see :mod:`dyvte.methods.exits`.
        visual_mask: bool [batch, sequence], True at visual tokens, where ``input_ids`` cannot show them; or a callable
            that gets the keyword arguments of the model's call (those of ``generate`` included) and returns it, such
            as :class:`~dyvte.runtime.tokens.SplicedVisualMask`. A tensor describes the first prompt of a conversation.
        decoder: the module that owns the decoder layers as ``.layers``, or the dotted path to it from ``model``; found
            by itself in models of transformers.

    Yields:
        A handle; ``handle.layers`` holds the exit layer of each sample after a call (long [batch]).

    Raises:
        ValueError: model, policy or a later call do not fit; the message says what to do.
    """
    handle = attach(model, policy, visual_mask, decoder)
    try:
        yield handle
    finally:
        handle.detach()


def attach(
    model: nn.Module,
    policy: ExitPolicy,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> VisualExit:
    """Like :func:`visual_exit`, but until ``handle.detach()`` is called."""
    return VisualExit(model, policy, visual_mask, decoder)


class _Group:
    """Samples of a batch that have the same columns left: all (``columns`` None) or the text only."""

    def __init__(self, rows: torch.Tensor, columns: Columns | None, hidden: torch.Tensor | None = None):
        self.rows, self.columns, self.hidden = rows, columns, hidden
        self.cache = DynamicCache()
        self._on: dict[torch.device, torch.Tensor] = {}
        self._reader: tuple[torch.Tensor, TextReader] | None = None

    def on(self, device: torch.device) -> torch.Tensor:
        """The rows, there; brought once, since every copy from the host makes a GPU's queue run dry."""
        if device not in self._on:
            self._on[device] = self.rows.to(device)
        return self._on[device]

    def reader(self, prompt: Prompt) -> tuple[torch.Tensor, TextReader]:
        """Those of the rows that can leave, and what reads their text states."""
        if self._reader is None:
            places = prompt.can_leave[self.rows].nonzero().flatten()
            rows, tail = self.rows[places], prompt.tail
            device = tail.index.device
            whole, length = len(places) == len(self.rows), prompt.visual.shape[1]
            self._reader = rows, TextReader(tail.rows(rows.to(device)), places.to(device), length, whole)
        return self._reader


class _Verdict:
    """What a policy said about some rows, on its way to the host while the device goes on working."""

    def __init__(self, rows: torch.Tensor, leaves: torch.Tensor):
        self.rows, self.leaves = rows, leaves.to("cpu", non_blocking=True, copy=True)
        self.arrived: torch.Event | None = None
        if leaves.device.type != "cpu":
            self.arrived = torch.Event(leaves.device)
            self.arrived.record(torch.accelerator.current_stream(leaves.device))

    def leaving(self) -> torch.Tensor:
        """The rows that leave; waits for what was queued up to the question, and for nothing after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.rows[self.leaves] if True in self.leaves.tolist() else self.rows[:0]


class _PromptPass:
    """One forward pass over the prompt of a turn: who has left, and the side group beside the model's own rows.

    Attributes:
        valid: bool [batch, columns of the turns before], what is not padding there.
    """

    def __init__(self, prompt: Prompt, cache: Cache | None, valid: torch.Tensor, num_layers: int):
        self.prompt, self.cache, self.valid = prompt, cache, valid
        self.batch, self.length = prompt.visual.shape
        self.past = valid.shape[1]
        self.exits = torch.full((self.batch,), num_layers)
        self.planned: torch.Tensor | None = None
        self.main = _Group(torch.arange(self.batch), None)
        self.side: _Group | None = None
        self.verdicts: dict[int, _Verdict] = {}
        self.made: dict[tuple, Any] = {}
        self.columns: Columns | None = None
        self._held: dict[tuple, Columns] = {}

    def once(self, make: Callable[[], Any], what: Any, *of: Any) -> Any:
        """``make()``, or what it gave before for the same objects; both are kept until groups change."""
        key = (what, *map(id, of))
        if key not in self.made:
            self.made[key] = make(), of
        return self.made[key][0]

    def held(self, index: int) -> Columns | None:
        """What the model's cache holds of the turns before at layer ``index``; None at a first turn."""
        if self.past == 0:
            return None
        layer = self.cache.layers[index]
        key = (id(layer.columns),) if isinstance(layer, WithdrawnLayer) else (layer.keys.shape[2], "full")
        if key not in self._held:
            self._held[key] = held_columns(layer, self.valid)
        return self._held[key]

    def new(self, group: _Group) -> Columns:
        """The columns of this turn that a group goes on with."""
        if group.columns is not None:
            return group.columns
        rows = group.on(self.valid.device)
        valid = (self.prompt.text | self.prompt.visual)[rows]
        return Columns(torch.arange(self.length, device=valid.device).expand_as(valid), valid, ragged=True)

    def kept(self, group: _Group, held: Columns | None) -> Columns:
        """All columns that a group's cache holds after a layer, counted from the beginning of the conversation."""
        new = self.new(group)
        if held is None:
            return new
        rows = group.on(held.index.device)
        index = torch.cat([held.index[rows], self.past + new.index], 1)
        return Columns(index, torch.cat([held.valid[rows], new.valid], 1), held.ragged or new.ragged)


class VisualExit:
    """A policy at work on a model. Made by :func:`visual_exit` and :func:`attach`.

    Attributes:
        layers: long [batch], the exit layer of each sample in the latest prompt; None before the first. A sample with
            no visual tokens, or whose prompt ends in one, counts as never leaving (``L``).
        min_layer: the smallest exit layer this model allows.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ExitPolicy,
        visual_mask: VisualMask | None = None,
        decoder: str | nn.Module | None = None,
    ):
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy must be an ExitPolicy such as dyvte.FixedExit(4), not {type(policy).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, not {type(model).__name__}: pass the loaded model itself")
        if visual_mask is not None and not isinstance(visual_mask, torch.Tensor) and not callable(visual_mask):
            raise TypeError(
                "visual_mask must be a bool tensor [batch, sequence] or a callable that returns one, not "
                f"{type(visual_mask).__name__}"
            )
        if isinstance(visual_mask, torch.Tensor) and (visual_mask.dtype != torch.bool or visual_mask.ndim != 2):
            raise ValueError(
                "visual_mask must be bool [batch, sequence], True at visual tokens, not "
                f"{visual_mask.dtype} {list(visual_mask.shape)}"
            )
        self.model, self.policy, self.visual_mask = underlying_model(model), policy, visual_mask
        self.decoder = find_decoder(self.model, decoder)
        config = getattr(self.model, "config", None)
        self.config = getattr(self.decoder, "config", None) or config
        if self.config is None:
            raise ValueError(
                f"neither {type(self.model).__name__} nor its decoder has a config, which says how layers attend: "
                "pass the model itself, not a wrapper, or set .config on it"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self.model).__name__} is an encoder-decoder: its decoder holds no visual tokens, but sees the "
                "encoder's through cross attention. Use it without the exit"
            )
        self.num_layers = len(self.decoder.layers)
        self._refuse_compiled(model)
        if getattr(self.decoder, "_dyvte_attached", False):
            raise ValueError(
                "a visual exit is attached to this model already: detach() it, or leave its with block, first"
            )
        self.visual_ids = None if visual_mask is not None else visual_token_ids(self.model)
        self.windows = sliding_windows(self.config, self.num_layers)
        self.min_layer = smallest_exit(self.model, self.decoder)
        policy.check(self.num_layers, self.config.hidden_size, getattr(config, "_name_or_path", None))
        if not isinstance(policy.lookahead, int) or policy.lookahead < 0:
            raise ValueError(
                f"{type(policy).__name__}.lookahead must be 0 or more layers, not {policy.lookahead!r}: it counts the "
                "layers between a decision and its exit"
            )
        if policy.earliest is not None and policy.earliest < self.min_layer:
            raise ValueError(
                f"exit layer {policy.earliest} is too early for {type(self.model).__name__}: it adds visual features "
                f"to the visual tokens after its first layers. Choose {self.min_layer} ... {self.num_layers}"
            )
        if any(self.windows) and "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "flash attention counts the window of sliding layers in cached places, which shift once visual tokens "
                "are gone: load the model with attn_implementation='sdpa' or 'eager'"
            )
        self.layers: torch.Tensor | None = None
        self._calls: list[dict[str, Any]] = []
        self._generate_call: dict[str, Any] = {}
        self._pass: _PromptPass | None = None
        self._masks: dict[tuple[int, int | None], Any] = {}
        self._inside = False
        self._consumed = True
        self._turn = threading.RLock()  # what a call is doing is kept here, so threads take turns
        self._hooks = []
        for module in dict.fromkeys([self.model, self.decoder]):
            names = list(inspect.signature(module.forward).parameters)
            before = functools.partial(self._before_model, names)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(self.model.register_forward_pre_hook(self._take_turn, prepend=True))
        self._hooks.append(self.model.register_forward_hook(self._after_model, always_call=True))
        for index, layer in enumerate(self.decoder.layers):
            before, after = functools.partial(self._before_layer, index), functools.partial(self._after_layer, index)
            self._hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(after, with_kwargs=True))
        self.decoder._dyvte_attached = True
        self._restore_generate = self._guard_generate()
        if isinstance(visual_mask, SplicedVisualMask):
            visual_mask.attach()

    def detach(self) -> None:
        """Removes every hook; the model is as it was. Caches filled meanwhile are not usable without the hooks."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            del self.decoder._dyvte_attached
            self._restore_generate()
            if isinstance(self.visual_mask, SplicedVisualMask):
                self.visual_mask.detach()
        self._hooks = []
        self._pass, self._calls, self._masks, self._generate_call = None, [], {}, {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model cannot be copied or pickled while a visual exit is attached, since the copy would run the "
            "original's hooks: detach() the exit, or leave its with block, first"
        )

    # Before any work: what cannot be right is refused.

    def _refuse_compiled(self, model: nn.Module) -> None:
        modules = [model, self.model, self.decoder, *self.decoder.layers]
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
            raise ValueError(
                "a compiled model cannot drop tokens between its layers: attach to the model as it was before "
                "torch.compile() (its _orig_mod)"
            )

    def _refuse(self, given: dict[str, Any], config: Any) -> None:
        """What no call may ask for; ``config`` holds the defaults of what is not given."""

        def value(name: str) -> Any:
            return given[name] if given.get(name) is not None else getattr(config, name, None)

        if given.get("labels") is not None:
            raise ValueError(
                "labels do not work with visual exit: the prediction of the first text token comes from a visual token "
                "that is gone. Compute the loss from the logits of the text tokens, or detach the exit for training"
            )
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if value(name):
                raise ValueError(
                    f"{name}=True does not work with visual exit: samples and layers hold different tokens. Leave it "
                    "out, or detach the exit to look into the dense model"
                )
        cache = given.get("past_key_values")
        if cache is not None:
            self._check_cache(cache)
        if self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs layers a second time, when the tokens have gone: call model.eval() or "
                "turn checkpointing off"
            )

    def _refuse_batch(self, given: dict[str, Any], times: int = 1) -> None:
        """What does not fit the batch of a call, each sample of which becomes ``times`` rows."""
        tokens = self._prompt_tokens(given)
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if isinstance(mask, torch.Tensor):
            past = cache.get_seq_length() if cache is not None else 0
            if mask.ndim != 2 or (past == 0 and tokens is not None and mask.shape[1] != tokens.shape[1]):
                raise ValueError(
                    f"an attention_mask {list(mask.shape)} does not say which tokens are padding: pass one "
                    "[batch, sequence]"
                )
        if tokens is not None:
            self.policy.check_rows(len(tokens) * times)

    @staticmethod
    def _prompt_tokens(given: dict[str, Any]) -> torch.Tensor | None:
        """Ids or embeddings of the prompts that a call was given, one row per sample."""
        tokens = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        return next((t for t in tokens if isinstance(t, torch.Tensor)), None)

    def _guard_generate(self) -> Callable[[], None]:
        """Refuses before images are encoded; chunks of a prompt would look like later turns to a forward hook.

        Returns:
            what puts the model's own ``generate`` back.
        """
        generate = getattr(self.model, "generate", None)
        if generate is None:
            return lambda: None
        names = list(inspect.signature(generate).parameters)

        @functools.wraps(generate)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args)) | kwargs
            defaults = given.get("generation_config") or getattr(self.model, "generation_config", None)
            for name, remedy in (
                ("prefill_chunk_size", "the exit is decided on the whole prompt: leave prefill_chunk_size unset"),
                ("cache_implementation", "only dynamic caches can hold fewer tokens: leave cache_implementation unset"),
            ):
                value = given.get(name, getattr(defaults, name, None))
                if value is not None and value != "dynamic":
                    raise ValueError(f"{name}={value!r} does not work with visual exit: {remedy}")
            self._refuse(given, defaults)
            counts = (given.get(name, getattr(defaults, name, None)) for name in ("num_beams", "num_return_sequences"))
            self._refuse_batch(given, max(count or 1 for count in counts))
            with self._turn:  # a logits processor may generate within a generation
                outer, self._generate_call = self._generate_call, given
                try:
                    return generate(*args, **kwargs)
                finally:
                    self._generate_call = outer

        return override(self.model, "generate", guarded)

    def _before_model(self, names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._consumed or module is self.model:  # some models call their inner one directly
            self._calls, self._pass, self._consumed = [], None, False
        given = dict(zip(names, args)) | kwargs
        self._refuse(given, self.config)
        if not self._calls:
            self._refuse_batch(given)
        self._calls.append(given)

    def _take_turn(self, *_: Any) -> None:
        self._turn.acquire()

    def _after_model(self, *_: Any) -> None:
        """Also where a call failed half-way: the next one must not take its arguments for its own."""
        self._calls, self._pass, self._masks, self._consumed = [], None, {}, True
        self._turn.release()

    @property
    def _call(self) -> dict[str, Any]:
        """The keyword arguments of the call, outermost first."""
        call: dict[str, Any] = {}
        for given in (*self._calls, self._generate_call):
            call = given | {name: value for name, value in call.items() if value is not None}
        return call

    # Hooks on the decoder layers.

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return None
        hidden, kwargs = layer_call(layer, args, kwargs)
        cache = kwargs.get("past_key_values")
        if index == 0:
            if self._consumed:  # some models call the decoder's forward directly, past its hooks
                self._calls = []
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
        return (hidden,), kwargs

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run = self._pass
        if self._inside:
            return None
        if index == self.num_layers - 1:
            self._calls, self._masks = [], {}  # caches and pixels must not outlive the call because of us
        if run is None:
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
            rows = group.on(full.device)
            if group.columns is None:
                full[rows] = group.hidden
            else:
                # Places that hold nothing write their zeros to columns that are gone anyway.
                text = group.hidden * group.columns.valid.to(hidden)[..., None]
                full[rows[:, None], group.columns.index.to(full.device)] = text.to(full.device)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _start(self, hidden: torch.Tensor, mask: Any, cache: Cache | None) -> _PromptPass | None:
        """A prompt pass, or None where there is nothing new to decide on: while decoding, in turns of text."""
        if hidden.ndim != 3:
            raise ValueError(
                f"decoder layers of {type(self.model).__name__} work on states {list(hidden.shape)}, not [batch, "
                "sequence, width]: visual tokens cannot be withdrawn from this model, use it without the exit"
            )
        batch, length = hidden.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if past > 0 and not self._brings_images():
            return None
        visual = self._visual(batch, length, hidden.device)
        if past > 0 and not bool(visual.any()):
            return None
        valid = self._valid(batch, past + length, mask, hidden.device)
        answer = self._beyond_prompt(past, length, visual)
        run = _PromptPass(Prompt.of(visual, valid[:, past:], answer), cache, valid[:, :past], self.num_layers)
        run.planned = self.policy.plan(batch, self.num_layers)
        if run.planned is None:
            admitted = self.policy.admits(run.prompt.visual_state(hidden))
            if admitted is not None:
                self._check_verdict("admits", admitted, batch)
                run.prompt = dataclasses.replace(run.prompt, can_leave=run.prompt.can_leave & admitted.cpu())
            # Here the host waits anyway; later a GPU's queue would run dry.
            run.main.reader(run.prompt)
            run.columns = Columns.of(run.prompt.text)
        else:
            planned = run.planned
            whole = isinstance(planned, torch.Tensor) and not planned.is_floating_point() and planned.shape == (batch,)
            if not whole or planned.min() < 1 or planned.max() > self.num_layers:
                raise ValueError(
                    f"{type(self.policy).__name__}.plan() must return None or exit layers 1 ... {self.num_layers}, "
                    f"long [{batch}], not {planned}"
                )
            planned = planned.cpu().clamp(min=self.min_layer)
            run.planned = torch.where(run.prompt.can_leave, planned, self.num_layers)
        return run

    def _beyond_prompt(self, past: int, length: int, visual: torch.Tensor) -> torch.Tensor | None:
        """bool [batch, length], what ``generate`` added to its prompt: guesses of an assistant, answers uncached.

        They go with the text but have no say in the decision, which is that of the prompt alone.
        """
        ids = self._calls[0].get("input_ids") if self._calls else None
        prompt = self._prompt_tokens(self._generate_call)
        if prompt is None or not isinstance(ids, torch.Tensor) or ids.shape[1] != length:
            return None
        if prompt.shape[1] >= past + length:
            return None
        return (torch.arange(length, device=visual.device) >= prompt.shape[1] - past).expand_as(visual)

    def _brings_images(self) -> bool:
        """Whether a later call has new images: placeholder ids alone may be generated, or guessed by a lookup."""
        if self.visual_mask is not None and not callable(self.visual_mask):
            return False
        names = ("pixel_values", "mm_encoder_outputs", "image", "video", "media")
        given = (item for call in self._calls for item in call.items())
        return any(value is not None for name, value in given if name.startswith(names))

    @staticmethod
    def _check_cache(cache: Cache) -> None:
        kinds = (DynamicLayer, DynamicSlidingWindowLayer, WithdrawnLayer)
        layers = getattr(cache, "layers", None)
        plain = isinstance(cache, Cache) and all(type(layer) in kinds for layer in layers)
        if not plain or getattr(cache, "offloading", False) or getattr(cache, "is_compileable", False):
            raise ValueError(
                f"a {type(cache).__name__} cannot hold fewer tokens in some layers than in others: use a DynamicCache "
                "(the default of generate), without offloading"
            )

    def _visual(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """bool [batch, length]"""
        prompts = self._prompt_tokens(self._generate_call)
        if self.visual_mask is not None:
            mask = self.visual_mask(self._call) if callable(self.visual_mask) else self.visual_mask
            if mask is self.visual_mask and prompts is not None and mask.shape[1] == prompts.shape[1] < length:
                mask = nn.functional.pad(mask, (0, length - mask.shape[1]))  # guesses, or answers uncached
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape[-1] != length:
                shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"visual_mask must be bool [{batch}, {length}] like the prompt, not {shape}")
        else:
            ids = (call.get("input_ids") for call in (*self._calls, self._generate_call))
            ids = next((i for i in ids if isinstance(i, torch.Tensor) and i.shape[-1] == length), None)
            if ids is None:
                raise ValueError(
                    "the prompt came as inputs_embeds, which do not show where the visual tokens are: pass visual_mask "
                    "(bool [batch, sequence], True at visual tokens) to visual_exit"
                )
            mask = torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))
        rows = {batch} if prompts is None else {batch, len(prompts)}  # beams and num_return_sequences multiply prompts
        if mask.ndim != 2 or len(mask) not in rows or batch % len(mask):
            raise ValueError(f"visual_mask {list(mask.shape)} does not fit a batch of {batch}: one row per sample")
        return mask.repeat_interleave(batch // len(mask), 0).to(device)

    def _valid(self, batch: int, length: int, mask: Any, device: torch.device) -> torch.Tensor:
        """bool [batch, length], past tokens included: what is not padding."""
        given = [call.get("attention_mask") for call in self._calls]
        for found in (*given, mask):
            if isinstance(found, torch.Tensor) and found.ndim == 2 and found.shape[-1] == length:
                return found.bool().to(device).expand(batch, -1)
        first = given[0] if given else None
        if not given and isinstance(mask, torch.Tensor) and mask.ndim == 4 and self.windows[0] is None:
            last = mask[:, 0, -1]  # the last query sees all that is not padding
            return (last if last.dtype == torch.bool else last == 0).to(device).expand(batch, -1)
        if isinstance(first, torch.Tensor):
            raise ValueError(
                f"an attention_mask {list(first.shape)} does not say which of the {length} tokens are padding: "
                "pass one [batch, sequence]"
            )
        return torch.ones(batch, length, dtype=torch.bool, device=device)

    def _over_prompt(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """Lets samples leave before layer ``index``, and runs the layer for those that left while others stay."""
        run = self._pass
        if run.main.columns is None and index >= self.min_layer - self.policy.lookahead:
            hidden = self._part(index, hidden, run)
        held = run.held(index)
        if run.main.columns is None and run.side is None:
            if held is None or not isinstance(run.cache.layers[index], WithdrawnLayer):
                return None
            # Nobody has left yet, but tokens of an earlier turn are gone here.
            arguments = self._arguments(index, run.main, hidden, kwargs, run)
            self._set_cache(run.cache, index, run, run.main, held)
            return hidden, arguments | {"past_key_values": run.cache}
        if run.side is not None:
            for group in (run.main, run.side):
                self._set_cache(group.cache, index, run, group, held)
            arguments = self._arguments(index, run.side, hidden, kwargs, run)
            self._inside = True
            try:
                output = layer(run.side.hidden, **arguments)
            finally:
                self._inside = False
            run.side.hidden = output[0] if isinstance(output, tuple) else output
            return hidden, self._arguments(index, run.main, hidden, kwargs, run)
        arguments = self._arguments(index, run.main, hidden, kwargs, run)
        if run.cache is not None:
            self._set_cache(run.cache, index, run, run.main, held)
            arguments["past_key_values"] = run.cache
        return hidden, arguments

    def _set_cache(self, cache: Cache, index: int, run: _PromptPass, group: _Group, held: Columns | None) -> None:
        """Puts into ``cache`` a layer for a group, with what the model's cache holds of its rows from earlier turns."""
        if run.cache is None or (held is None and cache is not run.cache):
            return
        columns = run.once(lambda: run.kept(group, held), "kept", group, held)
        layer = WithdrawnLayer(columns, run.past + run.length)
        if held is not None:
            before = run.cache.layers[index]
            layer.lazy_initialization(before.keys, before.values)
            rows = group.on(before.keys.device)
            whole = len(rows) == run.batch
            layer.keys = before.keys if whole else before.keys[rows]
            layer.values = before.values if whole else before.values[rows]
        while len(cache.layers) < index:
            cache.layers.append(DynamicLayer())
        self._put_layer(cache, index, layer)

    def _part(self, index: int, hidden: torch.Tensor, run: _PromptPass) -> torch.Tensor:
        """Moves the samples that leave at exit layer ``index`` to the side; returns the rows the model goes on with."""
        rows = run.main.rows
        if run.planned is not None:
            leaving = run.planned[rows] <= index
        else:
            self._ask(index + self.policy.lookahead, hidden, run)
            gone = run.verdicts.pop(index).leaving() if index in run.verdicts else rows[:0]
            if len(gone) == 0:
                return hidden
            leaving = torch.isin(rows, gone)
        if not leaving.any():
            return hidden
        run.exits[rows[leaving]] = index
        if run.columns is None:
            run.columns = Columns.of(run.prompt.text)
        gone, stay = rows[leaving], rows[~leaving]
        places, others = (part.nonzero().flatten().to(hidden.device) for part in (leaving, ~leaving))
        compact = run.columns.rows(gone.to(run.columns.index.device)).take(hidden[places])
        if run.side is not None:
            gone, compact = torch.cat([run.side.rows, gone]), torch.cat([run.side.hidden.to(compact.device), compact])
        if len(stay) > 0:
            run.side = _Group(gone, run.columns.rows(gone.to(run.columns.index.device)), compact)
            run.main = _Group(stay, None)
            run.made = {}
            return hidden[others]
        # Everybody has left: the short rows are all there is, in the order of the batch.
        order = gone.argsort()
        run.main, run.side = _Group(gone[order], run.columns), None
        run.made = {}
        return compact[order.to(compact.device)]

    def _ask(self, layer: int, hidden: torch.Tensor, run: _PromptPass) -> None:
        """Asks the policy about an exit layer, this one or one further on."""
        if not self.min_layer <= layer < self.num_layers:
            return
        rows, reader = run.main.reader(run.prompt)
        if len(rows) == 0:
            return
        state = reader(hidden)
        leaves = self.policy.leaves(layer, state)
        self._check_verdict("leaves", leaves, len(state))
        run.verdicts[layer] = _Verdict(rows, leaves)

    def _check_verdict(self, method: str, verdict: Any, rows: int) -> None:
        if not isinstance(verdict, torch.Tensor) or verdict.dtype != torch.bool or verdict.shape != (rows,):
            raise ValueError(f"{type(self.policy).__name__}.{method}() must return bool [{rows}], one per state given")

    def _arguments(
        self, index: int, group: _Group, hidden: torch.Tensor, kwargs: dict[str, Any], run: _PromptPass
    ) -> dict[str, Any]:
        """What the layer is given for a group: its rows and columns of everything, its mask, its cache."""
        given = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "past_key_values")}
        mask, held, window = kwargs.get("attention_mask"), run.held(index), self.windows[index]
        some = len(group.rows) < run.batch

        def fit() -> dict[str, Any]:
            selected = select_rows(given, group.rows, run.batch) if some else given
            return selected if group.columns is None else compact_arguments(selected, group.columns, run.length)

        def fit_mask() -> Any:
            selected = select_rows(mask, group.rows, run.batch) if some else mask
            if held is not None:
                before = held.rows(group.on(held.index.device))
                return continued_mask(selected, run.new(group), before, run.past, window, self.config)
            if group.columns is None:
                return selected
            return compact_mask(selected, group.columns, self.config, hidden if group.hidden is None else group.hidden)

        arguments = run.once(fit, tuple(given), group, *given.values())
        arguments = arguments | {"attention_mask": run.once(fit_mask, ("mask", window), mask, group, held)}
        if "past_key_values" in kwargs:
            arguments["past_key_values"] = None if run.cache is None else group.cache
        return arguments

    @staticmethod
    def _put_layer(cache: Cache, index: int, layer: DynamicLayer) -> None:
        if index < len(cache.layers):
            cache.layers[index] = layer
        else:
            cache.layers.append(layer)

    def _merge_caches(self, index: int, run: _PromptPass) -> None:
        """Writes the keys and values of both groups into the model's cache, each row at the right end."""
        groups = [group for group in (run.main, run.side) if len(group.rows)]
        filled = [group.cache.layers[index] for group in groups]
        like = filled[0]
        merged = WithdrawnLayer(self._merged_columns(index, run), run.past + run.length)
        merged.lazy_initialization(like.keys, like.values)
        width = merged.columns.index.shape[1]
        for name in ("keys", "values"):
            part = getattr(like, name)
            together = part.new_zeros(run.batch, part.shape[1], width, part.shape[3])
            for group, layer in zip(groups, filled):
                part = getattr(layer, name)
                together[group.on(part.device), :, width - part.shape[2] :] = part.to(together.device)
            setattr(merged, name, together)
        merged.expected = False
        self._put_layer(run.cache, index, merged)
        for layer in filled:
            layer.reset()

    @staticmethod
    def _merged_columns(index: int, run: _PromptPass) -> Columns:
        held = run.held(index)

        def merge() -> Columns:
            parts = [(group.on(run.valid.device), run.kept(group, held)) for group in (run.main, run.side)]
            width = max(columns.index.shape[1] for _, columns in parts)
            places = torch.zeros(run.batch, width, dtype=torch.long, device=run.valid.device)
            valid = torch.zeros_like(places, dtype=torch.bool)
            for rows, columns in parts:
                start = width - columns.index.shape[1]
                places[rows, start:], valid[rows, start:] = columns.index, columns.valid
            return Columns(places, valid, ragged=True)

        return run.once(merge, "merged", run.side, held)

    def _while_decoding(
        self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        """A mask of its own for a layer whose cache was compacted: the model made one for layer 0."""
        cache = kwargs.get("past_key_values")
        if cache is None or index >= len(cache.layers) or not isinstance(cache.layers[index], WithdrawnLayer):
            return None
        layer = cache.layers[index]
        layer.expected = True
        key = (id(layer.columns), self.windows[index])
        if key not in self._masks:
            given = (call.get("attention_mask") for call in self._calls)
            attention_mask = next((m for m in given if isinstance(m, torch.Tensor) and m.ndim == 2), None)
            own = kwargs.get("attention_mask")
            self._masks[key] = layer.mask(self.config, hidden, attention_mask, self.windows[index], own)
        return hidden, kwargs | {"attention_mask": self._masks[key], "position_ids": None}
