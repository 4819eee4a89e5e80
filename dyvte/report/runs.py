"""Evaluated folders, as the report reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.promise import FILE as PROMISE
from dyvte.promise import Promise
from dyvte.provenance import read_json

DENSE = "dense"
KEYS = ("settings", "versions", "hardware", "layers", "policies")  # of a summary
AGAIN = "remove it and run `dyvte evaluate` again, which keeps what is whole"


@dataclass
class Run:
    """One evaluated folder: its summary, its rows by policy, and its name in the report."""

    folder: Path
    name: str
    summary: Mapping[str, Any]
    rows: Mapping[str, list[dict[str, Any]]]

    @property
    def layers(self) -> int:
        return self.summary["layers"]

    @property
    def policies(self) -> Mapping[str, Any]:
        return self.summary["policies"]

    @property
    def timed(self) -> bool:
        """Whether times were measured."""
        return any(values.get("timing") for values in self.policies.values())

    def main_policy(self) -> str | None:
        """The policy whose exits and answers are shown: the first that decides per sample, learned ones first."""
        adaptive = [name for name, p in self.policies.items() if sum(count > 0 for count in p["exit_layers"]) > 1]
        order = sorted(adaptive, key=lambda name: name.startswith(("oracle", "random")) - name.startswith("learned"))
        others = [name for name in self.policies if name != DENSE]
        return (order or others or [None])[0]

    @property
    def promise(self) -> Promise | None:
        """The promise that lies in the folder; None if there is none."""
        return Promise.read(self.folder) if (self.folder / PROMISE).exists() else None

    def read(self, name: str) -> Any:
        """The content of a JSON file that may lie in the folder; None if there is none."""
        path = self.folder / name
        return read_json(path, AGAIN) if path.exists() else None


def find_runs(directory: Path) -> list[Run]:
    """All runs in a directory, itself one or not.

    Raises:
        ValueError: there is none.
    """
    found = sorted(directory.rglob("summary.json")) if directory.is_dir() else []
    if not found:
        raise ValueError(f"no summary.json in {directory} or below: run `dyvte evaluate` with this output folder first")
    return [read_run(path.parent, directory) for path in found]


def read_run(folder: Path, root: Path) -> Run:
    """The run of a folder, named by its path below ``root``."""
    summary = read_json(folder / "summary.json", AGAIN)
    missing = [key for key in KEYS if not isinstance(summary, dict) or key not in summary]
    if missing:
        raise ValueError(f"{folder / 'summary.json'} is damaged (it has no {', '.join(missing)}): {AGAIN}")
    rows = {}
    for name in summary["policies"]:
        path = folder / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            rows[name] = sorted(map(json.loads, lines), key=lambda row: row["index"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error
    return Run(folder, folder.name if folder == root else str(folder.relative_to(root)), summary, rows)
