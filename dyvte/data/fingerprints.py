"""Which data this is: by description, in no time, and by content, whatever its files and ids are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dyvte.data.config import SCORING
from dyvte.data.samples import Sample


def fingerprint(config: Mapping[str, Any]) -> str:
    """16 hex digits that change with whatever a config says about its samples, read without the samples.

    Of a folder they know the names and sizes of the files, of a single file its content; the folder of a
    conversation's pictures has no say. What the samples are is told by :func:`dataset_digest`.
    """
    kept = {key: value for key, value in config.items() if key not in SCORING and value is not None}
    path = Path(str(kept.get("path", "")))
    if "path" in kept and path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        kept["path"] = [[p.relative_to(path).as_posix(), p.stat().st_size] for p in files]
    elif "path" in kept and path.is_file():
        with path.open("rb") as file:
            kept["path"] = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(kept.get("images"), str):
        del kept["images"]
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def image_digest(image: Image.Image) -> str:
    """SHA-256 of size and RGB pixels. Another version of a JPEG decoder may give other pixels."""
    image = image.convert("RGB")
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def sample_digest(sample: Sample, images: Sequence[str] | None = None) -> str:
    """SHA-256 of all a model is shown: system prompt, earlier turns, question and pixels, each in its place.

    Neither the id nor the names of files count, nor do the answers.

    Args:
        sample: the sample.
        images: :func:`image_digest` of each of its images, where they are known.
    """
    pixels = iter([image_digest(image) for image in sample.images] if images is None else images)
    shown = [
        [message["role"], [next(pixels) if part["type"] == "image" else [part["text"]] for part in message["content"]]]
        for message in sample.messages()
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def first_bits(digest: str) -> int:
    """The first 64 bits of a hexadecimal digest, signed: enough to tell millions of samples apart."""
    return int.from_bytes(bytes.fromhex(digest[:16]), "little", signed=True)


class DatasetDigest:
    """SHA-256 of samples and their answers in order, built up sample by sample."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, sample: str, answers: Sequence[str]) -> None:
        """Adds a sample, by its :func:`sample_digest`, and its accepted answers."""
        self._digest.update(json.dumps([sample, list(answers)]).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def dataset_digest(samples: Iterable[Sample]) -> str:
    """The :class:`DatasetDigest` of samples; every image is read, one sample at a time."""
    digest = DatasetDigest()
    for sample in samples:
        digest.update(sample_digest(sample), sample.answers)
    return digest.hexdigest()
