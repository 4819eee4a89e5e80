"""The form of heads that dyvte trains: a norm per layer, then one narrow trunk for all layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.heads.config import ExitHeadsConfig


class SharedHead(nn.Module):
    """A LayerNorm per layer, then one projection, a layer embedding and a small MLP that all layers share."""

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, size, width = config.num_layers, config.hidden_size, config.width
        self.size = size
        self.norm_weight = nn.Parameter(torch.ones(layers, 2 * size))
        self.norm_bias = nn.Parameter(torch.zeros(layers, 2 * size))
        self.project = nn.Linear(2 * size, width)
        self.layer = nn.Parameter(torch.zeros(layers, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def features(self, state: torch.Tensor, layers: slice) -> torch.Tensor:
        """[..., layers, 2d] -> [..., layers, width], linear in the normalised state."""
        # The two halves are normalised apart: a mean over tokens is shorter than the state of one token.
        halves = state.unflatten(-1, (2, self.size))
        normal = F.layer_norm(halves, (self.size,)).flatten(-2)
        return self.project(torch.addcmul(self.norm_bias[layers], normal, self.norm_weight[layers]))

    def decide(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        """[..., layers, width] -> logits [..., layers]."""
        return self.out(F.gelu(self.hidden(F.gelu(features + self.layer[layers])))).squeeze(-1)
