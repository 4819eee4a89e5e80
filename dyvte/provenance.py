"""Where results come from and how they reach the disk: versions, hardware, fingerprints, whole files, claims."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dyvte.version import __version__


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    return {
        "dyvte": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hardware(model: nn.Module) -> dict[str, Any]:
    """What the model runs on."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "system": platform.system()}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def fingerprint(content: Any) -> str:
    """16 hex digits that change with a value made of what JSON can hold; anything else in it counts as its text."""
    return _digest([json.dumps(content, sort_keys=True, default=str)])


def weights_fingerprint(module: nn.Module) -> str:
    """Changes with the architecture and the weights, of which it sees the first few of each tensor."""
    return _digest(
        f"{name} {tuple(parameter.shape)} {parameter.detach().flatten()[:64].float().cpu().tolist()}"
        for name, parameter in module.named_parameters()
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def describe(value: Any) -> Any:
    """What determines a policy's decisions, in terms of JSON: class, settings, fingerprints of modules and tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, Mapping):
        return fingerprint(sorted(value.items()))
    if isinstance(value, torch.Tensor):
        return fingerprint(value.tolist())
    if isinstance(value, nn.Module):
        return {"class": type(value).__name__, "weights": weights_fingerprint(value)}
    if isinstance(value, torch.Generator):
        return {"seed": value.initial_seed()}
    if isinstance(value, functools.partial):
        keywords = {key: describe(v) for key, v in value.keywords.items()}
        return {"call": describe(value.func), "args": describe(value.args)} | keywords
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return {"class": type(value).__name__} | {k: describe(v) for k, v in vars(value).items() if not k.startswith("_")}


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` at the end: whole, or, after an error, not at all.

    The path lies in the same folder, ends as ``path`` does and is nobody else's.
    """
    path = Path(path)
    fresh = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}-{path.name}")
    try:
        yield fresh
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` at the end: all of its files, or, after an error, none.

    Args:
        replaced: tells by the name in ``path`` whether something there goes away with what it belonged to; the rest
            stays.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*-*-{path.name}"):  # by writers that were killed
        if left.is_dir() and not _alive(left.name.split("-")[0][1:]):
            shutil.rmtree(left, ignore_errors=True)
    fresh = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}-{path.name}")
    fresh.mkdir()
    try:
        yield fresh
        if path.is_dir():
            shutil.copymode(path, fresh)
            for kept in path.iterdir():
                if not replaced(kept.name) and not (fresh / kept.name).exists():
                    (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, fresh / kept.name)
        for written in fresh.rglob("*"):
            _sync(written)
        _sync(fresh)
        _swap(fresh, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(fresh: Path, path: Path) -> None:
    """Two folders change places in one step; where the system cannot do that, in two, between which there is none."""
    if not path.exists():
        os.rename(fresh, path)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    here, whole = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange is None or exchange(here, os.fsencode(fresh), here, os.fsencode(path), whole) != 0:
        aside = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}-{path.name}")
        os.rename(path, aside)
        os.rename(fresh, path)
        shutil.rmtree(aside, ignore_errors=True)


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all; text as UTF-8."""
    with atomic_path(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it holds something else; says what to do.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def differing(noted: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a record that were noted with another value: their names, and what was noted."""
    record = json.loads(json.dumps(record))
    return {name: noted.get(name) for name, value in record.items() if noted.get(name) != value}


def claim(
    path: Path,
    record: dict[str, Any],
    merge: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    *,
    write: bool = True,
) -> None:
    """Notes what the content of a folder is made from, or checks it against what an earlier run noted there.

    Args:
        path: the JSON file of the record; its folder is made.
        record: what determines the content, as JSON can hold it.
        merge: called with the noted record and this one; raises ``ValueError`` where they do not go together (see
            :func:`differing`), else gives the record to note from now on.
        write: False for the ranks of a distributed run that leave the note to another one.
    """
    noted = read_json(path, "remove its folder, or choose another one") if path.exists() else None
    if noted is not None:
        record = merge(noted, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    if write and record != noted:
        write_json(path, record)
