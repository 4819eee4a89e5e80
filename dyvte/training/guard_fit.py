"""Fitting the guard: which text states and images are usual, learned from samples on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dyvte.heads import ExitHeads
from dyvte.heads.guard import ALL_LAYERS
from dyvte.training.parallel import Group

Parts = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


@torch.no_grad()
def fit_guard(heads: ExitHeads, training: Parts, validation: Parts, group: Group | None = None) -> None:
    """Mean and spread from one set of samples, the radii that keep ``heads.config.guard`` of another.

    Args:
        training, validation: give this rank's samples part by part, as often as they are called: text states
            [n, L, 2d] and mean visual tokens [n, d].
    """
    group, guard = group or Group(), heads.guard
    heads.to(group.device).eval()

    def parts(of: Parts) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for state, visual in of():
            yield heads.features(state.to(group.device)), visual.to(group.device).float()

    features, images = _Spread(guard.mean), _Spread(guard.image_mean[None])
    with group.together():
        for part, visual in parts(training):
            features.add_to_mean(part.transpose(0, 1))
            images.add_to_mean(visual[None])
    for spread in (features, images):
        spread.share_mean(group)
    with group.together():
        for part, visual in parts(training):
            features.add_to_variance(part.transpose(0, 1))
            images.add_to_variance(visual[None])
    for spread in (features, images):
        spread.share_variance(group)
    for i in range(len(guard.mean)):
        guard.mean[i], guard.whiten[i] = features.mean(i), features.whitening(i)
    guard.image_mean.copy_(images.mean(0))
    guard.image_whiten.copy_(images.directions(0, len(guard.image_whiten)))
    with group.together():
        distances = [(guard.distance(p, ALL_LAYERS).cpu(), guard.image_distance(v).cpu()) for p, v in parts(validation)]
    distances = [part for some in group.gather(distances) for part in some]
    for radius, part in zip((guard.radius, guard.image_radius), zip(*distances)):
        radius.copy_(torch.cat(part).quantile(heads.config.guard, 0))
    heads.cpu()


class _Spread:
    """Mean and covariance of vectors that come in parts [groups, n, d], all of them twice.

    Args:
        like: [groups, d]
    """

    def __init__(self, like: torch.Tensor):
        self.count, self.total = torch.zeros((), dtype=torch.double), torch.zeros_like(like, dtype=torch.double)
        self.products = self.total.new_zeros(*like.shape, like.shape[-1])

    def add_to_mean(self, part: torch.Tensor) -> None:
        self.count += part.shape[1]
        self.total += part.double().sum(1)

    def share_mean(self, group: Group) -> None:
        self.count, self.total = group.sum(self.count), group.sum(self.total)

    def add_to_variance(self, part: torch.Tensor) -> None:
        apart = part.double() - (self.total / self.count)[:, None]
        self.products += apart.transpose(1, 2) @ apart

    def share_variance(self, group: Group) -> None:
        self.products = group.sum(self.products)

    def mean(self, group: int) -> torch.Tensor:
        """[d]"""
        return (self.total[group] / self.count).float()

    def whitening(self, group: int) -> torch.Tensor:
        """The symmetric map [d, d] to variance one: it alone does not turn with the last bit of the sums."""
        basis, scale = self._principal(group)
        return (basis * scale @ basis.T).float()

    def directions(self, group: int, count: int) -> torch.Tensor:
        """The map [count, d] to the first principal directions, of variance one."""
        basis, scale = self._principal(group)
        strongest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return (basis * scale * strongest.sign()).T.flip(0)[:count].float()

    def _principal(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        variance, basis = torch.linalg.eigh(self.products[group] / self.count)
        # A little of the mean variance everywhere: a direction never seen in training must not count as infinite.
        return basis, (variance.clamp(min=0) + 1e-3 * variance.mean()).rsqrt()
