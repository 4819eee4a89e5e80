"""Adapters at work: in place of the attention of some layers, and before that of others.

What an adapter took from a prompt belongs to the cache that the prompt filled: whatever is decoded on that cache is
adapted in the same way. Beams of a prompt remember the same, so their reordering changes nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from dyvte.runtime.adaptation import Adaptation, Memory, projections_behind
from dyvte.runtime.compat import call_cache
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.edits import LayerEdit, attention_module
from dyvte.runtime.override import forward_name, override
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.view import LayerView


class Adaptations:
    """The adaptations of a method, on a model.

    Args:
        spec: the model, as :func:`without_skipped` gives it.
        parts: of the method.

    Raises:
        ValueError: parts that do not go together.
    """

    def __init__(self, spec: DecoderSpec, parts: Sequence[Reduction]):
        self.spec = spec
        self._methods: dict[int, Adaptation] = {}
        for part in parts:
            for layer in {*part.skipped, *part.adapted} if isinstance(part, Adaptation) else ():
                if layer in self._methods:
                    raise ValueError(f"two methods adapt layer {layer}: give them different layers")
                self._methods[layer] = part
        for part in parts:
            self._check_beside(part)
        self._view: Callable[[int], LayerView | None] = lambda layer: None
        self._cache: Callable[[], Cache | None] = lambda: None
        self._known: WeakKeyDictionary[Cache, dict[int, tuple[Prompt, Memory]]] = WeakKeyDictionary()
        self._restore: list[Callable[[], Any]] = []

    def _check_beside(self, part: Reduction) -> None:
        if isinstance(part, LayerEdit):
            for layer, method in self._methods.items():
                if method.folded and (part.edited is None or layer in part.edited):
                    raise ValueError(
                        f"{type(part).__name__} edits layer {layer}, whose projections {type(method).__name__} "
                        "replaces: use it unfolded (fold=False)"
                    )
        if part.reads_attention:
            for layer in (layer for layer, method in self._methods.items() if layer in method.skipped):
                if part.layers is None or layer + 1 in part.layers:
                    raise ValueError(
                        f"{type(part).__name__} reads the attention of layer {layer}, which is skipped: choose other "
                        "layers for one of them"
                    )

    def attach(self, view: Callable[[int], LayerView | None], cache: Callable[[], Cache | None]) -> None:
        """Begins.

        Args:
            view: of the tokens that a layer is running on; None while it decodes.
            cache: the model's, of the prompt that is running.
        """
        self._view, self._cache = view, cache
        for layer, method in self._methods.items():
            (self._skip if layer in method.skipped else self._adapt)(layer, method)

    def remove(self) -> None:
        """The model is as it was."""
        while self._restore:
            self._restore.pop()()

    def _skip(self, layer: int, method: Adaptation) -> None:
        block, running = self.spec.layers[layer], {}
        attention, norm = attention_module(block), block.post_attention_layernorm
        forward = getattr(attention, forward_name(attention))
        names = tuple(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def no_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            given = dict(zip(names, args)) | kwargs
            states = given["hidden_states"]
            running.update(states=states, memory=self._memory(layer, method, states, given))
            return states.new_zeros(1).expand_as(states), None

        def no_norm(hidden: torch.Tensor) -> torch.Tensor:
            states = running.pop("states")
            return states if method.folded else method.adapt(layer, states, running.pop("memory")) * norm.weight

        self._override(attention, no_attention)
        self._override(norm, no_norm)
        if method.folded:
            self._fold(block, True, lambda: running["memory"])

    def _adapt(self, layer: int, method: Adaptation) -> None:
        block, running = self.spec.layers[layer], {}
        attention = attention_module(block)
        names = tuple(inspect.signature(attention.forward).parameters)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            given = dict(zip(names, args)) | kwargs
            memory = self._memory(layer, method, given["hidden_states"], given)
            if method.folded:
                running["memory"] = memory
                return None
            return (), given | {"hidden_states": method.adapt(layer, given["hidden_states"], memory)}

        self._restore.append(attention.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        if method.folded:
            self._fold(block, False, lambda: running["memory"])

    def _fold(self, block: nn.Module, skipped: bool, memory: Callable[[], Memory]) -> None:
        def projecting(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            def projected(states: torch.Tensor) -> torch.Tensor:
                weight, bias = (memory()[f"{name}.{part}"] for part in ("weight", "bias"))
                if len(states) == 1:
                    return F.linear(states, weight[0], bias[0])
                return torch.baddbmm(bias[:, None], states, weight.mT)

            return projected

        for name, linear in projections_behind(block, skipped).items():
            self._override(linear, projecting(name))

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._restore.append(override(module, forward_name(module), forward))

    def _memory(self, layer: int, method: Adaptation, states: torch.Tensor, given: dict[str, Any]) -> Memory:
        """What the layer remembers of the samples that it is running on."""
        view = self._view(layer)
        if view is None:
            return self._recall(layer, call_cache(given), len(states))
        group, prompt = view.group, view.prompt

        def asked() -> torch.Tensor:
            grid = prompt.valid if prompt.answer is None else prompt.valid & ~prompt.answer
            return group.tokens.gather(grid, group.samples_on(grid.device)) & group.tokens.valid

        memory = method.remember(layer, states, group.memo(asked, "asked").to(states.device))
        if method.folded:
            block, skipped = self.spec.layers[layer], layer in method.skipped
            gain, folded = block.post_attention_layernorm.weight if skipped else None, {}
            for name, linear in projections_behind(block, skipped).items():
                folded[f"{name}.weight"], folded[f"{name}.bias"] = method.fold(layer, memory, linear, gain)
            memory = folded
        self._note(layer, prompt, group.samples, memory)
        return memory

    def _note(self, layer: int, prompt: Prompt, samples: torch.Tensor, memory: Memory) -> None:
        cache, batch = self._cache(), prompt.shape[0]
        if cache is None:
            return
        known = self._known.setdefault(cache, {})
        if torch.equal(samples, torch.arange(batch)):
            known[layer] = (prompt, memory)
            return
        if layer not in known or known[layer][0] is not prompt:
            known[layer] = (prompt, {name: rows.new_zeros(batch, *rows.shape[1:]) for name, rows in memory.items()})
        for name, rows in memory.items():
            known[layer][1][name][samples.to(rows.device)] = rows

    def _recall(self, layer: int, cache: Cache | None, rows: int) -> Memory:
        _, memory = self._known.get(cache, {}).get(layer, (None, {})) if cache is not None else (None, {})
        if any(len(value) != rows for value in memory.values()) or not memory:
            raise ValueError(
                "this cache was filled without these adapters, copied, or its rows were selected since, so that what "
                "they took from the prompts is not known: start a new cache with the method attached"
            )
        return memory
