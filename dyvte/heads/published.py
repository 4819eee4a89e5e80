"""The form DyVTE published (arXiv 2411.19628), and the gates that its code trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.heads.config import ExitHeadsConfig

GATE_KEY = "model.visual_gates_router.{layer}.{name}.weight"


class PublishedHead(nn.Module):
    """Per layer w2(GELU(w1 x)), w1 [width, 2d], w2 [2, width], without biases; the logit is logit 1 - logit 0."""

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, size, width = config.num_layers, config.hidden_size, config.width
        self.w1 = nn.Parameter(torch.empty(layers, width, 2 * size))
        self.w2 = nn.Parameter(torch.empty(layers, 2, width))
        for weight in (self.w1, self.w2):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def features(self, state: torch.Tensor, layers: slice) -> torch.Tensor:
        """[..., layers, 2d] -> [..., layers, width]."""
        return torch.einsum("...ld,lwd->...lw", state, self.w1[layers])

    def decide(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        """[..., layers, width] -> logits [..., layers]."""
        logits = torch.einsum("...lw,low->...lo", F.gelu(features), self.w2[layers])
        return logits[..., 1] - logits[..., 0]


def read_gates(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a :class:`PublishedHead` from a state dict of the original code.

    Returns:
        ``w1`` [L, width, 2d] and ``w2`` [L, 2, width], float32; gate i decides exit layer i + 1.

    Raises:
        ValueError: gates are missing or differ in shape.
    """
    layers = 0
    while GATE_KEY.format(layer=layers, name="w1") in state_dict:
        layers += 1
    names = [GATE_KEY.format(layer=i, name=name) for i in range(layers) for name in ("w1", "w2")]
    missing = [name for name in names if name not in state_dict]
    if layers == 0 or missing:
        missing = missing or [GATE_KEY.format(layer=0, name="w1")]
        raise ValueError(
            f"the gates of the original code are missing: {', '.join(missing)}; "
            "pass the state dict that its training saved"
        )
    w1, w2 = ([state_dict[GATE_KEY.format(layer=i, name=name)].float() for i in range(layers)] for name in ("w1", "w2"))
    width, size = w1[0].shape
    for i in range(layers):
        if w1[i].shape != (width, size) or w2[i].shape != (2, width) or size % 2:
            raise ValueError(
                f"gate {i} has shapes {list(w1[i].shape)} and {list(w2[i].shape)}; expected w1 [width, 2d] and "
                f"w2 [2, width], the same in every layer"
            )
    return {"w1": torch.stack(w1), "w2": torch.stack(w2)}
