"""What a method of reducing visual work is: which tokens go on, asked between two layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.view import LayerView


class Reduction:
    """A method: which tokens of a prompt go on to the next layers.

    A subclass overrides :meth:`select`. Reductions combine: what either of ``a & b`` drops is dropped.

    Attributes:
        layers: before which decoder layers it is asked, counted from 0; None: before every layer. A layer ``k`` is the
            first to run without what is dropped there, so ``k`` layers have seen it.
        lookahead: how many layers earlier than that it is asked. On a GPU the host waits for every answer; with 1 or
            more it waits while a layer runs, and the device need not.
        reads_attention: whether it looks at the attention of the layer before.
        reads_vision: which layers of the vision tower it looks at; None: none.
        reads_text: whether it looks at text states, so that where they are is worked out beforehand.
        admitted: bool [batch], the samples it may take anything from; None: all.
    """

    layers: Collection[int] | None = None
    lookahead: int = 0
    reads_attention: bool = False
    reads_vision: slice | None = None
    reads_text: bool = False
    admitted: torch.Tensor | None = None

    def check(self, spec: DecoderSpec) -> None:
        """Raises ``ValueError`` if it does not fit the model."""
        if self.layers is not None:
            outside = [k for k in self.layers if not spec.first <= k <= spec.num_layers]
            if outside:
                raise ValueError(
                    f"layer {outside[0]} is outside {spec.first} ... {spec.num_layers}: choose after how many of the "
                    f"{spec.num_layers} decoder layers visual tokens are dropped"
                )
            spec.check_largest(self.layers)

    def check_rows(self, rows: int) -> None:
        """Raises ``ValueError`` if it does not fit a batch of this many rows, before the model runs."""

    def start(self, view: LayerView) -> Reduction:
        """Asked once for each prompt, before the first layer: what is asked from then on. By default, itself.

        Whatever concerns this prompt alone belongs to what is returned, never to ``self``.
        """
        return self

    def select(self, view: LayerView) -> torch.Tensor:
        """Which tokens go on: bool [n, width], read at visual tokens only; everything else goes on in any case."""
        raise NotImplementedError(f"{type(self).__name__} does not define select()")

    def update(self, view: LayerView, keep: torch.Tensor) -> torch.Tensor | None:
        """New states for the tokens that go on, such as merged ones: [n, width, d]; None leaves them as they are.

        Args:
            keep: bool [n, width], what :meth:`select` said.
        """
        return None

    def keyed(self, keys: Sequence[str]) -> Reduction:
        """The same, for a batch of samples with these names: random draws then belong to them, not to the prompts."""
        return self

    def parts(self) -> tuple[Reduction, ...]:
        """The reductions it consists of."""
        return (self,)

    def __and__(self, other: Reduction) -> Reduction:
        return Both(self, other)


class Both(Reduction):
    """Two reductions at once: what either drops is dropped."""

    def __init__(self, first: Reduction, second: Reduction):
        for reduction in (first, second):
            if not isinstance(reduction, Reduction):
                raise TypeError(f"only reductions combine, not a {type(reduction).__name__}")
        self.first, self.second = first, second

    def parts(self) -> tuple[Reduction, ...]:
        return (*self.first.parts(), *self.second.parts())

    def keyed(self, keys: Sequence[str]) -> Reduction:
        return Both(self.first.keyed(keys), self.second.keyed(keys))

    def check(self, spec: DecoderSpec) -> None:
        for reduction in (self.first, self.second):
            reduction.check(spec)

    def check_rows(self, rows: int) -> None:
        for reduction in (self.first, self.second):
            reduction.check_rows(rows)


class TopK(Reduction):
    """Keeps, before each of its layers, a share of every prompt's visual tokens: those with the highest scores.

    A subclass defines :meth:`score`. Rows of one prompt (beams) keep the same tokens.

    Args:
        keep: by layer, the share of all visual tokens of the prompt that goes on, 0 ... 1; see :meth:`count`.
    """

    def __init__(self, keep: Mapping[int, float]):
        for layer, share in keep.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"layer must be a number of decoder layers, 0 or more, not {layer!r}")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"keep must be the share of visual tokens kept, 0 ... 1, not {share!r}")
        self.shares = dict(keep)

    @property
    def layers(self) -> Collection[int]:
        return self.shares.keys()

    def count(self, visual: int, layer: int) -> int:
        """How many of a prompt's visual tokens go on: the share, rounded half up; at least one unless it is 0."""
        share = self.shares[layer]
        return max(math.floor(share * visual + 0.5), 1) if share > 0 and visual > 0 else 0

    def score(self, view: LayerView) -> torch.Tensor:
        """float [n, width], read at visual tokens only; of two that are equal the earlier one is kept."""
        raise NotImplementedError(f"{type(self).__name__} does not define score()")

    def select(self, view: LayerView) -> torch.Tensor:
        visual, scores = view.visual, self.score(view)
        if not isinstance(scores, torch.Tensor) or scores.shape != visual.shape:
            raise ValueError(f"{type(self).__name__}.score() must return scores {list(visual.shape)}")
        scores = scores.to(visual.device)[first_copies(view).to(visual.device)]
        order = scores.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        count = torch.tensor([self.count(n, view.layer) for n in view.total.tolist()], device=order.device)
        return rank < count[:, None]


def first_copies(view: LayerView) -> torch.Tensor:
    """For each row of a view the first one that belongs to the same prompt and holds the same tokens: long [n]."""
    prompts = (view.samples // view.prompt.copies).tolist()
    first: dict[int, int] = {}
    if view.prompt.copies == 1:
        return torch.arange(len(prompts))
    index = view.tokens.index
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    return torch.tensor(
        [first[p] if torch.equal(index[first[p]], index[row]) else row for row, p in enumerate(prompts)]
    )


def as_reduction(method: Any) -> Reduction:
    """Raises ``TypeError`` for what is no reduction."""
    if not isinstance(method, Reduction):
        raise TypeError(f"policy must be an ExitPolicy such as dyvte.FixedExit(4), not {type(method).__name__}")
    return method
