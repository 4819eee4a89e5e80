"""Values of rows by the names of their columns, and the templates that use them.

A column is named by its name, by a dotted path into dictionaries and lists of them (``answers.answer``), or by several
of these in a list (options A, B, C ...; several images; an id made of two columns).
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any

Column = str | list[str]
EMPTY = (None, "", "nan", "None")
TURNS = ({"from", "value"}, {"role", "content"})  # the fields of a conversation's turns, in either layout


def head(column: str) -> str:
    """The top of a dotted path."""
    return column.split(".")[0]


def as_names(column: Column | None) -> list[str]:
    return column if isinstance(column, list) else [] if column is None else [column]


def overlap(column: Column | None, other: Column | None) -> list[str]:
    """What one names of the other: the same column, or one inside it."""
    return [
        name
        for name in as_names(column)
        for path in as_names(other)
        if name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.")
    ]


def check_columns(names: Iterable[str], column: Column) -> None:
    """Raises ``ValueError`` if a column is none of ``names``."""
    for name in as_names(column):
        if name not in names and head(name) not in names:
            raise ValueError(f"there is no column {name!r}: the data set has {', '.join(names)}")


def value_at(row: Mapping[str, Any], column: Column | None) -> Any:
    """The value of a column; a dotted path goes through every entry of a list."""
    if column is None:
        return None
    if isinstance(column, list):
        return [value_at(row, part) for part in column]
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = [v[part] for v in value] if isinstance(value, list) else value[part]
    return value


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return "" if value in EMPTY else str(value).strip()


def is_blank(value: Any) -> bool:
    """Nothing: None, a number that is none, a text of spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, questions and answers among each other."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and isinstance(value[0], Mapping)
        and any(fields <= set(value[0]) for fields in TURNS)
    )


def template_fields(template: str) -> set[str]:
    """The fields of a template for ``str.format``.

    Raises:
        ValueError: it is no template.
    """
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the prompt {template!r} is not a template: {error}; write {{{{ for a brace") from error


def check_template(template: str, known: set[str]) -> None:
    """Raises ``ValueError`` if a template uses a field that no column fills."""
    unknown = template_fields(template) - known
    if unknown:
        raise ValueError(
            f"the prompt uses {sorted(unknown)}, which no column fills: "
            f"add them to `columns`, or use {', '.join(sorted(known))}"
        )
