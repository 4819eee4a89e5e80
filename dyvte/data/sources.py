"""Questions about images, from the project's scenes or from any ``datasets`` source, as one kind of sample.

A source is described by a mapping, usually read from YAML::

    path: lmms-lab/ChartQA          # hub id, or a local folder of parquet, arrow, json or csv files
    name: null                      # configuration of the data set, if it has several
    split: test
    columns: {image: image, question: question, answers: answer, kind: type}
    prompt: "{question}\\nAnswer the question using a single word or phrase."
    limit: 500

or, for the project's own scenes, ``scenes: {split: dev, n: 2000, seed: 0}``. ``KEYS`` lists everything it may hold.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets
import yaml
from PIL import Image
from transformers import BatchFeature

from dyvte.data import scenes

KEYS = {
    "path": "hub id or local folder",
    "name": "configuration of the data set",
    "split": "split to read",
    "revision": "revision on the hub",
    "columns": "which column holds image, question, answers, choices, id, kind; further names are for the prompt",
    "images": "images kept in another table: {name, split, key, image, reference}",
    "prompt": "template of the question; {choices} is the lettered list",
    "optional": "text for a field of the prompt, used where the field is not empty",
    "where": "keep the rows whose column has one of these values",
    "skip": "samples left out at the beginning, after the shuffle: what others have used",
    "limit": "number of samples",
    "seed": "shuffle before the limit is applied",
    "scenes": "the project's scenes: {split, n, seed, kinds, style}",
    "metric": "how answers are scored, see dyvte.metrics",
    "max_new_tokens": "length of an answer",
    "template": "chat template for processors that have none",
}
SCENE_KEYS = {"split", "n", "seed", "kinds", "style"}
IMAGE_KEYS = {"name", "split", "key", "image", "reference"}
SCORING = ("metric", "max_new_tokens", "template")  # what does not change the samples
# For generate(): the most likely token, whatever the model's own generation config would do to it.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
EMPTY = (None, "", "nan", "None")


@dataclass(frozen=True)
class Sample:
    """One question about any number of images.

    Attributes:
        id: unique within its source.
        images: RGB, in the order of the prompt.
        question: the prompt's text, template applied.
        answers: accepted answers, or one answer per annotator; with ``choices``, the letter of the right one.
        choices: the options of a multiple-choice question, in the order A, B, C ...; else empty.
        kind: a group to report on, such as the question type.
    """

    id: str
    images: list[Image.Image]
    question: str
    answers: list[str]
    choices: list[str]
    kind: str


def read_config(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """A config from a YAML file, or the mapping itself.

    Raises:
        ValueError: there is no such file, or it holds no mapping.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"there is no data config {path}: give a YAML file such as configs/data/gqa.yaml")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} must hold a mapping with the keys {', '.join(KEYS)}")
    return dict(config)


def load_samples(config: Mapping[str, Any]) -> Sequence[Sample]:
    """The samples a config describes; images are decoded when a sample is read.

    Raises:
        ValueError: the config is wrong; the message names the fault and the remedy.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a data config is a mapping with the keys {', '.join(KEYS)}, not {type(config).__name__}")
    unknown = set(config) - set(KEYS)
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in the data config: choose from {', '.join(KEYS)}")
    if ("scenes" in config) == ("path" in config):
        raise ValueError("a data config needs one of `scenes: {split, n, seed}` and `path: <hub id or folder>`")
    for key, least in (("limit", 1), ("skip", 0)):
        if config.get(key) is not None and (not isinstance(config[key], int) or config[key] < least):
            raise ValueError(f"{key} must be a number of samples, {least} or more, not {config[key]!r}")
    return SceneSamples(config) if "scenes" in config else TableSamples(config)


def fingerprint(config: Mapping[str, Any]) -> str:
    """16 hex digits that change with whatever determines the samples; for a folder, with its files' names and sizes."""
    kept = {key: value for key, value in config.items() if key not in SCORING and value is not None}
    folder = Path(str(kept.get("path", "")))
    if "path" in kept and folder.is_dir():
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        kept["path"] = [[p.relative_to(folder).as_posix(), p.stat().st_size] for p in files]
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Runs of ``batch_size`` samples; the last one may be shorter."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    for start in range(0, len(samples), batch_size):
        yield [samples[i] for i in range(start, min(start + batch_size, len(samples)))]


def encode(processor: Any, samples: Sequence[Sample], template: str | None = None) -> BatchFeature:
    """The prompts of a batch as a model takes them: left-padded ids, their mask, the pixels of all images.

    Args:
        processor: an ``AutoProcessor`` of a multimodal model.
        samples: the batch; the images of a sample come before its text.
        template: a Jinja chat template, where the processor has none.

    Raises:
        ValueError: no sample, or no chat template.
    """
    if len(samples) == 0:
        raise ValueError("there is nothing to encode: give at least one sample")
    if template is None and getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so it does not say what a prompt looks like: "
            "give one as `template` in the data config (a Jinja template over `messages`)"
        )
    texts = [_prompt_text(processor, sample, template) for sample in samples]
    images: Any = [sample.images for sample in samples]
    if not all(images):  # a nested list with empty entries is not understood everywhere; a flat one is
        images = [image for some in images for image in some] or None
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return processor(
        images=images,
        text=texts,
        padding=True,
        padding_side="left",
        # A template that writes the first token itself must not get a second one.
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


def _prompt_text(processor: Any, sample: Sample, template: str | None) -> str:
    content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    chosen = {} if template is None else {"chat_template": template}
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chosen)


class Source(Sequence[Sample]):
    """Samples by index; a slice gives a list.

    Attributes:
        fingerprint: see :func:`fingerprint`.
    """

    fingerprint: str

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.read(index % len(self))

    def read(self, index: int) -> Sample:
        """Sample ``index``, 0 ... len - 1."""
        raise NotImplementedError


class SceneSamples(Source):
    """The project's scenes of handwritten digits (see :mod:`dyvte.data.scenes`)."""

    def __init__(self, config: Mapping[str, Any]):
        settings = config["scenes"]
        if not isinstance(settings, Mapping) or not {"split", "n"} <= set(settings) <= SCENE_KEYS:
            raise ValueError(
                f"`scenes` must be a mapping with split and n, and seed, kinds and style if wanted: {settings!r}"
            )
        others = set(config) - {"scenes", "prompt", "limit", *SCORING}
        if others:
            raise ValueError(f"scenes take no {sorted(others)}: give split, n, seed, kinds and style under `scenes`")
        if not isinstance(settings["n"], int) or settings["n"] < 1:
            raise ValueError(f"scenes.n must be a number of samples, 1 or more, not {settings['n']!r}")
        kinds = tuple(settings.get("kinds") or scenes.KINDS)
        n = min(settings["n"], config.get("limit") or settings["n"])
        prompt = config.get("prompt") or "{question}"
        _fields_of(prompt, {"question"})
        self.fingerprint = fingerprint(config)
        self.name = "-".join(
            ["scenes", settings["split"], str(settings.get("seed", 0)), *(settings.get("kinds") or [])]
        )
        self.prompt = prompt
        self.rows = list(
            scenes.samples(settings["split"], n, settings.get("seed", 0), kinds, settings.get("style", "plain"))
        )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        row = self.rows[index]
        question = self.prompt.format(question=row["question"])
        return Sample(f"{self.name}-{index}", [row["image"]], question, [row["answer"]], [], row["kind"])


class TableSamples(Source):
    """Rows of a ``datasets`` table, columns mapped as the config says.

    A column is named by its name, by a dotted path into dictionaries and lists of them (``answers.answer``), or by
    several of these in a list (options A, B, C ...; several images; an id made of two columns).
    """

    def __init__(self, config: Mapping[str, Any]):
        columns = config.get("columns")
        if not isinstance(columns, Mapping) or "question" not in columns:
            raise ValueError(
                "`columns` must say which column is the question: a mapping of image, question, answers, choices, id, "
                f"kind to columns, not {columns!r}"
            )
        self.fingerprint = fingerprint(config)
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.folder = Path(str(config["path"]))
        self.table = _load(config, config.get("name"), config.get("split"))
        for column in self.columns.values():
            _check_columns(self.table, column)
        self.prompt = config.get("prompt") or "{question}"
        self.optional = dict(config.get("optional") or {})
        _fields_of(self.prompt, {*self.columns, "question", "choices"})
        for name, text in self.optional.items():
            if name not in self.columns:
                raise ValueError(f"`optional` has {name!r}, which no column fills: add it to `columns`")
            _fields_of(text, set(self.columns))
        ids = self._unique_ids()
        chosen = self._select(config)
        self.table, self.ids = self.table.select(chosen), [ids[i] for i in chosen]
        self._join_images(config)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Sample:
        row = self.table[index]
        choices = self._choices(row)
        fields = {name: _text(self._value(row, name)) for name in self.columns if name not in ("image", "choices")}
        fields["choices"] = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices) if choice)
        for name, text in self.optional.items():
            fields[name] = text.format_map(fields) if fields[name] else ""
        return Sample(
            id=self.ids[index],
            images=self._images(row),
            question=self.prompt.format_map(fields),
            answers=self._answers(row, choices),
            choices=choices,
            kind=fields.get("kind") or "all",
        )

    def _select(self, config: Mapping[str, Any]) -> list[int]:
        """The rows to use, in order, as numbers of the whole table."""
        chosen = list(range(len(self.table)))
        for column, allowed in (config.get("where") or {}).items():
            if column not in self.table.column_names:
                raise ValueError(f"no column {column!r} to choose by: there are {', '.join(self.table.column_names)}")
            allowed = allowed if isinstance(allowed, list) else [allowed]
            values = list(self.table[column])
            chosen = [i for i in chosen if values[i] in allowed]
            if not chosen:
                present = sorted({str(value) for value in values})[:20]
                raise ValueError(f"no row has {column} in {allowed}: the column holds {', '.join(present)}")
        if config.get("seed") is not None:
            random.Random(config["seed"]).shuffle(chosen)
        start = config.get("skip") or 0
        chosen = chosen[start : None if config.get("limit") is None else start + config["limit"]]
        if not chosen:
            raise ValueError(
                f"{config['path']} has no rows left in split {config.get('split')!r}: check skip and where"
            )
        return chosen

    def _unique_ids(self) -> list[str]:
        """The id column, numbered where it repeats, else the row numbers."""
        column = self.columns.get("id")
        if column is None:
            return [str(i) for i in range(len(self.table))]
        names = column if isinstance(column, list) else [column]
        parts = self.table.select_columns(sorted({_head(name) for name in names}))
        ids = ["/".join(_text(_reach(row, name)) for name in names) for row in parts]
        seen: Counter[str] = Counter()
        for i, name in enumerate(ids):
            seen[name] += 1
            if seen[name] > 1:
                ids[i] = f"{name}#{seen[name]}"
        return ids

    def _join_images(self, config: Mapping[str, Any]) -> None:
        self.shared: tuple[Any, dict[Any, int], str, str] | None = None
        settings = config.get("images")
        if settings is None:
            return
        if not isinstance(settings, Mapping) or not {"key", "image", "reference"} <= set(settings) <= IMAGE_KEYS:
            raise ValueError(f"`images` must be a mapping with {', '.join(sorted(IMAGE_KEYS))}, not {settings!r}")
        table = _load(config, settings.get("name"), settings.get("split", config.get("split")))
        _check_columns(table, [settings["key"], settings["image"]])
        _check_columns(self.table, settings["reference"])
        place = {key: i for i, key in enumerate(table[settings["key"]])}
        missing = [key for key in self.table[settings["reference"]] if key not in place]
        if missing:
            raise ValueError(f"{len(missing)} images are missing from column {settings['key']}, such as {missing[0]!r}")
        self.shared = (table, place, settings["image"], settings["reference"])

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        column = self.columns.get(name)
        if isinstance(column, list):
            return [_reach(row, part) for part in column]
        return None if column is None else _reach(row, column)

    def _images(self, row: Mapping[str, Any]) -> list[Image.Image]:
        value = self._value(row, "image")
        if self.shared is not None:
            table, place, image, on = self.shared
            value = _reach(table[place[row[on]]], image)
        values = value if isinstance(value, list) else [value]
        return [_picture(v, self.folder) for v in values if v is not None]

    def _choices(self, row: Mapping[str, Any]) -> list[str]:
        value = self._value(row, "choices")
        choices = ["" if v in EMPTY else str(v) for v in value or []]
        while choices and not choices[-1]:
            choices.pop()
        return choices

    def _answers(self, row: Mapping[str, Any], choices: list[str]) -> list[str]:
        value = self._value(row, "answers")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(v, Mapping) for v in values):
            column, field = self.columns["answers"], next(iter(values[0]))
            raise ValueError(f"column {column} holds dictionaries: name one of their fields, as in {column}.{field}")
        if choices:
            values = [chr(65 + v) if isinstance(v, int) else v for v in values]
        return [str(v) for v in values]


def _load(config: Mapping[str, Any], name: str | None, split: str | None) -> datasets.Dataset:
    path = Path(str(config["path"]))
    if name is not None and (path / name).is_dir() and not (path / "README.md").exists():
        path, name = path / name, None  # a folder for each configuration, without the card that names them
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset(str(path), name, split=split, revision=config.get("revision"))
    except Exception as error:  # the library raises a dozen kinds, all of which mean a wrong source
        raise ValueError(
            f"cannot load {path} (configuration {name!r}): {error}. Give the id of a data set on the hub or a folder "
            "of parquet, arrow, json or csv files as `path`, and its configuration as `name`"
        ) from error
    if isinstance(table, datasets.Dataset):
        return table
    if split is None and len(table) == 1:
        split = next(iter(table))
    if split not in table:
        raise ValueError(f"{path} has no split {split!r}: choose from {', '.join(map(str, table))}")
    return table[split]


def _head(column: str) -> str:
    return column.split(".")[0]


def _check_columns(table: datasets.Dataset, columns: str | list[str]) -> None:
    for column in columns if isinstance(columns, list) else [columns]:
        if column not in table.column_names and _head(column) not in table.column_names:
            raise ValueError(f"there is no column {column!r}: the data set has {', '.join(table.column_names)}")


def _reach(row: Any, column: str) -> Any:
    """The value at a dotted path; the path goes through every entry of a list."""
    if column in row:
        return row[column]
    value = row
    for part in column.split("."):
        value = [v[part] for v in value] if isinstance(value, list) else value[part]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value in EMPTY else str(value).strip()


def _fields_of(template: str, known: set[str]) -> None:
    """Raises ``ValueError`` if a template uses a field that no column fills."""
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the prompt {template!r} is not a template: {error}; write {{{{ for a brace") from error
    if used - known:
        raise ValueError(
            f"the prompt uses {sorted(used - known)}, which no column fills: "
            f"add them to `columns`, or use {', '.join(sorted(known))}"
        )


def _picture(value: Any, folder: Path) -> Image.Image:
    """A PIL image, its bytes, or its file (relative to the data set's folder) as RGB."""
    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    elif isinstance(value, bytes):
        value = io.BytesIO(value)
    if isinstance(value, str):
        value = folder / value
    if isinstance(value, (io.BytesIO, Path)):
        value = Image.open(value)
    if not isinstance(value, Image.Image):
        raise ValueError(f"an image is a picture, its bytes or its file name, not {type(value).__name__}")
    return value.convert("RGB")
