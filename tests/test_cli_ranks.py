"""``evaluate`` by several ranks: the same rows and the same summary as by one, also after a run that was stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import save_tiny_llava

from dyvte.cli.main import main

ROOT = Path(__file__).parents[1]
POLICIES = "policies={fixed-1: {layer: 1}, random: {p: 0.5}}"


def arguments(mllm: Path, output: Path) -> list[str]:
    data = "data={scenes: {split: dev, n: 11}}"
    return ["evaluate", f"model={mllm}", "dtype=float32", data, POLICIES, "batch_size=2", f"output={output}"]


def results(folder: Path) -> dict:
    """Rows by policy in the order of the samples, and what the summary says of them but for times."""
    rows = {path.name: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}
    summary = json.loads((folder / "summary.json").read_text())
    for values in summary["policies"].values():
        del values["timing"]
    return {name: sorted(some, key=lambda row: row["index"]) for name, some in rows.items()} | summary["policies"]


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny")


def test_ranks_share_the_samples(mllm, tmp_path):
    main(arguments(mllm, tmp_path / "one"))
    once = results(tmp_path / "one")
    assert [len(once[f"{name}.jsonl"]) for name in ("dense", "fixed-1", "random")] == [11] * 3
    # What two ranks leave behind that were stopped: rows here and there, one of them cut off, one in both places.
    folder = tmp_path / "two"
    (folder / "parts").mkdir(parents=True)
    (folder / "config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    lines = (tmp_path / "one/dense.jsonl").read_text().splitlines(keepends=True)
    (folder / "dense.jsonl").write_text("".join(lines[:3]))
    (folder / "parts/1-dense.jsonl").write_text("".join(lines[2:4]) + lines[4][:9])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "dyvte.cli.main", *arguments(mllm, folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prefill time") == 1  # one rank prints
    assert results(folder) == once and not list((folder / "parts").iterdir())
