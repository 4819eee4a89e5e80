"""Exits: the visual tokens of a sample stay up to some layer, and from there on all of them are gone.

A policy overrides one of two methods: ``plan``, if it knows the exit layers before the model runs, or ``leaves``, if
it looks at the text state after every layer. Both count exit layers as the whole package does: ``e`` is the number of
layers that see the visual tokens, 1 ... L, and ``e = L`` means that they never leave.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from dyvte.methods.draws import row_keys, uniform
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import LayerView, Reduction

if TYPE_CHECKING:
    pass


class ExitPolicy(Reduction):
    """Base class: a policy that never exits.

    Attributes:
        earliest: the smallest exit layer it insists on, if it does; a model that cannot leave so early is then
            refused. Other policies start at the smallest exit layer that the model allows.
        layers: the exit layers that it wants to be asked about; None: all.
        lookahead: how many layers before an exit layer it is asked about it. On a GPU the host waits for every answer;
            with 1 or more it waits while a layer runs, and the device need not.
    """

    earliest: int | None = None

    def check(self, spec: DecoderSpec) -> None:
        """Raises ``ValueError`` if the policy does not fit a model."""
        if not isinstance(self.lookahead, int) or self.lookahead < 0:
            raise ValueError(
                f"{type(self).__name__}.lookahead must be 0 or more layers, not {self.lookahead!r}: it counts the "
                "layers between a decision and its exit"
            )
        if self.earliest is not None and self.earliest < spec.min_layer:
            raise ValueError(
                f"exit layer {self.earliest} is too early for {type(spec.model).__name__}: it adds visual features "
                f"to the visual tokens after its first layers. Choose {spec.min_layer} ... {spec.num_layers}"
            )

    def plan(self, batch_size: int, num_layers: int) -> torch.Tensor | None:
        """The exit layer of each row, long [batch_size], or None to be asked after every layer."""
        asks = type(self).leaves is not ExitPolicy.leaves
        return None if asks else torch.full((batch_size,), num_layers)

    def admits(self, visual: torch.Tensor) -> torch.Tensor | None:
        """Which samples may leave at all, asked once for each prompt before the first layer; None: all of them.

        Args:
            visual: float32 [n, hidden size], the mean of each sample's visual tokens as they enter the decoder.

        Returns:
            bool [n], or None
        """
        return None

    def leaves(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Whether the samples leave at exit layer ``layer``, given their text state ``lookahead`` layers before it.

        Args:
            layer: the exit layer under decision, 1 + ``lookahead`` ... L - 1.
            state: float32 [n, 2 * hidden size]; only samples that have not left yet.

        Returns:
            bool [n]
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither plan() nor leaves()")

    def plan_for(self, view: LayerView, num_layers: int) -> torch.Tensor | None:
        """:meth:`plan` for a prompt that can be looked at."""
        return self.plan(len(view.samples), num_layers)

    def start(self, view: LayerView) -> Reduction:
        rows, spec = len(view.samples), view.spec
        planned = self.plan_for(view, spec.num_layers)
        if planned is None:
            admitted = self.admits(view.prompt.visual_state(view.hidden))
            if admitted is not None:
                admitted = _verdict(self, "admits", admitted, rows).cpu()
            return _Asked(self, admitted, spec.exits)
        whole = isinstance(planned, torch.Tensor) and not planned.is_floating_point() and planned.shape == (rows,)
        if not whole or planned.min() < 1 or planned.max() > spec.num_layers:
            raise ValueError(
                f"{type(self).__name__}.plan() must return None or exit layers 1 ... {spec.num_layers}, long [{rows}], "
                f"not {planned}"
            )
        planned = planned.cpu().clamp(min=spec.min_layer)
        return _Planned(planned.where(planned <= spec.largest, spec.num_layers), spec.num_layers)


class _Planned(Reduction):
    """Exit layers known before the first layer, one per row."""

    def __init__(self, exits: torch.Tensor, num_layers: int):
        self.exits = exits
        self.layers: Collection[int] = set(exits.tolist()) - {num_layers}

    def select(self, view: LayerView) -> torch.Tensor:
        return (self.exits[view.samples] > view.layer)[:, None].expand(view.shape)


class _Asked(Reduction):
    """A policy that is asked after every layer."""

    reads_text = True

    def __init__(self, policy: ExitPolicy, admitted: torch.Tensor | None, allowed: range):
        self.policy, self.admitted, self.lookahead = policy, admitted, policy.lookahead
        self.layers = allowed if policy.layers is None else set(allowed).intersection(policy.layers)

    def select(self, view: LayerView) -> torch.Tensor:
        state = view.text_state()
        leaves = _verdict(self.policy, "leaves", self.policy.leaves(view.layer, state), len(state))
        return (~leaves)[:, None].expand(view.shape)


def _verdict(policy: ExitPolicy, method: str, verdict: torch.Tensor, rows: int) -> torch.Tensor:
    if not isinstance(verdict, torch.Tensor) or verdict.dtype != torch.bool or verdict.shape != (rows,):
        raise ValueError(f"{type(policy).__name__}.{method}() must return bool [{rows}], one per state given")
    return verdict


class NeverExit(ExitPolicy):
    """The dense model: visual tokens stay to the end."""


class FixedExit(ExitPolicy):
    """The same exit layer for every sample, or one for each sample of the batch, known in advance.

    Args:
        layer: an exit layer, 1 ... L, or one per sample.
    """

    def __init__(self, layer: int | list[int] | torch.Tensor):
        if isinstance(layer, bool) or not isinstance(layer, (int, list, tuple, torch.Tensor)):
            raise TypeError(f"layer must be an int or one int per sample, not {type(layer).__name__}")
        self.layer = layer if isinstance(layer, int) else torch.as_tensor(layer)
        if not isinstance(self.layer, int) and (self.layer.ndim != 1 or self.layer.is_floating_point()):
            raise TypeError("layer must be an int or a flat list of ints, one per sample of the batch")
        layers = torch.as_tensor(self.layer).flatten().tolist()
        self.earliest = min(layers) if layers else None

    def check(self, spec: DecoderSpec) -> None:
        layers = torch.as_tensor(self.layer).flatten()
        if len(layers) == 0 or layers.min() < 1 or layers.max() > spec.num_layers:
            raise ValueError(
                f"exit layer {self.layer} is outside 1 ... {spec.num_layers}: choose how many of the "
                f"{spec.num_layers} decoder layers see the visual tokens ({spec.num_layers} = never exit)"
            )
        spec.check_largest(layers.tolist())
        super().check(spec)

    def check_rows(self, rows: int) -> None:
        if not isinstance(self.layer, int) and len(self.layer) != rows:
            raise ValueError(
                f"FixedExit holds {len(self.layer)} exit layers but the batch has {rows} rows (beams and "
                "num_return_sequences multiply rows): give one exit layer per row, or a single int"
            )

    def plan(self, batch_size: int, num_layers: int) -> torch.Tensor:
        self.check_rows(batch_size)
        if isinstance(self.layer, int):
            return torch.full((batch_size,), self.layer)
        return self.layer.long().cpu()


class RandomExit(ExitPolicy):
    """Leaves after every layer with probability ``p``: the baseline any learned policy must beat.

    Draws belong to the prompt (its text, and where its visual tokens stand), or to the sample where one is named
    (:meth:`keyed`): it leaves at the same layer in every batch, after any number of other draws, and at every step of a
    generation without a cache.

    Args:
        p: probability, 0 ... 1.
        seed: other seeds, other draws.
    """

    def __init__(self, p: float, seed: int = 0):
        if (
            isinstance(p, bool)
            or not isinstance(p, (int, float))
            or isinstance(seed, bool)
            or not isinstance(seed, int)
        ):
            raise TypeError(f"p must be a number in 0 ... 1 and seed an int, not {p!r} and {seed!r}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in 0 ... 1, not {p}: it is the probability of leaving after a layer")
        self.p, self.seed = p, seed
        self.names: Sequence[str] | None = None

    def keyed(self, keys: Sequence[str]) -> RandomExit:
        policy = RandomExit(self.p, self.seed)
        policy.names = keys
        return policy

    def plan_for(self, view: LayerView, num_layers: int) -> torch.Tensor:
        keys = row_keys(view, self.seed, self.names)
        draws = torch.stack([uniform(key, max(num_layers - 1, 1)) for key in keys]) < self.p
        first = draws.int().argmax(1) + 1
        return torch.where(draws.any(1), first, num_layers)
