"""The guard: samples unlike those of training do not exit, since no promise covers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dyvte.heads.config import ExitHeadsConfig

ALL_LAYERS = slice(None)
Parts = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


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
    def fit(self, training: Parts, held_out: Parts, quantile: float) -> None:
        """Mean and spread from one set of samples, the radii that keep ``quantile`` of another.

        Args:
            training, held_out: give the samples part by part, as often as they are called: the heads' features
                [n, L, width] and the mean visual tokens [n, hidden size].
        """
        features, images = _Spread(), _Spread()
        for part, visual in training():
            features.add_to_mean(part.transpose(0, 1))
            images.add_to_mean(visual[None])
        for part, visual in training():
            features.add_to_variance(part.transpose(0, 1))
            images.add_to_variance(visual[None])
        for i in range(len(self.mean)):
            self.mean[i], self.whiten[i] = features.whitening(i, self.mean.shape[1])
        mean, whiten = images.whitening(0, len(self.image_whiten))
        self.image_mean.copy_(mean)
        self.image_whiten.copy_(whiten)
        far = [(self._distance(part, ALL_LAYERS), self._image_distance(visual)) for part, visual in held_out()]
        distance, image_distance = map(torch.cat, zip(*far))
        self.radius.copy_(distance.quantile(quantile, 0))
        self.image_radius.copy_(image_distance.quantile(quantile))


class _Spread:
    """Mean and covariance of vectors that come in parts [groups, n, d], all of them twice."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add_to_mean(self, part: torch.Tensor) -> None:
        self.count += part.shape[1]
        self.total = self.total + part.double().sum(1)

    def add_to_variance(self, part: torch.Tensor) -> None:
        apart = part.double() - (self.total / self.count)[:, None]
        self.products = self.products + apart.transpose(1, 2) @ apart

    def whitening(self, group: int, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [d] and the map [directions, d] to principal directions of variance one."""
        variance, basis = torch.linalg.eigh(self.products[group] / self.count)
        # A little of the mean variance everywhere: a direction never seen in training must not count as infinite.
        scale = (variance.clamp(min=0) + 1e-3 * variance.mean()).rsqrt()
        return (self.total[group] / self.count).float(), (basis * scale).T.flip(0)[:directions].float()
