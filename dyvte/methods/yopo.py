"""YOPO (arXiv 2410.06169): four fixed cuts of the visual computation, none of which drops a token.

Confirmed by the public code (ZhangAIPI/YOPO_MLLM_Pruning). Neighbours, heads, neurons and layers are cut for all
prompts alike; the strong settings were trained with the cuts in place, on InternVL2 and Qwen2-VL they were not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.feed_forward import FeedForward, NeuronEdit
from dyvte.runtime.view import LayerView


def neighbour_mask(visual: torch.Tensor, height: int, width: int, window: int, causal: bool = False) -> torch.Tensor:
    """Which columns each row may see when visual tokens see only their neighbours in the image.

    A visual row sees the visual tokens of its own image at most ``int((window - 1) / 2)`` rows and columns away, itself
    included, also those after it: the reference overwrites the causal block. Text before it stays visible, and text
    rows are causal.

    Args:
        visual: bool [n, s], whose visual tokens are images of height * width tokens, one after the other (several
            images: our reading).
        height, width: the grid of an image.
        window: side of the neighbourhood, odd; 5 for LLaVA-1.5.
        causal: whether to leave out the neighbours after a token, which the model was not trained to see.

    Returns:
        bool [n, s, s], rows by columns. Padding is not masked here.

    Raises:
        ValueError: the visual tokens do not fill such grids.
    """
    if (visual.sum(1) % (height * width)).any():
        raise ValueError(f"{visual.sum(1).tolist()} visual tokens do not fill grids of {height} x {width}")
    number = visual.cumsum(1) - 1
    image, cell = number // (height * width), number % (height * width)
    row, column, reach = cell // width, cell % width, int((window - 1) / 2)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, None] - x[:, None, :]).abs()

    near = (apart(image) == 0) & (apart(row) <= reach) & (apart(column) <= reach)
    before = torch.ones(visual.shape[1], visual.shape[1], dtype=torch.bool, device=visual.device).tril()
    both = visual[:, :, None] & visual[:, None, :]
    return torch.where(both, near & before if causal else near, before)


def head_ratios(attention: torch.Tensor, visual: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """What a head gives to visual columns over what it gives to all others.

    The reference sums over all rows of the prompt for LLaVA and over one decoding row for Qwen2-VL.

    Args:
        attention: [n, heads, q, s] of one layer, weights after softmax.
        visual: bool [n, s].
        rows: bool [n, q], the rows that count (those of padding do not); None: all.

    Returns:
        float32 [n, heads]; inf where nothing goes to other columns.
    """
    rows = attention.new_ones(attention.shape[0], attention.shape[2]) if rows is None else rows
    columns = torch.einsum("nhqs,nq->nhs", attention.float(), rows.float())
    return (columns * visual[:, None]).sum(-1) / (columns * ~visual[:, None]).sum(-1)


def head_mask(ratios: torch.Tensor, threshold: float, majority: float = 0.4, whole: int = 2) -> torch.Tensor:
    """Which heads keep their visual computation: those whose ratio is above the threshold in enough prompts.

    Args:
        ratios: [prompts, layers, heads], of calibration prompts; the reference takes 100.
        threshold: .2, .077 or .035 for LLaVA-1.5-13B (10, 20 or 30 of 40 heads kept); .08, .11 and .052 for InternVL2
            4B, 8B and 26B; .07 for Qwen2-VL.
        majority: the share of prompts that must be exceeded.
        whole: layers at the beginning that keep all heads.

    Returns:
        bool [layers, heads]
    """
    kept = (ratios > threshold).sum(0).double() / len(ratios) > majority
    kept[:whole] = True
    return kept


def layer_cut(mask: torch.Tensor, layer: int) -> torch.Tensor:
    """The head mask with all heads cut from a layer on, 0-based.

    Text rows there keep the attention they have left, not normalised again: not the same as an exit at that layer,
    which the reference makes of it for Qwen2-VL.
    """
    mask = mask.clone()
    mask[layer:] = False
    return mask


def cut_values(values: torch.Tensor, visual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Value vectors with those of visual columns zeroed in cut heads.

    The same as attention weights set to 0 after softmax without normalising again, for any kernel and from the cache.

    Args:
        values: [n, heads, s, head size], one for each query head: with grouped heads, repeat them first where query
            heads of a group differ.
        visual: bool [n, s].
        keep: bool [heads].
    """
    return values.masked_fill(visual[:, None, :, None] & ~keep[None, :, None, None], 0)


def cut_outputs(outputs: torch.Tensor, visual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Attention outputs before the output projection, with those of visual rows zeroed in cut heads.

    Args:
        outputs: [n, s, heads, head size].
        visual: bool [n, s].
        keep: bool [heads], of the head mask without the layer cut, which leaves visual rows their text.
    """
    return outputs.masked_fill(visual[:, :, None, None] & ~keep[None, None, :, None], 0)


def first_neurons(intermediate: int, ratio: float) -> int:
    """How many neurons of the FFN visual rows use, the first ones, ``int(intermediate / ratio)``; trained at 2."""
    return int(intermediate / ratio)


class NeighbourAttention(LayerEdit):
    """Visual tokens see those around them in the image, see :func:`neighbour_mask`.

    Neighbours that have left meanwhile are not seen, of course. What it saves is theoretical: the kernels compute what
    the mask hides.

    Args:
        grid: height and width of an image in visual tokens, 24 x 24 for LLaVA-1.5.
        window, causal: see :func:`neighbour_mask`.
        layers: the layers edited, from 0; None: all.

    Raises:
        ValueError: on attaching: a layer that the model has not, or attention without such masks. In a call: visual
            tokens that do not fill such grids.
    """

    def __init__(
        self, grid: tuple[int, int], window: int = 5, causal: bool = False, layers: Collection[int] | None = None
    ):
        self.edited, self.grid, self.window, self.causal = layers, tuple(grid), window, causal

    def sees(self, view: LayerView, seen: torch.Tensor) -> torch.Tensor:
        whole = neighbour_mask(view.prompt.visual, *self.grid, self.window, self.causal).to(seen.device)
        rows, index = view.samples.to(seen.device), view.tokens.index.to(seen.device)
        near = whole[rows[:, None, None], index[:, :, None], index[:, None, :]]
        visual = view.visual.to(seen.device)
        return torch.where(visual[:, :, None] & visual[:, None, :], near, seen)


class HeadCut(LayerEdit):
    """Cut heads give nothing to visual tokens and take nothing from them, see :func:`cut_values`, :func:`cut_outputs`.

    Exact with every kernel, since the values of visual tokens are zeroed, in the cache as well. What it saves is
    theoretical.

    Args:
        mask: bool [layers, heads], the heads kept, see :func:`head_mask`. Query heads that share keys are cut together.

    Raises:
        ValueError: no such mask. On attaching: it has other numbers of layers or heads than the model, or cuts some of
            the heads that share keys; or the model's attention has no v_proj and o_proj.
    """

    def __init__(self, mask: torch.Tensor):
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError("mask must be bool [layers, heads], True at the heads kept, such as yopo.head_mask(...)")
        self.mask, self.edited = mask.cpu(), (~mask).any(1).nonzero().flatten().tolist()

    def check(self, spec: DecoderSpec) -> None:
        heads = spec.config.num_attention_heads
        if self.mask.shape != (spec.num_layers, heads):
            raise ValueError(f"mask {list(self.mask.shape)} does not fit {spec.num_layers} layers of {heads} heads")
        shared = self.mask.unflatten(1, (getattr(spec.config, "num_key_value_heads", None) or heads, -1))
        if not bool((shared == shared[..., :1]).all()):
            raise ValueError(
                f"heads that share keys must be kept or cut together: decide for all {shared.shape[2]} of a group, for "
                "example by mask.unflatten(1, (key_heads, -1)).any(2).repeat_interleave(group, 1)"
            )
        super().check(spec)

    def values(self, view: LayerView, values: torch.Tensor) -> torch.Tensor:
        keep = self.mask[view.layer].unflatten(0, (values.shape[2], -1))[:, 0].to(values.device)
        return cut_values(values.transpose(1, 2), view.visual.to(values.device), keep).transpose(1, 2)

    def heads(self, view: LayerView, outputs: torch.Tensor) -> torch.Tensor:
        return cut_outputs(outputs, view.visual.to(outputs.device), self.mask[view.layer].to(outputs.device))


class LayerCut(LayerEdit):
    """From a layer on no head takes anything from visual tokens; the rest of the weights is not normalised again.

    Not an exit, see :func:`layer_cut`; visual tokens go on, so that this saves nothing by itself.

    Args:
        layer: the first layer that is cut, 0 ... L - 1.

    Raises:
        ValueError: on attaching: the model has no such layer, or its attention no v_proj.
    """

    def __init__(self, layer: int):
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer must be a decoder layer, 0 or more, not {layer!r}")
        self.layer = layer

    def check(self, spec: DecoderSpec) -> None:
        if self.layer >= spec.num_layers:
            raise ValueError(f"layer {self.layer} is outside 0 ... {spec.num_layers - 1}: choose the first that is cut")
        super().check(spec)

    def values(self, view: LayerView, values: torch.Tensor) -> torch.Tensor:
        if view.layer < self.layer:
            return values
        return values.masked_fill(view.visual.to(values.device)[..., None, None], 0)


class FirstNeurons(NeuronEdit):
    """Visual tokens use the first neurons of the FFN, see :func:`first_neurons`; the others are really not computed.

    Args:
        ratio: all neurons over those used, 1 or more; trained at 2.
        layers: the layers edited, from 0; None: all.

    Raises:
        ValueError: a ratio below 1. On attaching: a layer that the model has not, or an FFN whose neurons cannot be
            told apart.
    """

    def __init__(self, ratio: float = 2, layers: Collection[int] | None = None):
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
            raise ValueError(f"ratio must be 1 or more, not {ratio!r}")
        self.edited, self.ratio = layers, ratio

    def neurons(self, view: LayerView, parts: FeedForward, states: torch.Tensor) -> Sequence[torch.Tensor]:
        used = torch.arange(first_neurons(parts.gate.out_features, self.ratio), device=states.device)
        return [used] * len(states)
