"""A dataclass as a parser: what its keys are called, what they hold, and how ``--help`` explains them."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser

from dyvte.ranges import range_of

WIDTH = 100


def hints_of(config_class: type) -> dict[str, Any]:
    """Types by dotted key; a key that holds keys of its own is there, too: its type is the dataclass."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        hints[name] = hint
        if is_dataclass(hint):
            hints |= {f"{name}.{inner}": inner_hint for inner, inner_hint in hints_of(hint).items()}
    return hints


def required_keys(config_class: type) -> list[str]:
    """Keys without a default."""
    return [f.name for f in fields(config_class) if f.default is MISSING and f.default_factory is MISSING]


def holds(hint: Any, kind: type) -> bool:
    """Whether a type, or one of the types it is a union of, is this one."""
    return kind in {get_origin(part) or part for part in _parts(hint)}


def expected(hint: Any) -> str:
    """What a key of this type must be, in words."""
    bounds = range_of(hint)
    words = [_words(part) for part in _parts(hint)]
    if bounds is not None:
        words[0] += f" {bounds}"
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _parts(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for part in get_args(hint) for inner in _parts(part)]
    return [hint]


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        items = {int: "whole numbers", float: "numbers"}
        return f"a list of {items.get(get_args(hint)[0], 'texts')}"
    if get_origin(hint) is dict or is_dataclass(hint):
        return "a mapping"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names[hint]


def parser_of(config_class: type, prog: str, examples: Sequence[str] = (), positional: str = "") -> ArgumentParser:
    """A parser of a dataclass's keys, dotted for dataclasses in it, in groups by the classes it is made of."""
    epilog = "Examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
    what = f"[{positional or 'CONFIG.yaml'}] [key=value ...]"
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} {what}",
        description=_about(config_class),
        epilog=epilog,
        formatter_class=partial(_Help, width=WIDTH, max_help_position=26),
        exit_on_error=False,
    )
    known: set[str] = set()
    for owner in [c for c in config_class.__mro__ if is_dataclass(c)]:
        names = owner.__dict__.get("__annotations__", {}).keys() - known  # a class may say more of a key of its base
        own = [f for f in fields(owner) if f.name in names]
        known |= names
        if own:
            title = "Keys of this command" if owner is config_class else _about(owner).splitlines()[0].rstrip(".")
            _add(parser.add_argument_group(title), owner, own, "")
    return parser


def _add(group: Any, owner: type, own: list[Field], prefix: str) -> None:
    hints = get_type_hints(owner, include_extras=True)
    docs = {entry.arg_name: entry.description or "" for entry in parse(owner.__doc__ or "").params}
    for one in own:
        hint, about = hints[one.name], _sentence(docs.get(one.name, ""))
        if is_dataclass(hint):
            _add(group, hint, list(fields(hint)), f"{prefix}{one.name}.")
            continue
        required = one.default is MISSING and one.default_factory is MISSING
        default = one.default if one.default_factory is MISSING else one.default_factory()
        usual = "Required." if required else "" if default is None else f"Default: {_shown(default)}."
        group.add_argument(
            f"--{prefix}{one.name}",
            type=hint,
            default=None if required else default,
            help=f"{about} {usual}".strip().replace("%", "%%"),
        )


def _about(cls: type) -> str:
    parsed = parse(cls.__doc__ or "")
    return _plain("\n".join(part for part in (parsed.short_description, parsed.long_description) if part))


def _sentence(text: str) -> str:
    text = " ".join(_plain(text).split())
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def _plain(text: str) -> str:
    """Without the marks of reStructuredText."""
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"\1", text)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return str(default).replace("'", "") if isinstance(default, dict) else str(default)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keys as they are written, ``key=value``, without argparse's dashes and capitals."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return "--help" if action.dest == "help" else action.dest
