"""The guard: samples unlike those of training do not exit, since no promise covers them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dyvte.heads.config import ExitHeadsConfig

ALL_LAYERS = slice(None)


class Guard(nn.Module):
    """Knows which samples are like those of training, by Mahalanobis distances.

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
        return self._distance(features, layers) > self.radius[layers]

    def unusual_image(self, visual: torch.Tensor) -> torch.Tensor:
        """Mean visual tokens: [n, hidden size] -> bool [n]."""
        return self._image_distance(visual) > self.image_radius

    def _distance(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        apart = features - self.mean[layers]
        return torch.einsum("lvw,...lw->...lv", self.whiten[layers], apart).square().sum(-1)

    def _image_distance(self, visual: torch.Tensor) -> torch.Tensor:
        return ((visual - self.image_mean) @ self.image_whiten.T).square().sum(-1)

    @torch.no_grad()
    def fit(self, training: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], quantile: float) -> None:
        """Mean and spread from one set of samples, the radii that keep ``quantile`` of another.

        Args:
            training, held_out: the heads' features [n, L, width] and the mean visual tokens [n, hidden size].
        """
        features, visual = training
        for i in range(features.shape[1]):
            self.mean[i], self.whiten[i] = _whitening(features[:, i], features.shape[2])
        self.radius.copy_(self._distance(held_out[0], ALL_LAYERS).quantile(quantile, 0))
        mean, whiten = _whitening(visual, len(self.image_whiten))
        self.image_mean.copy_(mean)
        self.image_whiten.copy_(whiten)
        self.image_radius.copy_(self._image_distance(held_out[1]).quantile(quantile))


def _whitening(samples: torch.Tensor, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and the map [directions, d] to principal directions of variance one, of samples [n, d]."""
    mean = samples.mean(0)
    apart = (samples - mean).double()
    variance, basis = torch.linalg.eigh(apart.T @ apart / len(samples))
    # A little of the mean variance everywhere: a direction never seen in training must not count as infinite.
    scale = (variance.clamp(min=0) + 1e-3 * variance.mean()).rsqrt()
    return mean, (basis * scale).T.flip(0)[:directions].to(samples.dtype)
