"""The guard: samples unlike those of training do not exit, since no promise covers them."""

from __future__ import annotations

import math

import torch
from torch import nn

from dyvte.heads.config import ExitHeadsConfig

ALL_LAYERS = slice(None)


class Guard(nn.Module):
    """Knows which samples are like those of training, by Mahalanobis distances; fitted by ``dyvte.training.guard_fit``.

    Two of them: of the text state after each layer, in the heads' features, which tells unusual questions; and of the
    mean visual token before the first layer, in its principal directions, which tells unusual images.
    """

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, width, size = config.num_layers, config.width, config.hidden_size

        def fixed(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value), requires_grad=False)

        self.mean, self.whiten = fixed(layers, width), fixed(layers, width, width)
        self.radius = fixed(layers, value=math.inf)
        self.image_mean, self.image_whiten = fixed(size), fixed(min(size, width), size)
        self.image_radius = fixed(1, value=math.inf)

    def unusual(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        """Text states of some layers, as the heads' features: [..., layers, width] -> bool [..., layers]."""
        return self.distance(features, layers) > self.radius[layers]

    def unusual_image(self, visual: torch.Tensor) -> torch.Tensor:
        """Mean visual tokens: [n, hidden size] -> bool [n]."""
        return self.image_distance(visual) > self.image_radius

    def distance(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        """Squared distances from the mean text state: [..., layers, width] -> [..., layers]."""
        apart = features - self.mean[layers]
        return torch.einsum("lvw,...lw->...lv", self.whiten[layers], apart).square().sum(-1)

    def image_distance(self, visual: torch.Tensor) -> torch.Tensor:
        """Squared distances from the mean image: [n, hidden size] -> [n]."""
        return ((visual - self.image_mean) @ self.image_whiten.T).square().sum(-1)
