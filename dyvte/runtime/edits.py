"""Edits of decoder layers: not which tokens stay, but what a layer does with them.

An edit takes part in a method as reductions do, ``reduce_tokens(model, edit & FixedExit(4))``. It changes what the
attention or the FFN of some layers computes for the tokens that are still there, by overriding ``forward`` on the
instances while the method is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from dyvte.runtime.attention import call_arguments
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.masks import additive
from dyvte.runtime.override import override
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.view import LayerView

FFN_NAMES = ("mlp", "feed_forward", "ffn")


class LayerEdit(Reduction):
    """What some layers do differently. A subclass overrides those of the five methods that it needs.

    Views are of the layer's own tokens. While decoding, an edit is asked only if ``decoding`` says so, without a view.

    Attributes:
        edited: the layers, from 0; None: all.
        decoding: whether it also changes what is computed for answers.
    """

    layers: Collection[int] = ()  # takes no token away
    edited: Collection[int] | None = None
    decoding: bool = False

    def sees(self, view: LayerView, seen: torch.Tensor) -> torch.Tensor:
        """Which columns each row sees: bool [n, width, width], rows by columns; from what it is without the edit.

        It may not depend on the layer: layers with the same mask share what comes of it.
        """
        raise NotImplementedError

    def values(self, view: LayerView, values: torch.Tensor) -> torch.Tensor:
        """Other values, as they are cached, too: [n, width, key heads, head size]."""
        raise NotImplementedError

    def heads(self, view: LayerView, outputs: torch.Tensor) -> torch.Tensor:
        """Other outputs of heads, before they are projected: [n, width, heads, head size]."""
        raise NotImplementedError

    def attention(self, view: LayerView | None, output: torch.Tensor) -> torch.Tensor:
        """Another output of the attention: [n, width, d]."""
        raise NotImplementedError

    def ffn(
        self, view: LayerView | None, ffn: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor
    ) -> torch.Tensor:
        """What is computed in place of ``ffn(states)``: [n, width, d]."""
        raise NotImplementedError

    def check(self, spec: DecoderSpec) -> None:
        """Raises ``ValueError`` if it does not fit the model."""
        outside = [layer for layer in self.edited or () if not 0 <= layer < spec.num_layers]
        if outside:
            raise ValueError(
                f"{type(self).__name__} edits layer {outside[0]}, but the model has layers 0 ... {spec.num_layers - 1}"
            )
        implementation = str(spec.config._attn_implementation)
        if _has(self, "sees") and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"{implementation} takes no mask of rows by columns, which {type(self).__name__} changes: load the "
                "model with attn_implementation='sdpa' or 'eager'"
            )


class Edits:
    """The edits of a method, on a model.

    Args:
        spec: the model.
        edits: in the order in which they change anything.

    Raises:
        ValueError: a layer has no module of the kind that is to be edited.
    """

    def __init__(self, spec: DecoderSpec, edits: Sequence[LayerEdit]):
        self.spec = spec
        self._view: Callable[[int], LayerView | None] = lambda layer: None
        self._inside: LayerView | None = None  # of the attention that is running
        self._begin: list[Callable[[], Callable[[], Any]]] = []
        self._restore: list[Callable[[], Any]] = []
        for index, layer in enumerate(spec.layers):
            here = [edit for edit in edits if edit.edited is None or index in edit.edited]
            if any(_has(edit, name) for edit in here for name in ("sees", "values", "heads", "attention")):
                self._edit_attention(index, attention_module(layer), here)
            if any(_has(edit, "ffn") for edit in here):
                self._edit_ffn(index, ffn_module(layer), [edit for edit in here if _has(edit, "ffn")])

    def attach(self, view: Callable[[int], LayerView | None]) -> None:
        """Begins.

        Args:
            view: of the tokens that a layer is running on; None while it decodes.
        """
        self._view = view
        self._restore = [begin() for begin in self._begin]

    def remove(self) -> None:
        """The model is as it was."""
        while self._restore:
            self._restore.pop()()

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._begin.append(lambda: override(module, "forward", forward))

    def _edit_attention(self, index: int, module: nn.Module, edits: Sequence[LayerEdit]) -> None:
        seeing = [edit for edit in edits if _has(edit, "sees")]
        changing = [edit for edit in edits if _has(edit, "attention")]
        forward = module.forward

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            view = self._view(index)
            if view is None:
                return None
            given = call_arguments(module, args, kwargs)
            mask = given.get("attention_mask")
            edited = view.group.memo(lambda: self._mask(mask, view, seeing), ("mask", *map(id, seeing)), mask)
            return (), given | {"attention_mask": edited}

        def running(*args: Any, **kwargs: Any) -> Any:
            self._inside = self._view(index)
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside = None

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            view = self._view(index)
            first = output[0] if isinstance(output, tuple) else output
            for edit in changing:
                if view is not None or edit.decoding:
                    first = edit.attention(view, first)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        running.__signature__ = inspect.signature(forward)
        if seeing:  # before anybody reads with what mask the attention is called
            self._begin.append(lambda: module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        if any(_has(edit, name) for edit in edits for name in ("values", "heads")):
            self._override(module, running)
            self._edit_projection(module, "v_proj", "values", edits)
            self._edit_projection(module, "o_proj", "heads", edits)
        if changing:
            self._begin.append(lambda: module.register_forward_hook(after).remove)

    def _edit_projection(self, attention: nn.Module, name: str, method: str, edits: Sequence[LayerEdit]) -> None:
        """Edits what comes out of ``v_proj``, or goes into ``o_proj``, while the attention itself is running."""
        edits = [edit for edit in edits if _has(edit, method)]
        module = getattr(attention, name, None)
        if not edits:
            return
        if module is None or not hasattr(attention, "head_dim"):
            raise ValueError(
                f"{type(edits[0]).__name__} needs attention with {name}, which {type(attention).__name__} has not: "
                "its heads cannot be edited"
            )
        forward, size = module.forward, attention.head_dim

        def change(flat: torch.Tensor) -> torch.Tensor:
            for edit in edits:
                flat = getattr(edit, method)(self._inside, flat.unflatten(-1, (-1, size))).flatten(-2)
            return flat

        def called(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._inside is None:
                return forward(states, *args, **kwargs)
            if method == "heads":
                return forward(change(states), *args, **kwargs)
            return change(forward(states, *args, **kwargs))

        self._override(module, called)

    def _edit_ffn(self, index: int, module: nn.Module, edits: Sequence[LayerEdit]) -> None:
        def wrap(edit: LayerEdit, inner: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            def called(states: torch.Tensor) -> torch.Tensor:
                view = self._view(index)
                return inner(states) if view is None and not edit.decoding else edit.ffn(view, inner, states)

            return called

        forward = module.forward
        for edit in edits:
            forward = wrap(edit, forward)
        self._override(module, forward)

    def _mask(self, mask: Any, view: LayerView, edits: Sequence[LayerEdit]) -> torch.Tensor:
        """A layer's mask with edits of what new tokens see of each other."""
        n, width = view.visual.shape
        device = view.hidden.device
        if mask is None:  # nothing is padding, and no turn came before: plain causal attention
            seen = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(n, -1, -1)
            for edit in edits:
                seen = edit.sees(view, seen)
            eager = self.spec.config._attn_implementation == "eager"
            return additive(seen[:, None], view.hidden.dtype) if eager else seen[:, None]
        before, new = mask.expand(n, -1, -1, -1).split([mask.shape[-1] - width, width], -1)
        lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        seen = old = new[:, 0] if lowest is None else new[:, 0] > lowest / 2
        for edit in edits:
            seen = edit.sees(view, seen)
        if lowest is None:
            return torch.cat([before.expand(-1, 1, -1, -1), seen[:, None]], -1)
        opened, closed = (seen & ~old)[:, None], (old & ~seen)[:, None]
        return torch.cat([before, new.masked_fill(opened, 0).masked_fill(closed, lowest)], -1)


def attention_module(layer: nn.Module) -> nn.Module:
    """The module of a decoder layer that is given the attention mask.

    Raises:
        ValueError: there is none.
    """
    for child in layer.children():
        if "attention_mask" in inspect.signature(child.forward).parameters:
            return child
    raise ValueError(f"no attention in {type(layer).__name__} takes an attention_mask: it cannot be edited")


def ffn_module(layer: nn.Module) -> nn.Module:
    """The feed-forward network of a decoder layer.

    Raises:
        ValueError: it is not a module of its own.
    """
    for name in FFN_NAMES:
        if isinstance(getattr(layer, name, None), nn.Module):
            return getattr(layer, name)
    raise ValueError(f"{type(layer).__name__} has no {', '.join(FFN_NAMES)}: its feed-forward network cannot be edited")


def _has(edit: LayerEdit, method: str) -> bool:
    return getattr(type(edit), method) is not getattr(LayerEdit, method)
