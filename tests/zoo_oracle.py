"""What an exit means, on any decoder, without the runtime: the layers from it on are called on the text rows alone.

One sample at a time, without padding and without a cache, so that no mask, no cache and no batch has to be rebuilt:
whatever a layer is given that is as long as the sequence is cut to the text rows, and positions stay with their tokens.
The model around the layers gets rows of zeros in place of the visual ones, which no layer sees again.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers with as many entries as the text config says, outside of all towers."""
    text = model.config.get_text_config(decoder=True)
    found = [
        module
        for path, module in model.named_modules()
        if path.split(".")[-1] == "layers"
        and isinstance(module, nn.ModuleList)
        and len(module) == text.num_hidden_layers
        and not any(part in path for part in ("vision", "visual", "audio", "tower", "encoder", "vq", "mtp"))
    ]
    (layers,) = found
    return layers


def sizes(model: nn.Module) -> set[int]:
    """Every size in a model that a sequence must not have, for its dimensions to be told from others."""

    def numbers(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from numbers(inner)

    return {size for parameter in model.parameters() for size in parameter.shape} | set(numbers(model.config.to_dict()))


def cut(value: Any, length: int, rows: torch.Tensor) -> Any:
    """Every dimension of this length is cut to these rows; containers that layers share are changed in place."""
    if isinstance(value, torch.Tensor):
        for dim, size in enumerate(value.shape):
            if size == length:
                value = value.index_select(dim, rows)
    elif isinstance(value, tuple):
        value = tuple(cut(part, length, rows) for part in value)
    elif isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = cut(value[key], length, rows)
    elif isinstance(value, list):
        value[:] = [cut(part, length, rows) for part in value]
    return value


def spread(value: Any, length: int, rows: torch.Tensor) -> Any:
    """The opposite of :func:`cut` for what a layer gives back: zeros where the visual tokens were."""
    if isinstance(value, tuple):
        return tuple(spread(part, length, rows) for part in value)
    if isinstance(value, torch.Tensor):
        for dim, size in enumerate(value.shape):
            if size == len(rows):
                shape = [*value.shape[:dim], length, *value.shape[dim + 1 :]]
                value = value.new_zeros(shape).index_copy(dim, rows, value)
    return value


def hide(value: Any, visual: torch.Tensor) -> Any:
    """In every mask [..., sequence, sequence] the text queries lose sight of the visual keys."""
    length = len(visual)
    if isinstance(value, torch.Tensor) and value.ndim >= 3 and value.shape[-2:] == (length, length):
        unseen = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
        value = value.masked_fill(~visual[:, None] & visual, unseen)
    return value


@contextmanager
def exits_at(model: nn.Module, visual: torch.Tensor, layer: int, masks_only: bool = False) -> Iterator[None]:
    """One sample leaves at this layer.

    Args:
        visual: bool [sequence].
        layer: the number of decoder layers that see the visual tokens.
        masks_only: nothing is cut, masks alone hide the visual tokens; for decoders of attention layers.
    """
    rows, length, called = (~visual).nonzero().flatten(), len(visual), 0

    def wrap(forward):
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called += 1
            if called <= layer:
                return forward(*args, **kwargs)
            if masks_only:
                args = tuple(hide(value, visual) for value in args)
                return forward(*args, **{name: hide(value, visual) for name, value in kwargs.items()})
            return spread(forward(*cut(args, length, rows), **cut(kwargs, length, rows)), length, rows)

        return run

    with ExitStack() as stack:
        for module in decoder_layers(model):
            stack.enter_context(mock.patch.object(module, "forward", wrap(module.forward)))
        yield


@torch.no_grad()
def logits_by_definition(
    model: nn.Module, inputs: dict[str, Any], visual: torch.Tensor, layer: int, masks_only: bool = False
) -> torch.Tensor:
    """The logits of one sample's text tokens: [text tokens, vocabulary]."""
    with exits_at(model, visual, layer, masks_only):
        return model(**inputs, use_cache=False).logits[0, ~visual]
