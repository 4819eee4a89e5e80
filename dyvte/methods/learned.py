"""Exit heads as a policy: they read the text state after every layer and say whether the image can leave."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from dyvte.identity import model_fingerprint
from dyvte.methods.exits import ExitPolicy
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.tokens import full_precision

if TYPE_CHECKING:
    from dyvte.heads import ExitHeads


class LearnedExit(ExitPolicy):
    """Exit heads decide: a sample leaves at the first layer where they believe in agreement more than ``threshold``.

    The heads follow the model to its device.

    Args:
        heads: trained :class:`~dyvte.ExitHeads` for this model.
        threshold: probability in (0, 1] that must be exceeded; 1 never exits. Default: the heads' own.
        min_layer: the smallest exit layer considered; default: the one the heads were calibrated with.
        risk: instead of a threshold, the share of answers that may change, such as 0.02; the threshold comes from the
            curve that the heads' calibration left.
        other_weights: use the heads on a model whose weights are not those they were made for. No promise holds then.
    """

    def __init__(
        self,
        heads: ExitHeads,
        threshold: float | None = None,
        min_layer: int | None = None,
        risk: float | None = None,
        other_weights: bool = False,
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
        self.other_weights = other_weights
        self._device: torch.device | None = None

    @property
    def lookahead(self) -> int:
        return self.heads.config.lookahead

    @property
    def layers(self) -> Collection[int]:
        exits = self.heads.config.exits
        possible = range(self.min_layer, self.heads.config.num_layers)
        return possible if exits is None else [e for e in exits if e in possible]

    def check(self, spec: DecoderSpec) -> None:
        name, weights = getattr(getattr(spec.model, "config", None), "_name_or_path", None), None
        if self.other_weights:
            name = None
        elif "weights" in (self.heads.config.identity or {}):
            weights = model_fingerprint(spec.model)
        self.heads.check_whole()
        self.heads.check_fits(spec.num_layers, spec.config.hidden_size, name, weights)
        if self.heads.dtype != torch.float32:
            raise ValueError(
                f"exit heads decide in float32, not {self.heads.dtype}: load them without dtype, or call heads.float()"
            )
        if self.min_layer > spec.num_layers:
            raise ValueError(f"min_layer {self.min_layer} is beyond the model's {spec.num_layers} layers: choose less")
        super().check(spec)

    @torch.no_grad()
    def admits(self, visual: torch.Tensor) -> torch.Tensor | None:
        self._device = self.heads.device  # asked for once a prompt: at every decision it would show
        with full_precision(visual.device):
            return self._heads_on(visual.device).usual_images(visual)

    @torch.no_grad()
    def leaves(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        with full_precision(state.device):
            return self._heads_on(state.device).confident(state, layer, self.threshold)

    def _heads_on(self, device: torch.device) -> ExitHeads:
        if self._device != device:
            self.heads.to(device)
            self._device = device
        return self.heads
