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
from dyvte.ranks import Ranks
from dyvte.training.lock import one_run, run_name

PICTURE_SIDE = 320  # pixels
PARTS = "parts"


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Changes with the ids, questions and answers of samples."""
    return fingerprint([[sample.id, sample.question, sample.answers] for sample in samples])


def sample_ids(samples: Sequence[Sample]) -> list[str]:
    """The samples' ids, without reading those of a source."""
    return list(getattr(samples, "ids", None) or (sample.id for sample in samples))


class ResultFolder:
    """Reads and writes the files that :mod:`dyvte.evaluation.runner` names.

    Args:
        path: the folder.
        part: which rank's rows are written apart, to be joined later; None: they go where they belong.
    """

    def __init__(self, path: str | os.PathLike, part: int | None = None):
        self.path, self.part = Path(path), part

    @contextmanager
    def held(self, ranks: Ranks) -> Iterator[None]:
        """The folder for these ranks alone.

        Raises:
            ValueError: another run is working in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with one_run(self.path, run_name(ranks)):
            yield

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
        return self._read(self._rows(policy))

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        if not path.exists():
            return {}
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines.pop():  # what follows the last line's end
            atomic_write(path, "".join(f"{line}\n" for line in lines))
        try:
            return {row["id"]: row for row in map(json.loads, lines)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and its rows are made again") from error

    @contextmanager
    def row_files(self, policies: Iterable[str]) -> Iterator[dict[str, TextIO]]:
        """The policies' files of rows, open to add to."""
        paths = {name: self._rows(name) for name in policies}
        if self.part is not None:
            paths = {name: self.path / PARTS / f"{self.part}-{name}.jsonl" for name in policies}
            (self.path / PARTS).mkdir(exist_ok=True)
        with ExitStack() as files:
            yield {name: files.enter_context(path.open("a", encoding="utf-8")) for name, path in paths.items()}

    def join_parts(self) -> None:
        """Puts the rows that other ranks wrote, in this run or in one that was stopped, where they belong."""
        for path in sorted((self.path / PARTS).glob("*.jsonl")):
            policy = path.stem.partition("-")[2]
            rows = self._read(path) | self.read_rows(policy)
            atomic_write(self._rows(policy), "".join(json.dumps(row) + "\n" for row in rows.values()))
            path.unlink()

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
        if self.part is None:
            write_json(self.path / "timing.json", timing)

    def read_summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json", "remove it, and it is made again")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)
