"""What is true of a model: where its decoder layers are, how each mixes tokens, and what it cannot do.

Everything here asks the model or its config; nothing is a table of architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyvte.runtime.compat import PreTrainedConfig, layer_types

VISUAL_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
DECODER_NAMES = ("language_model", "text_model", "llm", "decoder", "model")
LINEAR = ("linear_attention", "conv", "mamba", "short_conv")


@dataclass(frozen=True)
class LayerKind:
    """How a decoder layer mixes tokens.

    Attributes:
        name: "full_attention", "sliding_attention", "chunked_attention", "linear_attention" (any recurrent or
            convolutional layer), or "tokenwise" (none at all).
        span: tokens of the window or chunk.
    """

    name: str
    span: int | None = None

    @property
    def attends(self) -> bool:
        return self.name not in ("linear_attention", "tokenwise")

    def reaches(self, query: torch.Tensor, key: torch.Tensor, start: torch.Tensor | int) -> torch.Tensor | None:
        """Which keys lie in the span of a query, by their columns in the full sequence; None: all before it.

        Args:
            query: long, columns of the queries.
            key: long, columns of the keys; broadcasts with ``query``.
            start: the first column that is not padding, from which chunks are counted.
        """
        if self.name == "sliding_attention" and self.span is not None:
            return key > query - self.span
        if self.name == "chunked_attention":
            return (key - start) // self.span == (query - start) // self.span
        return None


@dataclass(frozen=True)
class DecoderSpec:
    """A model, as the engine needs to know it.

    Attributes:
        model: whose ``forward`` runs, inside any wrapper.
        decoder: the module that owns the decoder layers.
        config: of the decoder.
        kinds: one per layer.
        first: how many layers must see all visual tokens, since the model adds features to them there (deepstack).
    """

    model: nn.Module
    decoder: nn.Module
    config: PreTrainedConfig
    kinds: tuple[LayerKind, ...]
    first: int

    @classmethod
    def of(cls, model: nn.Module, decoder: str | nn.Module | None = None) -> DecoderSpec:
        """Reads a model.

        Raises:
            TypeError: not a module.
            ValueError: tokens cannot be taken out of this model, or its decoder is not found; says why.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, not {type(model).__name__}: pass the loaded model itself")
        outer, model = model, underlying_model(model)
        config = getattr(model, "config", None)
        if any(getattr(c, "is_encoder_decoder", False) for c in (config, getattr(config, "text_config", None))):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder: its decoder holds no visual tokens, but sees the "
                "encoder's through cross attention. Use it without the exit"
            )
        decoder = find_decoder(model, decoder)
        own = getattr(decoder, "config", None) or config
        if own is None:
            raise ValueError(
                f"neither {type(model).__name__} nor its decoder has a config, which says how layers attend: "
                "pass the model itself, not a wrapper, or set .config on it"
            )
        _refuse_compiled(outer, model, decoder)
        kinds = layer_kinds(own, len(decoder.layers))
        spans = any(kind.span is not None for kind in kinds)
        if spans and "flash" in str(own._attn_implementation):
            raise ValueError(
                "flash attention counts the window of sliding layers in cached places, which shift once visual tokens "
                "are gone: load the model with attn_implementation='sdpa' or 'eager'"
            )
        return cls(model, decoder, own, kinds, smallest_exit(model, decoder))

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def min_layer(self) -> int:
        """The smallest exit layer."""
        return max(self.first, 1)


def underlying_model(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` runs: inside the wrappers of peft, DeepSpeed and data parallelism."""
    while True:
        inner = model._modules.get("module")  # engines forward attributes, so hasattr() would not tell
        if isinstance(inner, nn.Module):
            model = inner
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def override(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of this module alone; returns what puts back the one that it had, or its class's."""
    own = vars(module).get(name)
    setattr(module, name, value)

    def restore() -> None:
        if own is None:
            vars(module).pop(name, None)
        else:
            setattr(module, name, own)

    return restore


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
    for index, layer in enumerate(decoder.layers):
        if "cross_attention_states" in inspect.signature(layer.forward).parameters:
            raise ValueError(
                f"decoder layer {index} of {type(decoder).__name__} sees images through cross attention, so there are "
                "no visual tokens to withdraw: use the model without the exit"
            )
    return decoder


def _refuse_compiled(*modules: nn.Module) -> None:
    modules = (*modules, *modules[-1].layers)
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        raise ValueError(
            "a compiled model cannot drop tokens between its layers: attach to the model as it was before "
            "torch.compile() (its _orig_mod)"
        )


def layer_kinds(config: PreTrainedConfig, num_layers: int) -> tuple[LayerKind, ...]:
    """How every decoder layer mixes tokens.

    Raises:
        ValueError: a layer is of a kind from which tokens cannot be withdrawn.
    """
    kinds = []
    for index, (name, span) in enumerate(layer_types(config)[:num_layers]):
        if name in LINEAR:
            kinds.append(LayerKind("linear_attention"))
        elif name in ("full_attention", "sliding_attention", "chunked_attention"):
            kinds.append(LayerKind(name, span))
        else:
            why = {"dummy": "it has no keys and values of its own"}.get(name, "it is not known how it mixes tokens")
            raise ValueError(
                f"decoder layer {index} is a {name!r} layer, and visual tokens cannot be withdrawn from it: {why}. "
                "Use a model whose decoder layers are full, sliding, chunked or linear attention"
            )
    return tuple(kinds + [LayerKind("full_attention")] * (num_layers - len(kinds)))


def smallest_exit(model: nn.Module, decoder: nn.Module) -> int:
    """How many layers must see all visual tokens: some decoders add features to them after their first layers.

    Raises:
        ValueError: the decoder takes such features, but the config does not say for which layers.
    """
    config = getattr(model, "config", None)
    configs = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))] if config is not None else []
    for found in configs:
        indexes = getattr(found, "deepstack_visual_indexes", None)  # as many layers, from the first on
        if indexes is not None:
            return len(indexes)
        pairs = getattr(found, "deepstack_layer_map", None)  # (layer of the vision tower, decoder layer)
        if pairs is not None:
            more = getattr(found, "spatial_target_layers", None) or ()
            return max([layer for _, layer in pairs] + list(more)) + 1
    takes = [name for name in inspect.signature(decoder.forward).parameters if name.startswith("deepstack")]
    if takes:
        raise ValueError(
            f"{type(decoder).__name__} takes {takes[0]}, features for visual tokens of some layers, but the config "
            "does not say which (deepstack_visual_indexes): exits before the last of them would be wrong. Add it"
        )
    return 0


def visual_token_ids(model: nn.Module) -> list[int]:
    """The ids that stand for visual tokens in ``input_ids``, as the model's config names them (images and videos).

    Raises:
        ValueError: the config names none.
    """
    config = getattr(model, "config", None)
    ids = {getattr(config, name, None) for name in VISUAL_ID_NAMES}
    ids = sorted(i for i in ids if isinstance(i, int) and i >= 0)
    if not ids:
        raise ValueError(
            f"the config of {type(model).__name__} names no visual token id ({', '.join(VISUAL_ID_NAMES)}): "
            "pass visual_mask, a bool tensor [batch, sequence] that is True at the visual tokens"
        )
    return ids


def visual_tokens(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Where the visual tokens are: ids [batch, sequence] -> bool of that shape.

    Raises:
        ValueError: the config names no visual token id.
    """
    return torch.isin(input_ids, torch.tensor(visual_token_ids(model), device=input_ids.device))
