"""Feed-forward networks that work with some of their neurons for some of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.edits import LayerEdit, ffn_module
from dyvte.runtime.view import LayerView


@dataclass(frozen=True)
class FeedForward:
    """The parts of a feed-forward network, ``down(act(gate x) * up x)`` or ``down(act(gate x))``.

    Attributes:
        gate, up, down: linear layers; up None: no gating.
        act: the activation.
    """

    gate: nn.Linear
    up: nn.Linear | None
    down: nn.Linear
    act: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> FeedForward:
        """From a module as transformers writes them.

        Raises:
            ValueError: its neurons cannot be told apart: fused projections, experts, adapters on its weights.
        """
        act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
        for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("fc1", None, "fc2")):
            parts = [getattr(module, name, None) for name in (gate, up, down) if name is not None]
            if callable(act) and all(type(part) is nn.Linear for part in parts):
                return cls(parts[0], parts[1] if up is not None else None, parts[-1], act)
        raise ValueError(
            f"{type(module).__name__} does not show single neurons (plain gate_proj, up_proj, down_proj or fc1, fc2 "
            "with their activation): merge adapters into their weights, or choose another method"
        )

    def __call__(self, states: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """With some neurons only: [..., d] -> [..., d].

        Args:
            neurons: long [k].
        """

        def part(linear: nn.Linear) -> torch.Tensor:
            bias = None if linear.bias is None else linear.bias[neurons]
            return F.linear(states, linear.weight[neurons], bias)

        inner = self.act(part(self.gate))
        if self.up is not None:
            inner = inner * part(self.up)
        return F.linear(inner, self.down.weight[:, neurons], self.down.bias)


def by_rows(
    states: torch.Tensor,
    rows: torch.Tensor,
    others: Callable[[torch.Tensor], torch.Tensor],
    marked: Callable[[int, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Tokens computed in one of two ways, each only where it counts: [n, width, d].

    Args:
        rows: bool [n, width], the marked tokens.
        others: [1, tokens, d] -> same, for all that are not.
        marked: (sample, [tokens, d]) -> same; None: they get zeros.
    """
    out = torch.zeros_like(states)
    rows = rows.to(states.device)
    if not bool(rows.all()):
        out[~rows] = others(states[~rows][None])[0]
    for sample, own in enumerate(rows.unbind() if marked is not None else ()):
        if bool(own.any()):
            out[sample, own] = marked(sample, states[sample, own])
    return out


class NeuronEdit(LayerEdit):
    """Visual tokens use some neurons of the FFN; the others are really not computed for them."""

    def neurons(self, view: LayerView, parts: FeedForward, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """For each sample the neurons that its visual tokens use, long [k].

        Args:
            states: [n, width, d], what the FFN gets.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define neurons()")

    def check(self, spec: DecoderSpec) -> None:
        super().check(spec)
        for index, layer in enumerate(spec.layers):
            if self.edited is None or index in self.edited:
                FeedForward.of(ffn_module(layer))

    def ffn(self, view: LayerView, ffn: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        parts = FeedForward.of(ffn_module(view.spec.layers[view.layer]))
        used = self.neurons(view, parts, states)
        return by_rows(states, view.visual, ffn, lambda sample, own: parts(own, used[sample]))
