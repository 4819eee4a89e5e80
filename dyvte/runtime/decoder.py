"""What is true of a model: where its decoder layers are, how each mixes tokens, and what it cannot do.

Everything here asks the model or its config; nothing is a table of architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from dyvte.runtime.arguments import SHARED_STATES, argument_names
from dyvte.runtime.compat import PreTrainedConfig
from dyvte.runtime.kinds import LayerKind, layer_kinds
from dyvte.runtime.locate import find_decoder, underlying_model

VISUAL_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class DecoderSpec:
    """A model, as the engine needs to know it.

    Attributes:
        model: whose ``forward`` runs, inside any wrapper.
        decoder: the module that owns the decoder layers.
        config: of the decoder.
        kinds: one per layer.
        first: how many layers must see all visual tokens, since the model adds features to them there (deepstack).
        stream: which of the states that every token has is the one to be read, where layers work on several at once,
            [streams, batch, sequence, d] (Gemma 3n); None: there is one, [batch, sequence, d].
    """

    model: nn.Module
    decoder: nn.Module
    config: PreTrainedConfig
    kinds: tuple[LayerKind, ...]
    first: int
    stream: int | None = None

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
        for index, kind in enumerate(kinds):
            if kind.source is not None and SHARED_STATES not in argument_names(decoder.layers[index]):
                raise ValueError(
                    f"decoder layer {index} looks up the keys of layer {kind.source} in the cache, by their columns, "
                    "which shift once visual tokens are gone: use a newer transformers, whose layers hand them on"
                )
        spec = cls(model, decoder, own, kinds, smallest_exit(model, decoder), getattr(own, "altup_active_idx", None))
        if spec.num_layers > 1 and spec.min_layer > spec.largest:
            raise ValueError(
                f"layers of {type(decoder).__name__} read the keys of layer {spec.largest}, which sees the visual "
                f"tokens that its first {spec.min_layer} layers need: use the model without the exit"
            )
        return spec

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

    @property
    def largest(self) -> int:
        """The largest exit layer before L, never.

        Keys and values that later layers read again must be those of the text, so visual tokens leave before the first
        layer that writes such, or never.
        """
        return min([kind.source for kind in self.kinds if kind.source is not None], default=self.num_layers - 1)

    def check_largest(self, layers: Collection[int]) -> None:
        """Raises ``ValueError`` if tokens are to leave after more layers than :attr:`largest`, and not never."""
        late = [layer for layer in layers if self.largest < layer < self.num_layers]
        if late:
            raise ValueError(
                f"{late[0]} layers are too late to leave {type(self.model).__name__}: later layers read the keys and "
                f"values of layer {self.largest} (from 0), which must be those of the text by then. Choose "
                f"{self.min_layer} ... {self.largest}, or {self.num_layers} for never"
            )

    @property
    def longest(self) -> int | None:
        """Columns after which the decoder takes the row of a query for its position (Llama 4); None: it never does."""
        tunes = getattr(self.config, "attn_temperature_tuning", False)
        return int(self.config.floor_scale) - 1 if tunes else None

    @property
    def exits(self) -> range:
        """The exit layers that the model allows, L left out."""
        return range(self.min_layer, self.largest + 1)

    def by_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """States as the layers have them, with batch and sequence first: [batch, sequence, (streams,) d]."""
        return hidden if self.stream is None else hidden.movedim(0, 2)

    def by_layers(self, hidden: torch.Tensor) -> torch.Tensor:
        """The opposite of :meth:`by_rows`."""
        return hidden if self.stream is None else hidden.movedim(2, 0)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states to be read, of those from :meth:`by_rows`: [batch, sequence, d]."""
        return hidden if self.stream is None else hidden[:, :, self.stream]


def _refuse_compiled(*modules: nn.Module) -> None:
    modules = (*modules, *modules[-1].layers)
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        raise ValueError(
            "a compiled model cannot drop tokens between its layers: attach to the model as it was before "
            "torch.compile() (its _orig_mod)"
        )


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
