"""Mappings from YAML, with the numbers of YAML 1.2 (``1e-3`` is one) and no key twice."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text says.

    Args:
        source: where it comes from, for messages.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source} is not YAML{where}: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: str | os.PathLike, kind: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Args:
        kind: what the file is, for messages.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the {kind} {path} is a folder: give a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no {kind} {path}: give a YAML file, or key=value pairs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the {kind} {path} cannot be read: {error}") from None
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, not {type(content).__name__}")
    return content
