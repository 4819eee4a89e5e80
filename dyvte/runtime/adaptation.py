"""What a method is that puts something in place of the attention of a layer, or before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.edits import attention_module, ffn_module
from dyvte.runtime.feed_forward import FeedForward
from dyvte.runtime.kinds import LayerKind
from dyvte.runtime.reduction import Reduction

Memory = dict[str, torch.Tensor]  # of a layer, each with one row per sample
NORMS = {"input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Adaptation(Reduction):
    """A method that does without the attention of some layers, or changes what attentions get.

    Attributes:
        skipped: the layers without attention. They keep no keys, and their FFN gets ``adapt(...)`` times the weight of
            the norm before it, which is not applied; for all tokens, in prompts and answers.
        adapted: the layers whose attention gets ``adapt(...)``.
        folded: whether :meth:`fold` changes the projections behind the adapter instead.
    """

    layers: Collection[int] = ()  # takes no token away
    skipped: Collection[int] = ()
    adapted: Collection[int] = ()
    folded: bool = False

    def remember(self, layer: int, states: torch.Tensor, mask: torch.Tensor) -> Memory:
        """What is taken from the prompt.

        Args:
            states: [n, width, d], after the layer's input norm.
            mask: bool [n, width], the tokens of the prompt that are still there.
        """
        raise NotImplementedError

    def adapt(self, layer: int, states: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Other states after the input norm: [n, width, d]."""
        raise NotImplementedError

    def fold(
        self, layer: int, memory: Memory, linear: nn.Linear, gain: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection that adapts as well: weight [n, out, d] and bias [n, out].

        Args:
            gain: what is multiplied with before the projection; None: nothing.
        """
        raise NotImplementedError

    def check(self, spec: DecoderSpec) -> None:
        name = type(self).__name__
        for layer in sorted({*self.skipped, *self.adapted}):
            check_layer(name, spec, layer, layer in self.skipped)
            if self.folded:
                projections_behind(spec.layers[layer], layer in self.skipped)


def check_layer(name: str, spec: DecoderSpec, layer: int, skipped: bool) -> None:
    """Raises ``ValueError`` if a layer cannot be adapted, or its attention not be skipped.

    Args:
        name: who would do so.
    """
    if not 0 <= layer < spec.num_layers:
        raise ValueError(f"{name} adapts layer {layer}, but the model has layers 0 ... {spec.num_layers - 1}")
    kind = spec.kinds[layer]
    shared = kind.source is not None or any(other.source == layer for other in spec.kinds)
    if spec.stream is not None or not kind.attends or shared:
        raise ValueError(
            f"{name} cannot adapt layer {layer} of {type(spec.decoder).__name__}, which has no attention, shares its "
            "keys with other layers, or works on several states of a token: leave it out"
        )
    if skipped and spec.kinds.index(kind) == layer:
        raise ValueError(
            f"{name} cannot skip the attention of layer {layer}, the first of its kind: the length of the cache is "
            "read there. Skip later ones"
        )
    if skipped:
        _check_block(name, layer, spec.layers[layer])


def without_skipped(spec: DecoderSpec, parts: Sequence[Reduction]) -> DecoderSpec:
    """The model as a method leaves it: layers whose attention is skipped mix no tokens and keep no keys."""
    skipped = {layer for part in parts if isinstance(part, Adaptation) for layer in part.skipped}
    if not skipped:
        return spec
    kinds = [LayerKind("tokenwise") if layer in skipped else kind for layer, kind in enumerate(spec.kinds)]
    return replace(spec, kinds=tuple(kinds))


def _check_block(name: str, layer: int, block: nn.Module) -> None:
    """Raises ``ValueError`` if the FFN of a layer would not get what it does without attention."""
    attention, ffn = attention_module(block), ffn_module(block)
    children = {child for child, module in block.named_children() if next(module.parameters(), None) is not None}
    others = {child for child in children if getattr(block, child) not in (attention, ffn)}
    weight = getattr(getattr(block, "post_attention_layernorm", None), "weight", None)
    if others != NORMS or weight is None or weight.ndim != 1:
        raise ValueError(
            f"{name} cannot skip the attention of layer {layer}: it needs a layer of input_layernorm, attention, "
            f"post_attention_layernorm and FFN, and {type(block).__name__} has {', '.join(sorted(children))}"
        )
    if weight.is_meta or hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        raise ValueError(
            f"the weights of layer {layer} are not here as a whole, and {name} needs the norm before its FFN: load the "
            "model with shard=none, without offloading"
        )
    ones = torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        normed = block.post_attention_layernorm(ones)[0, 0]
    if not torch.allclose(normed, weight, rtol=0.02, atol=1e-3):
        raise ValueError(
            f"{name} cannot skip the attention of layer {layer}: the norm before its FFN is not "
            "an RMSNorm that multiplies with its weight"
        )


def projections_behind(block: nn.Module, skipped: bool) -> dict[str, nn.Linear]:
    """The projections behind an adapter.

    Raises:
        ValueError: they are not plain linear layers.
    """
    if skipped:
        parts = FeedForward.of(ffn_module(block))
        return {name: part for name, part in (("gate", parts.gate), ("up", parts.up)) if part is not None}
    attention = attention_module(block)
    found = {name: getattr(attention, name, None) for name in PROJECTIONS}
    if any(type(part) is not nn.Linear for part in found.values()):
        raise ValueError(
            f"adapters fold into plain {', '.join(PROJECTIONS)}, which {type(attention).__name__} does not have: merge "
            "peft adapters into the weights, or use it unfolded (fold=False)"
        )
    return found
