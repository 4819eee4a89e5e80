"""Plain downsampling of the image: the control that a method of pruning has to beat (VTC-Bench, arXiv 2510.07143)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dyvte.methods.selection import images
from dyvte.runtime.reduction import LayerView, Reduction


def resize(pixels: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Smaller images, by bilinear interpolation with antialiasing, which stays within the range of the pixels.

    Saves visual tokens where the model makes as many of them as the image is large (Qwen-VL); a model with a fixed
    grid scales the image up again and only loses detail.

    Args:
        pixels: float [n, channels, height, width].
        size: height and width, or the longer side with the ratio of the sides kept, rounded half up, at least 1. An
            image whose longer side is no longer than that stays as it is.

    Returns:
        float [n, channels, *size]

    Raises:
        ValueError: a size below 1, or above the image's.
    """
    height, width = pixels.shape[-2:]
    if isinstance(size, int) and size >= 1:
        scale = min(size / max(height, width), 1)
        size = tuple(max(math.floor(side * scale + 0.5), 1) for side in (height, width))
    if isinstance(size, int) or not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(f"cannot downsample an image of {height} x {width} pixels to {size}")
    if tuple(size) == (height, width):
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)


def cells(side: int, size: int) -> torch.Tensor:
    """The token nearest to the middle of each cell of a square grid cut into size x size: long [size * size].

    Cells are those of ``adaptive_avg_pool2d``: they overlap by a row where the sides do not divide.
    """
    first = torch.arange(size) * side // size
    last = -(-(torch.arange(size) + 1) * side // size) - 1
    middle = (first + last) // 2
    return (middle[:, None] * side + middle).flatten()


class Downsample(Reduction):
    """Averages, before the decoder, each image's square grid of visual tokens to a coarser one.

    The control for models that make the same number of visual tokens of every image, whatever its size, where
    :func:`resize` saves nothing. A mean stands at the token nearest to the middle of its cell, with its position. An
    image is what stands together in the prompt.

    Args:
        size: side of the coarser grid, in tokens; an image whose grid is no larger stays as it is.

    Raises:
        ValueError: a size below 1. In a call: an image that is no square.
    """

    layers = (0,)

    def __init__(self, size: int):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be the side of a grid of visual tokens, 1 or more, not {size!r}")
        self.size = size

    def select(self, view: LayerView) -> torch.Tensor:
        keep = torch.zeros_like(view.visual)
        for rows, columns, places in self._grids(view.visual):
            keep[rows, columns[:, places]] = True
        return keep

    def update(self, view: LayerView, keep: torch.Tensor) -> torch.Tensor:
        hidden = view.hidden.clone()
        for rows, columns, places in self._grids(view.visual.to(hidden.device)):
            side = math.isqrt(columns.shape[1])
            if side > self.size:
                grid = hidden[rows, columns].transpose(1, 2).unflatten(2, (side, side))
                hidden[rows, columns[:, places]] = F.adaptive_avg_pool2d(grid, self.size).flatten(2).transpose(1, 2)
        return hidden

    def _grids(self, visual: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows and columns of the images, and which of their tokens stay."""
        found = []
        for rows, columns in images(visual):
            side = math.isqrt(columns.shape[1])
            if side * side != columns.shape[1]:
                raise ValueError(
                    f"an image of {columns.shape[1]} visual tokens is no square grid that could be averaged: make its "
                    "pixels fewer instead (downsample.resize)"
                )
            found.append((rows, columns, cells(side, min(self.size, side)).to(visual.device)))
        return found
