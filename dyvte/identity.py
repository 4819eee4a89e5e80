"""Which model this is: fingerprints of all weights and of a processor, wherever they lie on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dyvte.provenance import fingerprint

CHUNK = 2**24  # elements that travel to the host at once
_known: WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of every tensor of a model: name, type, shape and bytes; adapters and quantised parts are such tensors.

    What adapters are active, and how they are scaled, counts too. Folder, file names and times do not. Computed once
    for a model and again only when a tensor was replaced or written to in place (not through ``tensor.data``).

    Args:
        model: the model itself, not a wrapper. If its weights are sharded, all ranks must call this together.

    Raises:
        ValueError: a tensor has no values.
    """
    stamp = [*_adapters(model), *map(_stamp, (*model.named_parameters(), *model.named_buffers()))]
    known = _known.get(model)
    if known is None or known[0] != stamp:
        known = _known[model] = (stamp, _digest_of(model))
    return known[1]


def _digest_of(model: nn.Module) -> str:
    values = [(name.replace("_orig_mod.", ""), value) for name, value in model.state_dict(keep_vars=True).items()]
    parts = [part for name, value in values for part in _parts(model, name, value)]
    if any(_is_sharded(value) for _, value in parts):  # gathered by all ranks in the same order
        lines = [_line(name, value) for name, value in parts]
    else:  # sha256 lets other threads run
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            lines = list(pool.map(lambda part: _line(*part), parts))
    adapters = json.dumps(_adapters(model), sort_keys=True, default=str)
    return hashlib.sha256("\n".join([*sorted(lines), adapters]).encode()).hexdigest()


def _stamp(named: tuple[str, torch.Tensor]) -> tuple[str, int, int, int]:
    """Changes when a tensor is replaced or written to, without a look at its values."""
    name, tensor = named
    place = 0 if _is_sharded(tensor) else tensor.data_ptr()
    return name, id(tensor), place, 0 if tensor.is_inference() else tensor._version


def _adapters(model: nn.Module) -> list[Any]:
    """What an adapter of peft does beside its weights: which are at work, and how strongly."""
    return [
        [name, list(module.active_adapters), module.scaling, bool(module.disable_adapters)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")
    ]


def _parts(model: nn.Module, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain tensors that a value of a state dict is made of."""
    if not isinstance(value, torch.Tensor):
        yield name, value
    elif value.is_meta:
        yield name, _offloaded(model, name)
    elif hasattr(value, "__tensor_flatten__") and not _is_sharded(value):  # such as the quantised ones of torchao
        for inner in value.__tensor_flatten__()[0]:
            yield from _parts(model, f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps elsewhere while its layer is not running."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(path[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            try:
                return (getattr(one, "weights_map", None) or {})[".".join(path[depth:])]
            except KeyError:
                continue
    raise ValueError(f"weight {name} has no values (it is on the meta device): load the model before it is used")


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "ds_id") or hasattr(value, "full_tensor")


@contextmanager
def _whole(value: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(value, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value]):
            yield value.data
    else:
        yield value.full_tensor() if hasattr(value, "full_tensor") else value


def _line(name: str, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{name} {value}"
    digest = hashlib.sha256()
    with _whole(value) as whole:
        for chunk in whole.detach().reshape(-1).split(CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
        return f"{name} {whole.dtype} {list(whole.shape)} {digest.hexdigest()}"


def processor_fingerprint(processor: Any, template: str | None = None) -> str:
    """16 hex digits that change with a processor's vocabulary, image settings and chat template.

    Args:
        template: the chat template used instead of the processor's own.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = json.loads(backend.to_str())
        vocabulary: Any = {key: value for key, value in text.items() if key not in ("padding", "truncation")}
    else:
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    images = getattr(processor, "image_processor", None)
    settings = images.to_dict() if hasattr(images, "to_dict") else None
    return fingerprint(
        {
            "class": type(processor).__name__,
            "template": template or getattr(processor, "chat_template", None),
            "tokenizer": vocabulary,
            "special": getattr(tokenizer, "special_tokens_map", None),
            "images": {key: value for key, value in (settings or {}).items() if "path" not in key},
        }
    )
