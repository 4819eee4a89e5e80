"""A method at work on a model: every decoder layer runs once for each group of samples, inside its own ``forward``.

``forward`` is overridden on the instances, as accelerate does, so hooks of the layers (sharding, offloading) fire once
per layer whatever the number of groups, and a model that is called past its hooks is seen all the same.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dyvte.runtime.arguments import MASK, argument_names, layer_call
from dyvte.runtime.attention import AttentionCall, find_attention, watch
from dyvte.runtime.cache import KeptLayer
from dyvte.runtime.calls import Calls, Frame, VisualMask
from dyvte.runtime.compat import call_cache
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.override import Override, forward_name, override, refuse_copy
from dyvte.runtime.placement import check_sharding
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.splice import SplicedVisualMask

# Several prompts under way in one call of the decoder, with a cache of their own kind.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Engine:
    """Runs a model's prompts through passes of groups, until it is removed.

    Args:
        spec: the model.
        visual_mask: see :func:`dyvte.attach`.
        begin: makes the pass of a new prompt: (prompt, embeddings, cache, what is not padding before) -> pass.
        finish: gets the pass of a prompt after the last layer.
        check_rows: raises ``ValueError`` for a batch of that many rows.
        attention_of: the layers whose attention is kept for the layer after.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        visual_mask: VisualMask | None,
        begin: Callable[..., PromptPass],
        finish: Callable[[PromptPass], None],
        check_rows: Callable[[int], None] = lambda rows: None,
        attention_of: tuple[int, ...] = (),
    ):
        if getattr(spec.decoder, "_dyvte_attached", False):
            raise ValueError(
                "a visual exit is attached to this model already: detach() it, or leave its with block, first"
            )
        check_sharding(spec.layers)
        self.spec, self.calls = spec, Calls(spec, visual_mask)
        self.begin, self.finish, self.check_rows = begin, finish, check_rows
        attentions = [find_attention(spec.layers[index]) for index in attention_of]
        self.run: PromptPass | None = None
        self.length = 0  # columns of the full sequence that the layers are working on
        self._masks: dict[tuple, Any] = {}
        self._turn = threading.RLock()  # what a call is doing is kept here, so threads take turns
        self._restore: list[Callable[[], Any]] = []
        self._override_calls()
        for index, layer in enumerate(spec.layers):
            self._override_layer(index, layer)
        for module in attentions:
            self._keep_attention(module)
        spec.decoder._dyvte_attached = True
        self._restore.append(functools.partial(delattr, spec.decoder, "_dyvte_attached"))
        if isinstance(visual_mask, SplicedVisualMask):
            self._restore.append(visual_mask.attach())

    def remove(self) -> None:
        """The model is as it was."""
        while self._restore:
            self._restore.pop()()
        self._end()

    # Overriding.

    def _override_calls(self) -> None:
        model, decoder = self.spec.model, self.spec.decoder
        for kind, module in {"decoder": decoder, "model": model}.items():
            if kind == "model" or decoder is not model:
                name = forward_name(module)
                self._restore.append(override(module, name, self._calling(kind, getattr(module, name))))
        if hasattr(model, "generate"):
            self._restore.append(override(model, "generate", self._calling("generate", model.generate)))
        self._restore.append(override(model, "__getstate__", refuse_copy))
        for name in CONTINUOUS_BATCHING:
            if hasattr(model, name):
                self._restore.append(override(model, name, _refuse_continuous_batching))

    def _calling(self, kind: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` that is seen, and refused before any work if it cannot be right."""
        names = list(inspect.signature(forward).parameters)

        def called(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args)) | kwargs
            with self._turn:
                self._check(kind, given)
                outermost = not self.calls.of_model
                self.calls.frames.append(Frame(kind, given))
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.calls.frames.pop()
                    if outermost:
                        self._end()  # nothing of a call outlives it, also where it failed half-way
                    if not self.calls.frames and isinstance(self.calls.visual_mask, SplicedVisualMask):
                        self.calls.visual_mask.forget()

        return Override(forward, called)

    def _check(self, kind: str, given: dict[str, Any]) -> None:
        if kind != "generate":
            self.calls.refuse(given, self.spec.config)
            if not self.calls.of_model:
                self.calls.refuse_batch(given, self.check_rows)
            return
        defaults = given.get("generation_config") or getattr(self.spec.model, "generation_config", None)
        self.calls.refuse_generate(given, defaults)
        self.calls.refuse(given, defaults)
        counts = (given.get(name, getattr(defaults, name, None)) for name in ("num_beams", "num_return_sequences"))
        self.calls.refuse_batch(given, self.check_rows, max(count or 1 for count in counts))

    def _override_layer(self, index: int, layer: nn.Module) -> None:
        name = forward_name(layer)  # where accelerate moves weights around a layer, the groups run inside of that
        forward = getattr(layer, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            return self._run_layer(index, layer, forward, args, kwargs)

        self._restore.append(override(layer, name, Override(forward, called)))
        for module in layer.modules():
            if hasattr(module, "_mixed_batch_forward"):
                self._override_argument(module, "adapter_names", self._adapters)
                self._override_argument(module, "alora_offsets", self._offsets)
            if "seq_len" in argument_names(module):
                self._override_argument(module, "seq_len", lambda asked: max(asked, self.length))

    def _override_argument(self, module: nn.Module, name: str, change: Callable[[Any], Any]) -> None:
        """Changes one argument of a module's ``forward``, where it is given."""
        place = forward_name(module)
        forward = getattr(module, place)
        names = list(inspect.signature(forward).parameters)

        def called(*args: Any, **kwargs: Any) -> Any:
            if name in names[: len(args)]:
                args = tuple(change(v) if n == name and v is not None else v for n, v in zip(names, args))
            elif kwargs.get(name) is not None:
                kwargs = kwargs | {name: change(kwargs[name])}
            return forward(*args, **kwargs)

        self._restore.append(override(module, place, Override(forward, called)))

    def _adapters(self, names: list[Any]) -> list[Any]:
        """What peft is told for every sample, such as its adapter, for those of the group that is running."""
        group = self.run.current if self.run is not None else None
        return names if group is None else [names[sample] for sample in group.samples.tolist()]

    def _offsets(self, offsets: list[int | None]) -> list[int | None]:
        """From which token on peft's activated LoRA is at work, counted from the end."""
        if self.run is not None and self.run.current is not None and not self.run.current.whole:
            raise ValueError(
                "activated LoRA counts tokens, of which some are gone: merge it, or use it without an exit"
            )
        return self._adapters(offsets)

    def _keep_attention(self, module: nn.Module) -> None:
        def group() -> Group | None:
            return self.run.current if self.run is not None else None

        def keep(call: AttentionCall) -> None:
            self.run.attention[id(self.run.current)] = call

        self._restore.append(watch(module, lambda: None if group() is None else group().keys.valid, keep))

    # Running.

    def _run_layer(self, index: int, layer: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        hidden, given = layer_call(layer, args, kwargs)
        if index == 0 and (self.run is None or not self.calls.frames):  # a bare loop may have failed before its end
            self._start(hidden, given)
        if self.run is None:
            return self._decode(index, forward, hidden, given)
        output = self.run.run(index, forward, hidden, given)
        if index == self.spec.num_layers - 1:
            run, self.run = self.run, None
            self.finish(run)
        return output

    def _start(self, hidden: torch.Tensor, given: dict[str, Any]) -> None:
        self._end()
        if hidden.ndim != (3 if self.spec.stream is None else 4):
            raise ValueError(
                f"decoder layers of {type(self.spec.model).__name__} work on states {list(hidden.shape)}, not [batch, "
                "sequence, width]: visual tokens cannot be withdrawn from this model, use it without the exit"
            )
        hidden, cache = self.spec.by_rows(hidden), call_cache(given)
        past = cache.get_seq_length() if cache is not None else 0
        self.length = past + hidden.shape[1]
        found = self.calls.prompt(hidden, given.get(MASK), past)
        if found is not None:
            self.run = self.begin(found[0], hidden, cache, found[1])

    def _end(self) -> None:
        self.run, self._masks, self.length = None, {}, 0

    def _decode(self, index: int, forward: Callable[..., Any], hidden: torch.Tensor, given: dict[str, Any]) -> Any:
        """A mask of its own for a layer that holds some tokens only: the model made one for layer 0."""
        cache, source = call_cache(given), self.spec.kinds[index].source
        where = index if source is None else source
        layer = cache.layers[where] if cache is not None and where < len(cache.layers) else None
        if not isinstance(layer, KeptLayer):
            return forward(hidden, **given)
        kind, config = self.spec.kinds[where], self.spec.config
        key, states = (id(layer.tokens), kind), self.spec.by_rows(hidden)
        if source is None:
            layer.expected = True
        if key not in self._masks:
            read, known = self.spec.read(states), self.calls.attention_mask
            self._masks[key] = layer.mask(config, read, known, kind, given.get(MASK))
        mask = self._masks[key]  # that of the source for whoever reads its keys, for as many rows as there are
        cut = isinstance(mask, torch.Tensor) and mask.ndim == 4
        given = given | {MASK: mask[:, :, -states.shape[1] :] if cut else mask}
        if "position_ids" in given and "flash" in str(config._attn_implementation):
            given["position_ids"] = None  # gaps would read as several packed sequences
        return forward(hidden, **given)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "continuous batching does not work with visual exit: it runs parts of several prompts in one call, with a "
        "cache that holds the same tokens in all layers. Call generate() on batches, or detach the exit"
    )
