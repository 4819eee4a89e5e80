"""Questions about a scene: twelve kinds, from those that need no image to those that need all of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from dyvte.data.scenes.drawing import COLOUR_NAMES, COLOURS, GRID

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


def vocabulary() -> list[str]:
    """Every word that questions and answers use."""
    words = "what which how many is are at the a of in there left largest digit digits colour row column plus read"
    return (words + " yes no ? .").split() + [str(i) for i in range(19)] + COLOUR_NAMES
