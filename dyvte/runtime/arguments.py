"""What a decoder layer is called with, and the same for fewer rows and columns.

Arguments are known by the names that decoder layers give them; how their dimensions lie follows from the name. What
is not known here and has rows or columns is refused: guessing from shapes would sometimes be wrong without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dyvte.runtime.compat import CACHE_NAMES
from dyvte.runtime.tokens import KeptTokens

MASK = "attention_mask"
SHARED_STATES = "shared_kv_states"  # keys and values that later layers read, written by the layers of the same pass
LENGTHS = ("seqlens_in_batch",)  # tokens of every sample; counted from the mask where they are not given
# (batch, sequence) counted from the last dimension; further dimensions may stand before or after.
DIMENSIONS = {
    "position_ids": (-2, -1),
    "cache_position": (None, -1),
    "position_embeddings": (-3, -2),
    "position_embeddings_global": (-3, -2),
    "position_embeddings_local": (-3, -2),
    "freqs_ci": (-3, -2),
    "per_layer_input": (-3, -2),
    "visual_pos_masks": (-2, -1),
    "token_type_ids": (-2, -1),
    "mm_token_type_ids": (-2, -1),
    "moe_mm_token_type_ids": (-2, -1),
}


def layer_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states a decoder layer is called with, and everything else by name."""
    if len(args) == 1:  # as transformers calls its own
        return args[0], kwargs
    names = argument_names(layer)
    if len(args) > len(names):
        raise ValueError(
            f"{type(layer).__name__} is called with {len(args)} arguments by place that its forward does not name: "
            "call decoder layers with all but the hidden states by name"
        )
    kwargs = dict(zip(names, args)) | kwargs
    first = "hidden_states" if "hidden_states" in kwargs else names[0]
    return kwargs[first], {name: value for name, value in kwargs.items() if name != first}


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments that a module's ``forward`` names, in order."""
    return _argument_names(type(module))


@functools.lru_cache(maxsize=256)
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def cache_name(arguments: Mapping[str, Any]) -> str | None:
    """Under which name a layer is given its cache; None where it is given none."""
    return next((name for name in CACHE_NAMES if arguments.get(name) is not None), None)


def check_arguments(layer: nn.Module, arguments: Mapping[str, Any], batch: int, length: int) -> None:
    """What has rows or columns must be known by name.

    Raises:
        ValueError: something has them and is not.
    """
    if MASK not in arguments and MASK not in argument_names(layer):
        raise ValueError(
            f"{type(layer).__name__} takes no {MASK}, so it is not known how it is told what to attend to: tokens "
            "cannot be withdrawn from this model, use it without the exit"
        )
    for name, value in arguments.items():
        if name in (MASK, SHARED_STATES, *LENGTHS, *CACHE_NAMES):
            continue
        if name in DIMENSIONS:
            for part in tensors(value):
                _, sequence = DIMENSIONS[name]
                if part.ndim < -sequence or part.shape[sequence] != length:
                    raise ValueError(
                        f"{type(layer).__name__} is given {name} {list(part.shape)}, which does not have the prompt's "
                        f"{length} columns where it should: tokens cannot be withdrawn, use it without the exit"
                    )
        elif any(length in part.shape or (batch > 1 and batch in part.shape) for part in tensors(value)):
            raise ValueError(
                f"{type(layer).__name__} is given {name!r}, which has rows or columns and is not known here: tokens "
                "cannot be withdrawn from it, so use the model without the exit"
            )


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def compact_argument(name: str, value: Any, samples: torch.Tensor | None, tokens: KeptTokens | None, batch: int) -> Any:
    """An argument for some samples of the batch (None: all), compacted to their tokens (None: all columns).

    Anything that is not indexed by tokens stays as it is.
    """
    if name not in DIMENSIONS:
        return value
    if isinstance(value, Mapping):
        return {key: compact_argument(name, part, samples, tokens, batch) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(compact_argument(name, part, samples, tokens, batch) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    row, column = DIMENSIONS[name]
    if row is None:
        return value if tokens is None else value[..., : tokens.width]
    if value.ndim < -row:  # one row for all samples
        value = value.unsqueeze(0)
    rows = samples.to(value.device) if samples is not None and value.shape[row] == batch > 1 else None
    if tokens is None:
        return value if rows is None else value.index_select(row, rows)
    return tokens.gather(value.movedim((row, column), (0, 1)), rows).movedim((0, 1), (row, column))
