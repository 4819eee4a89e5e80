"""Who decides from which layer on a sample runs without its visual tokens.

A policy overrides one of two methods: ``plan``, if it knows the exit layers before the model runs, or ``leaves``, if
it looks at the text state after every layer. Both count exit layers as the whole package does: ``e`` is the number of
layers that see the visual tokens, 1 ... L, and ``e = L`` means that they never leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dyvte.runtime.tokens import full_precision

if TYPE_CHECKING:
    from dyvte.heads.model import ExitHeads


class ExitPolicy:
    """Base class: a policy that never exits.

    Attributes:
        earliest: the smallest exit layer it insists on, if it does; a model that cannot leave so early is then
            refused. Other policies start at the smallest exit layer that the model allows.
        lookahead: how many layers before an exit layer it is asked about it. On a GPU the host waits for every answer;
            with 1 or more it waits while a layer runs, and the device need not.
    """

    earliest: int | None = None
    lookahead: int = 0

    def check(self, num_layers: int, hidden_size: int, name_or_path: str | None = None) -> None:
        """Raises ``ValueError`` if the policy does not fit a decoder of this depth and width."""

    def check_rows(self, rows: int) -> None:
        """Raises ``ValueError`` if the policy does not fit a batch of this many rows, before the model runs."""

    def plan(self, batch_size: int, num_layers: int) -> torch.Tensor | None:
        """The exit layer of each sample, long [batch_size], or None to be asked after every layer."""
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

    def check(self, num_layers: int, hidden_size: int, name_or_path: str | None = None) -> None:
        layers = torch.as_tensor(self.layer).flatten()
        if len(layers) == 0 or layers.min() < 1 or layers.max() > num_layers:
            raise ValueError(
                f"exit layer {self.layer} is outside 1 ... {num_layers}: choose how many of the {num_layers} decoder "
                f"layers see the visual tokens ({num_layers} = never exit)"
            )

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

    Draws come from a generator of its own, so a seed gives the same exits whatever else is drawn.
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
        self.p = p
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, batch_size: int, num_layers: int) -> torch.Tensor:
        draws = torch.rand(batch_size, max(num_layers - 1, 1), generator=self.generator) < self.p
        first = draws.int().argmax(1) + 1
        return torch.where(draws.any(1), first, num_layers)


class LearnedExit(ExitPolicy):
    """Exit heads decide: a sample leaves at the first layer where they believe in agreement more than ``threshold``.

    The heads follow the model to its device.

    Args:
        heads: trained :class:`~dyvte.ExitHeads` for this model.
        threshold: probability in (0, 1] that must be exceeded; 1 never exits. Default: the heads' own.
        min_layer: the smallest exit layer considered; default: the one the heads were calibrated with.
        risk: instead of a threshold, the share of answers that may change, such as 0.02; the threshold comes from the
            curve that the heads' calibration left.
    """

    def __init__(
        self, heads: ExitHeads, threshold: float | None = None, min_layer: int | None = None, risk: float | None = None
    ):
        if threshold is not None and risk is not None:
            raise ValueError("give a threshold or a risk, not both: a risk chooses the threshold")
        if risk is not None:
            threshold = heads.threshold_for(risk)
        threshold = heads.config.threshold if threshold is None else threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], not {threshold}: 1 never exits, small values exit early")
        min_layer = heads.config.min_layer if min_layer is None else min_layer
        if isinstance(min_layer, bool) or not isinstance(min_layer, int) or min_layer < 1:
            raise ValueError(f"min_layer must be an exit layer, 1 or more, not {min_layer}")
        self.heads, self.threshold, self.min_layer = heads.eval(), float(threshold), min_layer
        self._device: torch.device | None = None

    @property
    def lookahead(self) -> int:
        return self.heads.config.lookahead

    def check(self, num_layers: int, hidden_size: int, name_or_path: str | None = None) -> None:
        self.heads.check_fits(num_layers, hidden_size, name_or_path)
        if self.heads.dtype != torch.float32:
            raise ValueError(
                f"exit heads decide in float32, not {self.heads.dtype}: load them without dtype, or call heads.float()"
            )
        if self.min_layer > num_layers:
            raise ValueError(f"min_layer {self.min_layer} is beyond the model's {num_layers} layers: choose less")

    def plan(self, batch_size: int, num_layers: int) -> None:
        return None

    @torch.no_grad()
    def admits(self, visual: torch.Tensor) -> torch.Tensor | None:
        self._device = self.heads.device  # asked for once a prompt: at every decision it would show
        with full_precision(visual.device):
            return self._heads_on(visual.device).usual_images(visual)

    @torch.no_grad()
    def leaves(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        if layer < self.min_layer:
            return torch.zeros(len(state), dtype=torch.bool)  # known to the host, whatever device works
        with full_precision(state.device):
            return self._heads_on(state.device).confident(state, layer, self.threshold)

    def _heads_on(self, device: torch.device) -> ExitHeads:
        if self._device != device:
            self.heads.to(device)
            self._device = device
        return self.heads
