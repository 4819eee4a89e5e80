"""A picture under the weights of its visual tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageColor

COLOUR = "#FF7A1A"  # of the largest weight
SIDE = 480  # pixels of the longer side


def token_grid(inputs: Mapping[str, Any], config: Any, count: int) -> tuple[int, int] | None:
    """Rows and columns in which a picture's visual tokens lie; None where they form no plain grid.

    Args:
        inputs: the model's, of one prompt with one image.
        config: of the model.
        count: visual tokens of the prompt.
    """
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        merged = getattr(config.vision_config, "spatial_merge_size", 1)
        rows, columns = int(grid[0, 1]) // merged, int(grid[0, 2]) // merged
    elif inputs["pixel_values"].ndim == 4 and len(inputs["pixel_values"]) == 1:
        rows = columns = math.isqrt(count)
    else:
        return None
    return (rows, columns) if rows * columns == count else None


def seen_picture(inputs: Mapping[str, Any], processor: Any, picture: Image.Image) -> Image.Image:
    """What the model saw of a picture: its processor may cut off edges."""
    pixels, images = inputs["pixel_values"], getattr(processor, "image_processor", None)
    if pixels.ndim != 4 or len(pixels) != 1 or pixels.shape[1] != 3:
        return picture
    pixels = pixels[0].float().cpu()
    if getattr(images, "do_normalize", False):
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    values = (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0)
    return Image.fromarray(values.numpy())


def heat_map(picture: Image.Image, weights: torch.Tensor) -> Image.Image:
    """A picture in grey, coloured where its tokens have weight; the largest weight has the full colour.

    Args:
        picture: RGB.
        weights: float [rows, columns], 0 or more.
    """
    scale = SIDE / max(picture.size)
    size = tuple(max(round(scale * side), 1) for side in picture.size)
    grey = picture.convert("L").resize(size, Image.Resampling.BICUBIC).point(lambda value: 40 + 0.75 * value)
    share = (255 * 0.85 * weights / weights.max().clamp(min=1e-12)).round().byte()
    mask = Image.fromarray(share.numpy()).resize(size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", size, ImageColor.getrgb(COLOUR)), grey.convert("RGB"), mask)
