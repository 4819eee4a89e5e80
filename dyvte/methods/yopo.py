"""YOPO (arXiv 2410.06169): four fixed cuts of the visual computation, none of which drops a token.

Confirmed by the public code (ZhangAIPI/YOPO_MLLM_Pruning). Neighbours, heads, neurons and layers are cut for all
prompts alike; the strong settings were trained with the cuts in place, on InternVL2 and Qwen2-VL they were not.
"""

from __future__ import annotations

import torch


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
