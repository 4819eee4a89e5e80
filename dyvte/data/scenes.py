"""Scenes of real handwritten digits, and questions about them.

The reference task: nine scanned digits (scikit-learn's ``load_digits``, 1,797 scans of 8x8 pixels), each in one of
six colours, placed with jitter on a 3x3 grid. The question kinds need vision to different degrees, from not at all
(arithmetic in the prompt) to one spot, a relation, or the whole scene, so that the layer at which visual tokens stop
mattering differs per sample. The scans are split once and for all: no digit of one split is ever seen in another.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
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


Question = tuple[str, str]
Cells = list[list[int]]


def _once(cells: Cells) -> list[tuple[int, int]]:
    """Places of the digits (or colours) that occur once in the scene, so that "the 7" names one of them."""
    flat = [value for row in cells for value in row]
    return [(r, c) for r in range(GRID) for c in range(GRID) if flat.count(cells[r][c]) == 1]


def _arithmetic(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    a, b = rng.randrange(10), rng.randrange(10)
    return f"what is {a} plus {b} ?", str(a + b)


def _digit_at(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    r, c = rng.randrange(GRID), rng.randrange(GRID)
    return f"which digit is at row {r + 1} column {c + 1} ?", str(digits[r][c])


def _colour_at(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    r, c = rng.randrange(GRID), rng.randrange(GRID)
    return f"which colour is at row {r + 1} column {c + 1} ?", COLOUR_NAMES[colours[r][c]]


def _colour_of(digits: Cells, colours: Cells, rng: random.Random) -> Question | None:
    places = _once(digits)
    if not places:
        return None
    r, c = rng.choice(places)
    return f"which colour is the {digits[r][c]} ?", COLOUR_NAMES[colours[r][c]]


def _digit_of(digits: Cells, colours: Cells, rng: random.Random) -> Question | None:
    places = _once(colours)
    if not places:
        return None
    r, c = rng.choice(places)
    return f"which digit is {COLOUR_NAMES[colours[r][c]]} ?", str(digits[r][c])


def _count_digit(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    flat = [d for row in digits for d in row]
    # Digits of the scene three times in four: asking for any digit would make "0" the safe guess.
    digit = rng.choice(flat) if rng.random() < 0.75 else rng.randrange(10)
    return f"how many {digit} are there ?", str(flat.count(digit))


def _count_colour(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    colour = rng.randrange(len(COLOURS))
    return f"how many are {COLOUR_NAMES[colour]} ?", str(sum(row.count(colour) for row in colours))


def _any_digit(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    flat = {d for row in digits for d in row}
    missing = [d for d in range(10) if d not in flat]  # nine cells: at least one digit is missing
    digit, answer = (rng.choice(sorted(flat)), "yes") if rng.random() < 0.5 else (rng.choice(missing), "no")
    return f"is there a {digit} ?", answer


def _any_colour(digits: Cells, colours: Cells, rng: random.Random) -> Question | None:
    present = {c for row in colours for c in row}
    missing = [c for c in range(len(COLOURS)) if c not in present]
    if not missing:  # or "yes" would be the safe guess
        return None
    colour, answer = (rng.choice(sorted(present)), "yes") if rng.random() < 0.5 else (rng.choice(missing), "no")
    return f"is there a {COLOUR_NAMES[colour]} ?", answer


def _largest(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    r = rng.randrange(GRID + 1)
    if r == GRID:
        return "which digit is the largest ?", str(max(d for row in digits for d in row))
    return f"which digit is the largest in row {r + 1} ?", str(max(digits[r]))


def _left_of(digits: Cells, colours: Cells, rng: random.Random) -> Question | None:
    places = [(r, c) for r, c in _once(digits) if c > 0]
    if not places:
        return None
    r, c = rng.choice(places)
    return f"which digit is left of the {digits[r][c]} ?", str(digits[r][c - 1])


def _read_row(digits: Cells, colours: Cells, rng: random.Random) -> Question:
    r = rng.randrange(GRID)
    return f"read the digits of row {r + 1} .", " ".join(map(str, digits[r]))


KINDS: dict[str, Callable[[Cells, Cells, random.Random], Question | None]] = {
    "arithmetic": _arithmetic,
    "digit_at": _digit_at,
    "colour_at": _colour_at,
    "colour_of": _colour_of,
    "digit_of": _digit_of,
    "count_digit": _count_digit,
    "count_colour": _count_colour,
    "any_digit": _any_digit,
    "any_colour": _any_colour,
    "largest": _largest,
    "left_of": _left_of,
    "read_row": _read_row,
}


def ask(kind: str, digits: Cells, colours: Cells, rng: random.Random) -> Question | None:
    """A question of this kind and its answer, or None where the scene allows none (say, no digit occurs once)."""
    return KINDS[kind](digits, colours, rng)


def samples(
    split: str, n: int, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS), style: str = "plain"
) -> Iterator[dict]:
    """Yields ``n`` samples ``{image, question, answer, kind}``: a new scene each, kinds in turn, images as PIL.

    The first samples are the same whatever ``n`` is.
    """
    from PIL import Image

    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"unknown question kinds {sorted(unknown)}: choose from {', '.join(KINDS)}")
    block = 64
    for index in range(n):
        if index % block == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            scenes = draw(block, split, generator, style=style)
            rng = random.Random(seed * 1_000_003 + index)
        kind = kinds[index % len(kinds)]
        place = index % block
        question = ask(kind, scenes.digits[place].tolist(), scenes.colours[place].tolist(), rng)
        offset = 1
        while question is None:  # the next scene of the block that allows the question
            place = (index + offset) % block
            question = ask(kind, scenes.digits[place].tolist(), scenes.colours[place].tolist(), rng)
            offset += 1
        yield {
            "image": Image.fromarray(scenes.images[place].numpy()),
            "question": question[0],
            "answer": question[1],
            "kind": kind,
        }


def vocabulary() -> list[str]:
    """Every word that questions and answers use."""
    words = "what which how many is are at the a of in there left largest digit digits colour row column plus read"
    return (words + " yes no ? .").split() + [str(i) for i in range(19)] + COLOUR_NAMES
