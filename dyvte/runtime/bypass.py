"""Visual tokens that a layer does not work on, and that go on behind it: it holds no keys of theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dyvte.runtime.cache_rows import group_cache
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.tokens import KeptTokens
from dyvte.runtime.view import LayerView


class Bypass(Reduction):
    """A method that chooses, for some layers, the visual tokens that they work on; the others come back unchanged.

    Attributes:
        bypassed: the layers, from 0.
    """

    layers: Collection[int] = ()  # takes no token away for good
    bypassed: Collection[int] = ()

    def check(self, spec: DecoderSpec) -> None:
        outside = [layer for layer in self.bypassed if not spec.first <= layer < spec.num_layers]
        if outside:
            raise ValueError(
                f"visual tokens cannot bypass layer {outside[0]}: choose among {spec.first} ... {spec.num_layers - 1}"
            )

        if spec.stream is not None or any(kind.source is not None for kind in spec.kinds):
            raise ValueError(
                f"tokens cannot bypass single layers of {type(spec.decoder).__name__}, whose tokens have several "
                "states or whose layers read each other's keys: choose a method that drops tokens for good"
            )

    def routes(self, view: LayerView) -> torch.Tensor:
        """Which visual tokens the layer works on: bool [n, width], read at visual tokens only."""
        raise NotImplementedError(f"{type(self).__name__} does not define routes()")

    def weights(self, view: LayerView) -> torch.Tensor | None:
        """What the layer's update of each visual token is multiplied with: [n, width]; None: 1."""
        return None


def by_layer(parts: Sequence[Reduction]) -> dict[int, Bypass]:
    """Which method decides who bypasses a layer.

    Raises:
        ValueError: two do, or a reduction reads the attention of such a layer, which some tokens are not part of.
    """
    found: dict[int, Bypass] = {}
    for part in parts:
        for layer in part.bypassed if isinstance(part, Bypass) else ():
            if layer in found:
                raise ValueError(f"two methods choose what bypasses layer {layer}: give them different layers")
            found[layer] = part
    for part in parts:
        if part.reads_attention:
            read = found if part.layers is None else [layer for layer in found if layer + 1 in part.layers]
            for layer in read:
                raise ValueError(
                    f"{type(part).__name__} reads the attention of layer {layer}, which visual tokens bypass: choose "
                    "other layers for one of them"
                )
    return found


class Detour:
    """The part of a group that a layer works on.

    Attributes:
        part: a group of its own, which the layer runs for.
    """

    def __init__(self, group: Group, bypass: Bypass, layer: int, spec: DecoderSpec):
        view = LayerView(group, torch.arange(len(group.samples)), layer, spec)
        routes, visual = bypass.routes(view), group.visual
        if not isinstance(routes, torch.Tensor) or routes.dtype != torch.bool or routes.shape != visual.shape:
            raise ValueError(f"{type(bypass).__name__}.routes() must return bool {list(visual.shape)}")
        self.group, self.weights = group, bypass.weights(view)
        self.among = KeptTokens.from_mask(group.staying | (visual & routes.to(visual.device)))
        tokens = KeptTokens(group.tokens.index.gather(1, self.among.index), self.among.valid, self.among.ragged)
        cache = None if group.cache is None else group_cache()
        self.part = Group(group.prompt, group.samples, tokens, self.among.gather(group.hidden), group.reducible, cache)

    def rejoin(self) -> None:
        """Puts what the layer made of the part where it belongs in the group."""
        group, among, made = self.group, self.among, self.part.hidden
        before = among.gather(group.hidden.to(made.device))
        if self.weights is not None:
            weights = self.weights.to(made).masked_fill(~group.visual.to(made.device), 1)
            made = before + among.gather(weights)[..., None] * (made - before)
        index, valid = among.index.to(made.device), among.valid.to(made.device)
        group.hidden = group.hidden.to(made.device).clone()
        rows = torch.arange(len(index), device=made.device)[:, None]
        group.hidden[rows, index] = torch.where(valid[..., None], made, before)
