"""Records of where results come from, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from dyvte.provenance import atomic_path, atomic_write, claim, describe, differing, fingerprint, weights_fingerprint

ROOT = Path(__file__).parents[1]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    atomic_write(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as fresh:
        fresh.write_text("half of the n")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"] and path.read_text() == "old"
    atomic_write(path, "né".encode())
    assert path.read_bytes() == b"n\xc3\xa9"


def test_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "result.json"
    with atomic_path(path) as one, atomic_path(path) as other:
        assert one != other and one.parent == tmp_path and one.suffix == path.suffix
        one.write_text("one")
        other.write_text("other")
    contents = [str(i) * 200_000 for i in range(6)]
    threads = [threading.Thread(target=atomic_write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_claimed_once(tmp_path):
    path = tmp_path / "new" / "record.json"
    record = {"data": {"n": 1, "sizes": (2, 3)}, "versions": "0.1"}

    def same(noted, record):
        if other := differing(noted, {"data": record["data"]}):
            raise ValueError(f"made with another {', '.join(other)}")
        return noted

    claim(path, record, same, write=False)
    assert path.parent.is_dir() and not path.exists()
    claim(path, record, same)
    claim(path, record | {"versions": "0.2"}, same)  # a tuple and the list that JSON makes of it are the same
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    with pytest.raises(ValueError, match="another data"):
        claim(path, {"data": {"n": 2}, "versions": "0.1"}, same)
    assert json.loads(path.read_text())["data"]["n"] == 1
    claim(path, record | {"more": 1}, lambda noted, record: noted | record)
    assert json.loads(path.read_text())["more"] == 1


def test_fingerprints():
    content = {"b": [1, "x"], "a": None}
    expected = hashlib.sha256(b'{"a": null, "b": [1, "x"]}').hexdigest()[:16]
    assert fingerprint(content) == fingerprint(dict(reversed(content.items()))) == expected
    assert fingerprint(content | {"b": [1, "y"]}) != expected
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    text = "".join(f"{name} {tuple(p.shape)} {p.flatten().tolist()}" for name, p in plain.named_parameters())
    assert weights_fingerprint(plain) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert weights_fingerprint(nn.Linear(3, 2)) != weights_fingerprint(plain)
    assert describe(plain) == {"class": "Linear", "weights": weights_fingerprint(plain)}
    assert describe([{"a": 1}, torch.arange(2), "x"]) == [fingerprint([["a", 1]]), fingerprint([0, 1]), "x"]


def test_files_beside_the_code_are_part_of_the_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, patterns in listed.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
        if path.is_file()
    }
    folders = os.walk(ROOT / "dyvte", followlinks=True)  # the reference MLLM and its heads lie behind a link
    files = (Path(folder, name) for folder, _, names in folders for name in names if "__pycache__" not in folder)
    about = {"README.md", "curves.png", "answers.jsonl", "vision.jsonl"}  # how they were made
    copied = ROOT / "dyvte/heads/files"  # code that is no module here, but is written beside heads
    kept = {path for path in files if path.suffix != ".py" or path.is_relative_to(copied)}
    assert packaged == {path for path in kept if path.name not in about}
