"""The folder of an evaluation: what its rows were made with, the rows themselves, times, pictures and the summary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from dyvte.data import Sample
from dyvte.provenance import atomic_path, atomic_write, claim, describe, differing, fingerprint, read_json, write_json

PICTURE_SIDE = 320  # pixels


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Changes with the ids, questions and answers of samples."""
    return fingerprint([[sample.id, sample.question, sample.answers] for sample in samples])


class ResultFolder:
    """Reads and writes the files that :mod:`dyvte.evaluation.runner` names."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def claim(self, settings: dict[str, Any], policies: Mapping[str, Any]) -> None:
        """Notes what the rows will be made with, or checks it against what they were made with.

        Raises:
            ValueError: other settings, or another policy of the same name.
        """

        def merged(noted: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
            known = {name: policy for name, policy in record["policies"].items() if name in noted["policies"]}
            other = differing(noted["settings"], record["settings"]) | differing(noted["policies"], known)
            if other:
                raise ValueError(
                    f"{self.path} holds results made with another {', '.join(other)}: "
                    "choose another folder, or another name for a changed policy, or remove the old results"
                )
            return record | {"policies": noted["policies"] | record["policies"]}

        described = {name: describe(policy) for name, policy in policies.items()}
        claim(self.path / "config.json", {"settings": settings, "policies": described}, merged)

    def read_rows(self, policy: str) -> dict[str, dict[str, Any]]:
        """Rows by sample id; a last line that was cut off by a crash is removed from the file."""
        path = self._rows(policy)
        if not path.exists():
            return {}
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            atomic_write(path, "".join(lines))
        try:
            return {row["id"]: row for row in map(json.loads, lines)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and its rows are made again") from error

    @contextmanager
    def row_files(self, policies: Iterable[str]) -> Iterator[dict[str, TextIO]]:
        """The policies' files of rows, open to add to."""
        with ExitStack() as files:
            yield {name: files.enter_context(self._rows(name).open("a")) for name in policies}

    def _rows(self, policy: str) -> Path:
        return self.path / f"{policy}.jsonl"

    def save_picture(self, index: int, sample: Sample) -> None:
        """Keeps a small copy of a sample's first image, if it has one."""
        path = self.path / "images" / f"{index}.png"
        if sample.images and not path.exists():
            path.parent.mkdir(exist_ok=True)
            picture = sample.images[0].copy()
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            with atomic_path(path) as fresh:
                picture.save(fresh)

    def read_timing(self) -> dict[str, Any]:
        """Times by policy, as far as they were measured."""
        path = self.path / "timing.json"
        return read_json(path, "remove it, and time is measured again") if path.exists() else {}

    def write_timing(self, timing: Mapping[str, Any]) -> None:
        write_json(self.path / "timing.json", timing)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)
