"""EAS on a running model: see :mod:`dyvte.methods.eas` for what its adapters compute."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import nn

from dyvte.identity import model_fingerprint
from dyvte.methods.eas import Adapter, Context
from dyvte.methods.eas_adapters import EASAdapters
from dyvte.runtime.adaptation import Adaptation, Memory
from dyvte.runtime.decoder import DecoderSpec


class EAS(Adaptation):
    """Adapters stand for the attention of some layers, for all tokens, and before the attention of others.

    A skipped attention is not computed, and its layer keeps no keys. What adapters take from a prompt is averaged over
    its tokens that are still there at the layer, padding and answers left out (with an exit on top: those that have not
    left), and kept while decoding. The adapters follow the model to its device.

    Folded, the adapters cost nothing per token: every prompt gets projections of its own (gate and up behind a skipped
    attention, query, key and value behind the others), which cost their memory once for each sample of the batch. That
    pays for long answers and small batches.

    Args:
        adapters: trained ones, or the folder of their checkpoint.
        fold: whether to fold them.
        skipped: the layers whose attention is skipped, all of which have such adapters; None: all of these.
        other_weights: use them on a model whose weights are not those they were trained on.

    Raises:
        ValueError: there are no such adapters. On attaching: another model, layers that cannot be adapted, or
            projections that cannot be folded into.
    """

    def __init__(
        self,
        adapters: EASAdapters | str | os.PathLike,
        fold: bool = False,
        skipped: Collection[int] | None = None,
        other_weights: bool = False,
    ):
        self.adapters = adapters if isinstance(adapters, EASAdapters) else EASAdapters.load(adapters)
        config = self.adapters.config
        self.skipped = tuple(sorted(config.skipped if skipped is None else skipped))
        self.adapted = tuple(layer for layer in config.adapted if layer not in self.skipped)
        if not set(self.skipped) <= set(config.skipped):
            raise ValueError(f"there are adapters for skipped attentions {config.skipped} only, not {self.skipped}")
        self.folded, self.other_weights = fold, other_weights

    def check(self, spec: DecoderSpec) -> None:
        config, identity = self.adapters.config, self.adapters.config.identity or {}
        if (spec.num_layers, spec.config.hidden_size) != (config.num_layers, config.hidden_size):
            raise ValueError(
                f"these adapters fit a decoder of {config.num_layers} layers, {config.hidden_size} wide "
                f"({config.base_model or 'base model not recorded'}); this model has {spec.num_layers} layers, "
                f"{spec.config.hidden_size} wide: train some for it with train/eas.py"
            )
        if "weights" in identity and not self.other_weights:
            weights = model_fingerprint(spec.model)
            if weights != identity["weights"]:
                raise ValueError(
                    f"these adapters were trained on other weights ({config.base_model} in {identity.get('dtype')}, "
                    f"{identity['weights'][:12]}) than this model's ({weights[:12]}): load that model in that dtype, "
                    "with the same peft adapter, or train some for it. EAS(..., other_weights=True) uses them all the "
                    "same"
                )
        super().check(spec)

    def remember(self, layer: int, states: torch.Tensor, mask: torch.Tensor) -> Memory:
        context = self._adapter(layer, states).context(states, mask)
        return {name: value for name, value in context._asdict().items() if value is not None}

    def adapt(self, layer: int, states: torch.Tensor, memory: Memory) -> torch.Tensor:
        return self._adapter(layer, states)(states, context=_context(memory))

    def fold(
        self, layer: int, memory: Memory, linear: nn.Linear, gain: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._adapter(layer, linear.weight).fold(linear.weight, _context(memory), gain, linear.bias)

    def _adapter(self, layer: int, like: torch.Tensor) -> Adapter:
        kind = self.adapters.skipped if layer in self.skipped else self.adapters.adapted
        return kind[str(layer)].to(like.device)


def _context(memory: Memory) -> Context:
    return Context(memory["weights"], memory.get("pooled"))
