"""Numbers with bounds: ``Annotated[int, Range(least=1)]`` as the type of a dataclass field, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a finite number; ``above`` and ``below`` are not reached."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        lower = f"{self.least} or more" if self.above is None else f"above {self.above}"
        if self.least is None and self.above is None:
            return "finite"
        if self.most is None and self.below is None:
            return lower
        return f"{lower} and {f'at most {self.most}' if self.below is None else f'below {self.below}'}"

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
OpenShare = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0)]
Nonnegative = Annotated[float, Range(least=0)]


def range_of(hint: Any) -> Range | None:
    """The bounds in a type, also in ``Count | None``."""
    for part in (hint, *get_args(hint)):
        for note in getattr(part, "__metadata__", ()):
            if isinstance(note, Range):
                return note
    return None


class Checked:
    """A dataclass whose numbers keep to the bounds of their types.

    Raises:
        ValueError: a number outside its bounds.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            bounds, value = range_of(hint), getattr(self, name)
            if bounds is not None and isinstance(value, (int, float)) and value not in bounds:
                raise ValueError(f"{name} must be {bounds}, not {value}")
