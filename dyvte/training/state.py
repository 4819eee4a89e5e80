"""Training that was stopped goes on: its state on the disk, whole whenever the process dies.

::

    state.json               what the state belongs to, how far it is, and the file of its tensors with its SHA-256
    state-000012.safetensors the tensors

The JSON is written last and takes the place of the one before, so one of the two states is always whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dyvte.provenance import atomic_path, differing, write_json
from dyvte.training.parallel import Group
from dyvte.training.units import sha256_of

STATE = "state.json"
Tensors = dict[str, torch.Tensor]


class TrainingState:
    """The state of a training in a folder: rank 0 writes it, all ranks read it.

    Args:
        record: what determines the result, as JSON can hold it; a state of something else is refused.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], group: Group):
        self.folder, self.record, self.group = folder, json.loads(json.dumps(record)), group

    def load(self) -> tuple[dict[str, Any], Tensors] | None:
        """How far it got, and the tensors; None if nothing was saved.

        Raises:
            ValueError: the state is damaged, or belongs to another training.
        """
        with self.group.together():
            # Folders of a network may show their old content to some ranks for a while: one says what counts.
            noted = self._noted() if self.group.rank == 0 else None
        noted = self.group.gather(noted)[0]
        if noted is None:
            return None
        with self.group.together():
            tensors = self._tensors(noted)
        return noted["progress"], tensors

    def save(self, number: int, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts a state in the place of the one before.

        Args:
            number: grows from state to state.
            progress: how far it is, as JSON can hold it.

        Raises:
            ValueError: the disk does not take it.
        """
        with self.group.together():
            if self.group.rank == 0:
                try:
                    self._write(number, progress, tensors)
                except OSError as error:
                    raise ValueError(
                        f"{self.folder} does not take the state of the training ({error.strerror or error}): make "
                        "room, or choose another folder; the same command goes on from the state before"
                    ) from error

    def _write(self, number: int, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"state-{number:06d}.safetensors"
        with atomic_path(path) as fresh:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh)
            digest = sha256_of(fresh)
        noted = {"record": self.record, "progress": dict(progress), "file": path.name, "sha256": digest}
        write_json(self.folder / STATE, noted)
        left = (*self.folder.glob(".*-*-state*"), *self.folder.glob(".tmp??????"))  # ours and safetensors', when killed
        for old in (*self.folder.glob("state-*.safetensors"), *left):
            if old != path:  # the state before, and what killed writers left
                old.unlink(missing_ok=True)

    def _noted(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        try:
            noted = json.loads(path.read_text())
            found = noted["record"]
            noted["progress"], noted["file"], noted["sha256"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
            raise self._damaged(path, str(error)) from error
        other = differing(found, self.record) | {name: found[name] for name in found if name not in self.record}
        if other:
            faults = "; ".join(f"{name} was {old!r}, is {self.record.get(name)!r}" for name, old in other.items())
            raise ValueError(
                f"{self.folder} holds the state of another training ({faults}): bring the old traces and settings "
                "back, or choose another folder"
            )
        return noted

    def _tensors(self, noted: Mapping[str, Any]) -> Tensors:
        path = self.folder / noted["file"]
        if not path.is_file():
            raise self._damaged(path, "it is missing")
        if sha256_of(path) != noted["sha256"]:
            raise self._damaged(path, "its SHA-256 is not the one that was written")
        return load_file(path)

    def _damaged(self, path: Path, reason: str) -> ValueError:
        return ValueError(
            f"{path} is damaged ({reason}): remove {self.folder / STATE} to begin the training anew, or bring the "
            "folder back from a copy"
        )
