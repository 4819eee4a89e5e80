"""What an exit means, on any decoder, without the runtime: the layers from it on are called on the text rows alone.

One sample at a time, without padding and without a cache, so that no mask, no cache and no batch has to be rebuilt:
whatever a layer is given that is as long as the sequence is cut to the text rows, and positions stay with their tokens.
The model around the layers gets rows of zeros in place of the visual ones, which no layer sees again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, MutableMapping
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
        elif isinstance(value, (dict, list, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from numbers(inner)

    heads = {getattr(module, "head_dim", 0) for module in model.modules()}
    heads |= {size // 2 for size in heads if isinstance(size, int)}
    return (
        heads
        | {size for parameter in model.parameters() for size in parameter.shape}
        | set(numbers(model.config.to_dict()))
    )


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


def hide(value: Any, gone: torch.Tensor, visual: torch.Tensor) -> Any:
    """In every mask [batch, heads, sequence, sequence] the text queries lose sight of visual keys that are gone."""
    length = visual.shape[1]
    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (length, length):
        unseen = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
        value = value.masked_fill((~visual[:, :, None] & gone[:, None, :])[:, None], unseen)
    return value


@contextmanager
def wrapped(
    model: nn.Module, wrapper: Callable[[int, Callable[..., Any], tuple, dict[str, Any]], Any]
) -> Iterator[None]:
    """Every call of a decoder layer goes to ``wrapper(number of calls before, forward, args, kwargs)``."""
    calls = itertools.count()

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: wrapper(next(calls), forward, args, kwargs)

    with ExitStack() as stack:
        for module in decoder_layers(model):
            stack.enter_context(mock.patch.object(module, "forward", wrap(module.forward)))
        yield


@torch.no_grad()
def text_rows_alone(model: nn.Module, inputs: dict[str, Any], visual: torch.Tensor, layer: int) -> torch.Tensor:
    """The logits [text tokens, vocabulary] of one sample that leaves after so many layers; visual: bool [sequence]."""
    rows, length = (~visual).nonzero().flatten(), len(visual)
    if layer >= len(decoder_layers(model)):
        return model(**inputs, use_cache=False).logits[0, ~visual]

    def run(called: int, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if called < layer:
            return forward(*args, **kwargs)
        return spread(forward(*cut(args, length, rows), **cut(kwargs, length, rows)), length, rows)

    with wrapped(model, run):
        return model(**inputs, use_cache=False).logits[0, ~visual]


@torch.no_grad()
def masked(model: nn.Module, inputs: dict[str, Any], visual: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    """The same by masks alone, for batches and decoders of attention layers: logits [batch, sequence, vocabulary].

    Nothing is cut: from its exit layer on, no text token of a sample sees a visual one.
    """

    def run(called: int, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        gone = visual & (exits <= called)[:, None]
        args = tuple(hide(value, gone, visual) for value in args)
        return forward(*args, **{name: hide(value, gone, visual) for name, value in kwargs.items()})

    with wrapped(model, run):
        return model(**inputs, use_cache=False).logits
