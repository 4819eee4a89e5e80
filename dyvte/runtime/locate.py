"""Where the decoder layers of a model are, inside all that is wrapped around them."""

from __future__ import annotations

import inspect

from torch import nn

from dyvte.runtime.arguments import SHARED_STATES

DECODER_NAMES = ("language_model", "text_model", "llm", "decoder", "model")


def without_engine(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DeepSpeed and data parallelism."""
    while isinstance(inner := model._modules.get("module"), nn.Module):  # hasattr() is true of all that engines forward
        model = inner
    return model


def underlying_model(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` runs: inside the wrappers of peft, DeepSpeed and data parallelism."""
    while hasattr(model := without_engine(model), "get_base_model"):
        model = model.get_base_model()
    return model


def find_decoder(model: nn.Module, decoder: str | nn.Module | None = None) -> nn.Module:
    """The module that owns the list of decoder layers.

    Asks ``model.get_decoder()`` and, since that may return a wrapper, goes on inwards until there is a ``.layers``.

    Args:
        decoder: the module itself, or the dotted path to it such as ``"language_model.model"``, where it is known.

    Raises:
        ValueError: no module with ``.layers`` is found, or its layers cannot do without the visual tokens.
    """
    if decoder is not None:
        return _check_layers(_named_decoder(model, decoder))
    module = model.get_decoder() if hasattr(model, "get_decoder") else model
    for start in (module, model):
        seen: set[int] = set()
        while start is not None and id(start) not in seen:
            if _has_layers(start):
                return _check_layers(start)
            seen.add(id(start))
            inner = (getattr(start, name, None) for name in DECODER_NAMES)
            start = next((m for m in inner if isinstance(m, nn.Module) and id(m) not in seen), None)
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: neither get_decoder() nor "
        f"{', '.join('.' + name for name in DECODER_NAMES)} lead to a module with a ModuleList .layers. "
        "Name it: decoder='path.to.it'"
    )


def _has_layers(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, "layers", None), nn.ModuleList) and len(module.layers) > 0


def _named_decoder(model: nn.Module, decoder: str | nn.Module) -> nn.Module:
    if not isinstance(decoder, (str, nn.Module)):
        raise TypeError(f"decoder must be a module or the dotted path to it, not {type(decoder).__name__}")
    module: nn.Module | None = decoder if isinstance(decoder, nn.Module) else model
    if isinstance(decoder, str):
        for name in decoder.split("."):
            module = getattr(module, name, None)
    if not _has_layers(module):
        owners = [path for path, inner in model.named_modules() if _has_layers(inner)]
        named = repr(decoder) if isinstance(decoder, str) else type(decoder).__name__
        raise ValueError(
            f"decoder {named} has no ModuleList .layers in {type(model).__name__}: these have: {', '.join(owners)}"
        )
    return module


def _check_layers(decoder: nn.Module) -> nn.Module:
    if "decoder_input_ids" in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"{type(decoder).__name__} is given tokens of its own beside the prompt (decoder_input_ids), which goes "
            "through other layers: use the model without the exit"
        )
    found = [name for name, module in decoder.named_children() if "cross_attn" in name and len(list(module.children()))]
    for index, layer in enumerate(decoder.layers):
        names = inspect.signature(layer.forward).parameters
        found += [
            n for n in names if n == "cross_attention_states" or (n.endswith("_kv_states") and n != SHARED_STATES)
        ]
        if found:
            raise ValueError(
                f"decoder layer {index} of {type(decoder).__name__} sees images through cross attention, so there are "
                f"no visual tokens to withdraw ({found[0]}): use the model without the exit"
            )
    return decoder
