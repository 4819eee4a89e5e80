"""A command line as a typed config: a YAML file, then ``key=value`` pairs whose dots reach into mappings."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError

from dyvte.cli.schema import expected, hints_of, holds, parser_of, required_keys
from dyvte.yaml_files import parse_yaml, read_yaml

Config = TypeVar("Config")

HELP = {"-h", "--help"}
PAIR = re.compile(r"(?P<path>[A-Za-z_][\w+@-]*(\.[\w+@-]+)*)=(?P<text>.*)", re.DOTALL)


def read_arguments(
    config_class: type[Config],
    arguments: Sequence[str] | None = None,
    *,
    prog: str,
    examples: Sequence[str] = (),
    positional: str | None = None,
) -> Config:
    """The config that a command line asks for; ``--help`` explains it, and a fault ends the program with exit code 2.

    ::

        PROG [CONFIG.yaml] [key=value ...]        also --key=value and --key value

    Later pairs win over earlier ones, all of them over the file. Dots reach into settings (``fit.lr=1e-3``), into
    mappings (``data.scenes.n=500``) and into a mapping that is named as a YAML file (``data=gqa.yaml data.limit=7``).
    ``--local_rank=N``, which the ``deepspeed`` launcher adds, goes into the environment as LOCAL_RANK if unset.

    Args:
        config_class: a dataclass; its docstring and types are the help text.
        arguments: those of this process if not given.
        prog: what the user calls.
        examples: whole command lines for the help text.
        positional: the key that the first argument sets, for a program that reads no YAML file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if HELP & set(arguments):
        parser_of(config_class, prog, examples, positional or "").print_help()
        sys.exit(0)
    try:
        return parse_arguments(config_class, arguments, prog=prog, positional=positional)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(
    config_class: type[Config], arguments: Sequence[str], *, prog: str, positional: str | None = None
) -> Config:
    """:func:`read_arguments` for callers who handle its faults.

    Raises:
        ValueError: an unreadable file, an unknown key, one that is missing, or a value of the wrong type or size.
    """
    hints = hints_of(config_class)
    first, pairs = _split(arguments, hints)
    if first is not None and positional is not None:
        first, pairs = None, [(positional, first), *pairs]
    config = read_yaml(first) if first is not None else {}
    for path, text in pairs:
        _assign(config, path, text, hints)
    _check_keys(config, config_class, hints, prog)
    return _typed(config_class, config, hints, prog)


def named_keys(arguments: Sequence[str]) -> set[str]:
    """The keys that a command line sets, those of its YAML file included; faults are left to :func:`read_arguments`."""
    try:
        first, pairs = _split([argument for argument in arguments if argument not in HELP], {})
        config = read_yaml(first) if first is not None else {}
    except ValueError:
        return set()
    return {*config, *(path for path, _ in pairs)}


def _split(arguments: Sequence[str], hints: Mapping[str, Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """The positional argument, if there is one, and the keys with their texts."""
    first, pairs, rest = None, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option = argument.startswith("--")
        pair = PAIR.fullmatch(argument[2:] if option else argument)
        if option and pair is None:
            path = argument[2:]
            if hints.get(path) is bool and (not rest or rest[0].lower() not in ("true", "false", "yes", "no")):
                rest.insert(0, "true")
            if not rest:
                raise ValueError(f"{argument} has no value: write {path}=VALUE")
            pair = PAIR.fullmatch(f"{path}={rest.pop(0)}")
        if pair is not None:
            path, text = pair["path"], pair["text"]
            if not text:
                raise ValueError(f"{path} has no value: write {path}=VALUE, or {path}=null for none")
            if path in ("local_rank", "local-rank"):
                os.environ.setdefault("LOCAL_RANK", text)
            else:
                pairs.append((path, text))
        elif option or argument.startswith("-") or first is not None or pairs:
            raise ValueError(f"{argument!r} is not key=value: write for example batch_size=4 or data.limit=100")
        else:
            first = argument
    return first, pairs


def _assign(config: dict[str, Any], path: str, text: str, hints: Mapping[str, Any]) -> None:
    """Sets a key, however deep; mappings on the way are made, or read from the YAML file that stands for them."""
    *outer, last = path.split(".")
    place, so_far = config, ""
    for name in outer:
        so_far = f"{so_far}.{name}".lstrip(".")
        inner = place.get(name)
        if isinstance(inner, str) and Path(inner).suffix in (".yaml", ".yml"):
            inner = read_yaml(inner, f"file of {so_far}")
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(f"{so_far} is {inner!r} and has no keys: {path} needs a mapping or a YAML file there")
        place[name] = place = dict(inner or {})
    jinja = text.startswith(("{{", "{%"))  # what no mapping starts with
    marked = text.lstrip().startswith(("{", "[", '"', "'"))
    place[last] = parse_yaml(text, f"the value of {path}") if not jinja and (path not in hints or marked) else text


def _check_keys(config: Mapping[str, Any], config_class: type, hints: Mapping[str, Any], prog: str) -> None:
    for name, inner in _dotted(config, hints):
        if name not in hints:
            outer, dot, last = name.rpartition(".")
            choices = [h.removeprefix(f"{outer}.") for h in hints if h.rpartition(".")[0] == outer]
            near = [f"{outer}{dot}{c}" for c in difflib.get_close_matches(last, choices, n=1)]
            near += [h for h in hints if h.rpartition(".")[2] == last]
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
            raise ValueError(f"unknown key {name} for `{prog}`: {remedy}")
        if is_dataclass(hints[name]) and not isinstance(inner, (Mapping, type(None))):
            raise ValueError(f"{name} must be {expected(hints[name])}, not {inner!r}")
    missing = [name for name in required_keys(config_class) if config.get(name) is None]
    if missing:
        raise ValueError(f"`{prog}` needs {', '.join(missing)}: set them in the config file or as key=value")


def _dotted(config: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys and values, those of settings within settings with dots; free mappings stay whole."""
    found = []
    for name, value in config.items():
        found.append((f"{prefix}{name}", value))
        if is_dataclass(hints.get(f"{prefix}{name}")) and isinstance(value, Mapping):
            found += _dotted(value, hints, f"{prefix}{name}.")
    return found


def _typed(config_class: type[Config], config: Mapping[str, Any], hints: Mapping[str, Any], prog: str) -> Config:
    given = {name: value for name, value in _dotted(config, hints) if not is_dataclass(hints[name])}
    # Free mappings are the business of whoever takes them; the parser would read numbers into their texts.
    free = {name: value for name, value in given.items() if isinstance(value, dict) and holds(hints[name], dict)}
    parser = parser_of(config_class, prog)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in free:
            values[name] = value
            continue
        try:
            values[name] = parser.parse_object({name: value}, defaults=False)[name]
        except (ArgumentError, TypeError, ValueError):
            raise ValueError(f"{name} must be {expected(hints[name])}, not {value!r}") from None
    return _made(config_class, values, "")


def _made(config_class: type[Config], values: Mapping[str, Any], prefix: str) -> Config:
    own: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for name, hint in hints_of(config_class).items():
        if is_dataclass(hint) and "." not in name:
            inner = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
            own[name] = _made(hint, inner, f"{prefix}{name}.")
    try:
        return config_class(**own)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
