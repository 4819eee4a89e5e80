"""Plain downsampling of the image: the control that a method of pruning has to beat (VTC-Bench, arXiv 2510.07143)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


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
