"""What differs between the versions of transformers that dyvte runs on: 4.57 and 5.0 to 5.24.

Each name here is one difference; nothing else in the package asks for a version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask

# 5.0 renamed the class.
PreTrainedConfig = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
# 5.24 renamed the argument everywhere, and tells whoever asks its outputs for an older name first.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "cache_params")
# Up to 5.0 ``crop`` takes the length to keep, later the number of tokens to remove as a negative number.
CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters

# 5.23 added what stands in a cache for layers that keep nothing.
EMPTY_LAYERS = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))
TOKENWISE = ("mlp", "moe")  # types of layers that mix no tokens

_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


def call_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or in a model's output, by whatever name; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def causal_mask(
    config: PreTrainedConfig,
    hidden: torch.Tensor,
    padding: torch.Tensor | None,
    cache: Cache | None = None,
    also: Callable[..., Any] | None = None,
) -> Any:
    """``create_causal_mask``, whose arguments were renamed twice and lost ``cache_position`` in between.

    Args:
        hidden: the incoming states [batch, queries, d].
        padding: bool [batch, keys], what is not padding; None for all.
        cache: what was seen before; its first layer gives the length.
        also: a further condition on (batch, head, query, key).
    """
    given = {"config": config, "attention_mask": padding, "and_mask_function": also}
    given["inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"] = hidden
    given["cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"] = cache
    if "cache_position" in _MASK_ARGUMENTS:
        past = cache.get_seq_length() if cache is not None else 0
        given["cache_position"] = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    return create_causal_mask(**given)


def layer_types(config: PreTrainedConfig) -> list[tuple[str, int | None]]:
    """The kind of every decoder layer, as its cache knows it, and its window or chunk in tokens, if it has one."""
    if hasattr(cache_utils, "get_layer_types_and_kwargs"):
        types, settings = cache_utils.get_layer_types_and_kwargs(config)
        named = getattr(config, "layer_types", None) or types  # what a cache need not know is a "dummy" to it
        types = [name if name in TOKENWISE else kind for kind, name in zip(types, named)]
        return [(kind, more.get("sliding_window")) for kind, more in zip(types, settings)]
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
        types = [kind] * config.num_hidden_layers
    types = types[: len(types) - (getattr(config, "num_kv_shared_layers", None) or 0)]
    sizes = {"sliding_attention": window, "chunked_attention": chunk}
    return [(kind, sizes.get(kind)) for kind in types]
