"""EAS (arXiv 2403.15226): attentions that a task does not need, found by a bandit, replaced by small adapters.

Confirmed by the public code (DoubtedSteam/EAS). A layer without attention is, for all tokens,

    x + MLP(adapter(norm(x)) * gain)

where ``norm`` is the layer's input norm and ``gain`` the weight of the norm before its MLP, which is not applied.
The adapter stands for attention and its residual. A layer with attention has an adapter of the other kind between its
input norm and its attention. For inference both can be folded into the projections that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Context(NamedTuple):
    """What an adapter takes from the prompt and keeps while decoding.

    Attributes:
        weights: [n, 2], the router's.
        pooled: [n, hidden], the mean of A x over the prompt; None for an adapter of a kept attention.
    """

    weights: torch.Tensor
    pooled: torch.Tensor | None


class Adapter(nn.Module):
    """The propagation-of-information adapter for a skipped attention, or the one before a kept attention.

    Skipped: u = (c + C x) / 2 with c the mean of A x over the prompt. Kept: u = A x. Both: x + s (w0 B u + w1 D u) with
    w = softmax(router(mean of x over the prompt) / t). B and D work in groups and start at zero, so that an adapter
    starts as the identity (as LaVIN's does; LLaVA's for skipped attentions starts at random). Names and shapes of the
    parameters are the original's, so its checkpoints load. (LLaVA's router before a kept attention has no bias; with
    ``strict=False`` it stays zero here.)

    Args:
        width: of the model.
        hidden: of the adapter; 128 for LLaVA-1.5-7B.
        groups: of B and D; divides both widths.
        temperature: t.
        scale: s.
        kept: whether it stands before a kept attention.
        dropout: of u, in training.

    Raises:
        ValueError: ``groups`` does not divide both widths.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        groups: int = 2,
        temperature: float = 10,
        scale: float = 1,
        kept: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        if width % groups or hidden % groups:
            raise ValueError(f"{groups} groups do not divide a width of {width} and a hidden width of {hidden}")
        self.temperature, self.scale, self.kept = temperature, scale, kept
        self.conv_A = nn.Conv1d(width, hidden, 1)
        self.conv_B = nn.Conv1d(hidden, width, 1, groups=groups)
        self.conv_D = nn.Conv1d(hidden, width, 1, groups=groups)
        self.conv_C = None if kept else nn.Conv1d(width, hidden, 1)
        self.expert_weights = nn.Linear(width, 2)
        self.dropout = nn.Dropout(dropout)
        for module in (self.conv_A, self.conv_C):
            if module is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (*self.conv_B.parameters(), *self.conv_D.parameters(), self.expert_weights.bias):
            nn.init.zeros_(parameter)

    def context(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Context:
        """What is taken from the prompt.

        Args:
            x: [n, s, width], the normed input of the layer.
            mask: bool [n, s], the prompt: no padding, in training no answer. None: all. The original averages over
                padding as well; nothing here does.
        """
        x = x.to(self.conv_A.weight.dtype)
        if mask is None:
            mean = x.mean(1)
        else:
            mean = torch.einsum("nsc,ns->nc", x, mask.to(x.dtype)) / mask.sum(1, keepdim=True)
        weights = (self.expert_weights(mean) / self.temperature).softmax(-1)
        return Context(weights, None if self.kept else self.conv_A(mean[..., None])[..., 0])

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, context: Context | None = None
    ) -> torch.Tensor:
        """Adapts the normed input of a layer, [n, s, width].

        Args:
            x: the prompt, or tokens decoded after it.
            mask: see :meth:`context`.
            context: of the prompt, for tokens after it; None: x is the prompt.
        """
        context = self.context(x, mask) if context is None else context
        down, offset = self._down(context)
        inner = self.dropout(F.linear(x.to(down.dtype), down) + offset[:, None]).transpose(1, 2)
        first, second = (self.scale * context.weights)[..., None, None].unbind(1)
        added = first * self.conv_B(inner) + second * self.conv_D(inner)
        return x + added.transpose(1, 2).to(x.dtype)

    def fold(
        self,
        weight: torch.Tensor,
        context: Context,
        gain: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection that does the adapter's work before its own, one for each sample, since contexts differ.

        ``linear(adapter(x) * gain)`` becomes ``x @ folded.T + bias``. For a skipped attention fold gate and up
        projection with the gain, for a kept one query, key and value without. The original takes the bias from weights
        that it has already folded, and folds them in place, so that a second prompt folds twice; here the bias comes
        from ``weight``, which is not changed.

        Args:
            weight: [out, width] of the projection.
            context: of the prompt.
            gain: [width]; None: 1.
            bias: [out] of the projection; None: none.

        Returns:
            weight [n, out, width] and bias [n, out]
        """
        down, offset = self._down(context)
        experts = (self.conv_B, self.conv_D)
        dense = torch.stack([torch.block_diag(*conv.weight[..., 0].chunk(conv.groups)) for conv in experts])
        mixture = self.scale * context.weights
        up = torch.einsum("ne,ech->nch", mixture, dense)
        start = mixture @ torch.stack([conv.bias for conv in experts])
        scaled = weight.to(down.dtype) if gain is None else weight.to(down.dtype) * gain.to(down.dtype)
        folded = scaled + scaled @ up @ down
        moved = (torch.einsum("nch,nh->nc", up, offset) + start) @ scaled.T
        moved = moved if bias is None else moved + bias
        return folded.to(weight.dtype), moved.to(weight.dtype)

    def _down(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """u as weight [hidden, width] and offset [n, hidden]."""
        if self.kept:
            return self.conv_A.weight[..., 0], self.conv_A.bias.expand(len(context.weights), -1)
        return self.conv_C.weight[..., 0] / 2, (self.conv_C.bias + context.pooled) / 2


def sharp_softmax(scores: torch.Tensor) -> torch.Tensor:
    """The probabilities of LaVIN's search; those of LLaVA's and METER's are the sigmoid."""
    return (10 * scores).softmax(-1)


def skip_count(step: int, warmup: int, count: int) -> int:
    """How many layers LLaVA's search skips in training step 1, 2, ...: all ``count`` after half of the warm-up."""
    return min(2 * count * step // warmup + 1, count)


def sample_layers(
    scores: torch.Tensor,
    count: int,
    sets: int = 1,
    probability: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Distinct sets of layers to skip, each drawn without replacement by the layers' probabilities.

    Args:
        scores: [layers].
        count: layers in a set.
        sets: how many; 5 in LLaVA's search, 3 in the others'.
        probability: of a layer, from the scores.
        generator: for a draw that can be repeated.

    Returns:
        long [sets, count], each set ascending

    Raises:
        ValueError: there are not so many sets, or the probabilities hardly ever give others.
    """
    if not 1 <= count <= len(scores) or math.comb(len(scores), count) < sets:
        raise ValueError(f"there are no {sets} different sets of {count} among {len(scores)} layers")
    weights, drawn = probability(scores), []
    for _ in range(1000 * sets):
        layers = torch.multinomial(weights, count, generator=generator).sort().values
        if not any(torch.equal(layers, other) for other in drawn):
            drawn.append(layers)
        if len(drawn) == sets:
            return torch.stack(drawn)
    raise ValueError(f"only {len(drawn)} of {sets} different sets were drawn: the probabilities leave no choice")


def update_scores(
    scores: torch.Tensor,
    sampled: Sequence[Sequence[int]] | torch.Tensor,
    losses: Sequence[float] | torch.Tensor,
    lr: float = 1.0,
    probability: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> torch.Tensor:
    """The bandit's step: sets with a loss below the others' make their layers more likely to be skipped.

    A set's reward is exp(-loss). Each of its layers gains lr * (reward - mean reward) * p (1 - p), with p from the
    scores before the step.

    Args:
        scores: float [layers], 0 at first; not changed.
        sampled: the sets of layers.
        losses: one for each set, of the same batch, in evaluation mode.
        lr: 1 in LLaVA's search, 2 in LaVIN's.
        probability: of a layer, from the scores.

    Returns:
        float [layers]
    """
    rewards = (-torch.as_tensor(losses, dtype=scores.dtype, device=scores.device)).exp()
    p = probability(scores)
    updated = scores.clone()
    for layers, advantage in zip(sampled, rewards - rewards.mean(), strict=True):
        layers = torch.as_tensor(layers, device=scores.device)
        updated[layers] += lr * advantage * p[layers] * (1 - p[layers])
    return updated


def chosen_layers(scores: torch.Tensor, count: int) -> list[int]:
    """The layers to skip after the search, ascending: those with the highest scores, the deeper of two equal ones."""
    return sorted(scores.argsort(stable=True)[len(scores) - count :].tolist())
