"""What a data config may say.

A source is described by a mapping, usually read from YAML::

    path: lmms-lab/ChartQA          # hub id, or a local folder of parquet, arrow, json or csv files
    split: test
    columns: {image: image, question: question, answers: answer, kind: type}
    prompt: "{question}\\nAnswer the question using a single word or phrase."
    limit: 500

``format`` says how its rows are laid out (columns, LLaVA's conversations, messages), and ``scenes: {split: dev,
n: 2000, seed: 0}`` are the project's own. ``KEYS`` lists everything, docs/data.md explains it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dyvte.yaml_files import read_yaml

KEYS = {
    "path": "hub id, local folder or file",
    "format": "layout of the rows: table (the default), llava or messages",
    "name": "configuration of the data set",
    "split": "split to read",
    "revision": "revision on the hub",
    "columns": "which column holds image, question, answers, choices, id, kind; further names are for the prompt. "
    "Of conversations: messages, image, id, kind, system",
    "images": "folder of the image files of conversations; of a table, images kept in another table: "
    "{name, split, key, image, reference}",
    "turns": "which turns of a conversation are asked about: first (the default), single or all",
    "prompt": "template of the question; {choices} is the lettered list",
    "optional": "text for a field of the prompt, used where the field is not empty",
    "where": "keep the rows whose column has one of these values",
    "skip": "samples left out at the beginning, after the shuffle: what others have used",
    "limit": "number of samples",
    "fraction": "number of samples, as a share of all: 0.01 is 1 %",
    "seed": "shuffle before the limit is applied",
    "max_characters": "longest text of a sample",
    "scenes": "the project's scenes: {split, n, seed, kinds, style}",
    "metric": "how answers are scored, see dyvte.evaluation.metrics",
    "max_new_tokens": "length of an answer",
    "template": "chat template for processors that have none",
}
COUNTS = (
    ("limit", 1, "samples"),
    ("skip", 0, "samples"),
    ("max_characters", 1, "characters"),
    ("max_new_tokens", 1, "tokens"),
)
SCORING = ("metric", "max_new_tokens", "template")  # what does not change the samples


def read_config(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """A config from a YAML file, or the mapping itself.

    Raises:
        ValueError: there is no such file, or it holds no mapping.
    """
    if isinstance(source, Mapping):
        return dict(source)
    return read_yaml(source, "data config")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for what is wrong with a config whatever its source is."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a data config is a mapping with the keys {', '.join(KEYS)}, not {type(config).__name__}")
    unknown = set(config) - set(KEYS)
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in the data config: choose from {', '.join(KEYS)}")
    if ("scenes" in config) == ("path" in config):
        raise ValueError("a data config needs one of `scenes: {split, n, seed}` and `path: <hub id or folder>`")
    for key, least, unit in COUNTS:
        if config.get(key) is not None and (not _is_whole(config[key]) or config[key] < least):
            raise ValueError(f"{key} must be a number of {unit}, {least} or more, not {config[key]!r}")
    for key in ("prompt", "metric", "template"):
        if config.get(key) is not None and not isinstance(config[key], str):
            raise ValueError(f"{key} must be text, not {config[key]!r}")
    if config.get("seed") is not None and not _is_whole(config["seed"]):
        raise ValueError(f"seed must be a whole number, not {config['seed']!r}")
    fraction = config.get("fraction")
    if fraction is None:
        return
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must be a share of the samples, above 0 and at most 1, not {fraction!r}")
    if config.get("limit") is not None:
        raise ValueError("limit and fraction both say how many samples to use: give one of them")
    if config.get("seed") is None:
        raise ValueError("fraction needs a seed: mixtures are sorted by their parts, and the first rows are all alike")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
