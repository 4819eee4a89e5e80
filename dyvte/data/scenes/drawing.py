"""Scenes: scanned digits in colours on a grid, placed with jitter, drawn batch by batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CELL = 30  # pixels along one side of a grid cell
GRID = 3  # cells along one side of the canvas
CANVAS = CELL * GRID
COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 250),
    "yellow": (240, 220, 60),
    "pink": (240, 110, 200),
    "white": (240, 240, 240),
}
COLOUR_NAMES = list(COLOURS)
SPLITS = {"train": (0, 1297), "dev": (1297, 1547), "test": (1547, 1797)}


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: ``images`` uint8 [n, CANVAS, CANVAS, 3]; ``digits`` and ``colours`` long [n, GRID, GRID]."""

    images: torch.Tensor
    digits: torch.Tensor
    colours: torch.Tensor


@functools.cache
def scans(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of one split: ink [n, 8, 8] in 0 ... 1 and the digit each one shows [n].

    Raises:
        ValueError: the split is not one of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits

    data = load_digits()
    # One fixed shuffle: neighbours in the file come from the same writer.
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    start, stop = SPLITS[split]
    chosen = order[start:stop].numpy()
    return torch.tensor(data.images[chosen], dtype=torch.float32) / 16, torch.tensor(data.target[chosen]).long()


STYLES = ("plain", "negative", "noisy")


def draw(n: int, split: str, generator: torch.Generator, augment: bool = False, style: str = "plain") -> Scenes:
    """Draws ``n`` scenes with digits of ``split``; ``augment`` distorts the digits more, for training.

    Styles other than "plain" are for images unlike those of training: "negative" inverts them, "noisy" adds grain.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    ink, labels = scans(split)
    cells = n * GRID * GRID

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    # First the digit, then one of its scans: every digit is equally frequent.
    digits = torch.randint(10, (cells,), generator=generator)
    pick = torch.rand(cells, len(labels), generator=generator).masked_fill(labels != digits[:, None], -1).argmax(1)
    colours = torch.randint(len(COLOURS), (cells,), generator=generator)

    turn, slant = (0.3, 0.2) if augment else (0.15, 0.05)
    angle, shear = uniform(-turn, turn, cells), uniform(-slant, slant, cells)
    zoom = CELL / uniform(20, 25, cells)
    stretch = uniform(0.88, 1.14, cells) if augment else torch.ones(cells)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(-0.2, 0.2, 2, cells)
    rows = [
        torch.stack([cos * stretch, -sin + shear * zoom, shift[0]], -1),
        torch.stack([sin, cos / stretch, shift[1]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), (cells, 1, CELL, CELL), align_corners=False)
    alpha = F.grid_sample(ink[pick][:, None], grid, align_corners=False)
    if augment:
        alpha = alpha.clamp(1e-4, 1) ** uniform(0.7, 1.4, cells, 1, 1, 1)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    paint = palette[colours][:, :, None, None] * uniform(0.8, 1.0, cells, 1, 1, 1)

    def on_canvas(cell_values: torch.Tensor) -> torch.Tensor:
        channels = cell_values.shape[1]
        grid = cell_values.view(n, GRID, GRID, channels, CELL, CELL).permute(0, 1, 4, 2, 5, 3)
        return grid.reshape(n, CANVAS, CANVAS, channels)

    alpha, paint = on_canvas(alpha), on_canvas(paint.expand(-1, -1, CELL, CELL))
    background = uniform(10, 60, n, 1, 1, 3)
    noise = torch.randn(n, CANVAS, CANVAS, 3, generator=generator) * (40 if style == "noisy" else 6)
    images = (background + alpha * (paint - background) + noise).round().clamp(0, 255).to(torch.uint8)
    if style == "negative":
        images = 255 - images
    return Scenes(images, digits.view(n, GRID, GRID), colours.view(n, GRID, GRID))
