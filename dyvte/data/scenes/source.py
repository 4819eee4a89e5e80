"""Scenes and their questions as samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image

from dyvte.data.columns import check_template
from dyvte.data.config import SCORING
from dyvte.data.fingerprints import fingerprint
from dyvte.data.samples import Sample, Source
from dyvte.data.scenes.drawing import draw
from dyvte.data.scenes.questions import KINDS, ask

SCENE_KEYS = {"split", "n", "seed", "kinds", "style"}


def samples(
    split: str, n: int, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS), style: str = "plain"
) -> Iterator[dict]:
    """Yields ``n`` samples ``{image, question, answer, kind}``: a new scene each, kinds in turn, images as PIL.

    The first samples are the same whatever ``n`` is.
    """
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


class SceneSamples(Source):
    """The project's scenes of handwritten digits."""

    def __init__(self, config: Mapping[str, Any]):
        settings = config["scenes"]
        if not isinstance(settings, Mapping) or not {"split", "n"} <= set(settings) <= SCENE_KEYS:
            raise ValueError(
                f"`scenes` must be a mapping with split and n, and seed, kinds and style if wanted: {settings!r}"
            )
        others = set(config) - {"scenes", "prompt", "limit", *SCORING}
        if others:
            raise ValueError(f"scenes take no {sorted(others)}: give split, n, seed, kinds and style under `scenes`")
        _check_settings(settings)
        self.prompt = config.get("prompt") or "{question}"
        check_template(self.prompt, {"question"})
        n = min(settings["n"], config.get("limit") or settings["n"])
        seed, kinds = settings.get("seed", 0), settings.get("kinds") or []
        self.fingerprint = fingerprint(config)
        self.origin = "-".join(["scenes", settings["split"], str(seed), *kinds])
        self.rows = list(samples(settings["split"], n, seed, tuple(kinds or KINDS), settings.get("style", "plain")))
        self.ids = [f"{self.origin}-{i}" for i in range(n)]

    def read(self, index: int) -> Sample:
        row = self.rows[index]
        question = self.prompt.format(question=row["question"])
        return Sample(self.ids[index], [row["image"]], question, [row["answer"]], [], row["kind"])


def _check_settings(settings: Mapping[str, Any]) -> None:
    n, seed, kinds = settings["n"], settings.get("seed", 0), settings.get("kinds") or []
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"scenes.n must be a number of samples, 1 or more, not {n!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"scenes.seed must be a whole number, not {seed!r}")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"scenes.kinds must be a list, of {', '.join(KINDS)}, not {kinds!r}")
    for key in ("split", "style"):
        if not isinstance(settings.get(key, ""), str):
            raise ValueError(f"scenes.{key} must be text, not {settings[key]!r}")
