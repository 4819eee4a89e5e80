"""Weights sharded over two ranks, whose samples leave at different layers: the results are those of one process."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import LAYERS, tiny_llava
from sharded_jobs import EXACT, JOBS, NEW_TOKENS, random_heads

HERE = Path(__file__).parent
SECONDS = 120  # ranks that wait for each other for ever are a failure, not a build that hangs
# Once, by one process: two that build at the same time, or one that is killed, leave a lock that others wait for.
BUILD = (
    "from deepspeed.accelerator import get_accelerator as get; get().create_op_builder('ShareMemCommBuilder').load()"
)
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
KINDS = ("fsdp", pytest.param("zero3", marks=DEEPSPEED), "tensor_parallel")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """For each kind of sharding what both ranks wrote; started once."""
    launched = functools.cache(lambda kind: launch(kind, tmp_path_factory.mktemp(kind)))

    def run(kind: str) -> list[dict]:
        written = launched(kind)
        return pytest.fail(written) if isinstance(written, str) else written

    return run


def launch(kind: str, folder: Path) -> list[dict] | str:
    """What both ranks wrote, or how they failed."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # DeepSpeed builds with our ninja
    environment = os.environ | {"PYTHONPATH": path, "PATH": tools, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if kind == "zero3":
        subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, timeout=900)
    random_heads().save_pretrained(folder / "heads")
    tiny_llava().save_pretrained(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HERE / "sharded_worker.py"), kind, str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    ) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            output, _ = process.communicate(timeout=30)
            return f"{kind}: the ranks took more than {SECONDS} s\n{output[-4000:]}"
    if process.returncode != 0:
        return output[-4000:]
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_one_process(kind, job, ranks):
    for rank, written in enumerate(ranks(kind)):
        expected = JOBS[job](tiny_llava(), 0 if kind == "tensor_parallel" else rank)
        found = written["jobs"][job]["result"]
        assert found.keys() == expected.keys()
        for name, value in found.items():
            tolerance = 0 if kind == "fsdp" or name in EXACT else 2e-4
            torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_ranks_leave_at_different_layers(kind, ranks):
    first, second = ranks(kind)
    for job in ("fixed", "learned"):
        exits = [written["jobs"][job]["result"]["exits"] for written in (first, second)]
        assert exits[0].unique().numel() == 2
        assert kind == "tensor_parallel" or not torch.equal(*exits)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_sharded_again(kind, ranks):
    for written in ranks(kind):
        assert all(job["sharded"] for job in written["jobs"].values())


def test_fsdp_gathers_every_layer_once_per_pass(ranks):
    for written in ranks("fsdp"):
        for name, job in written["jobs"].items():
            assert job["gathers"] == LAYERS * (max(NEW_TOKENS) if name == "generate" else 1)


@DEEPSPEED
def test_zero3_gathers_the_model_once_per_pass(ranks):
    for written in ranks("zero3"):
        for name, job in written["jobs"].items():
            passes = max(NEW_TOKENS) if name == "generate" else 1
            assert 0 < job["bytes"] <= 1.1 * written["seen"]["model bytes"] * passes, name


REFUSALS = {
    ("fsdp", "parts"): "call fully_shard on the decoder layers only",
    ("fsdp", "wrapped"): "torch.distributed.fsdp.fully_shard instead",
    ("fsdp", "heads"): "keep them out of zero.Init and fully_shard",
    ("zero3", "parts"): r"set_z3_leaf_modules\(model, \[LlamaDecoderLayer\]\)",
    ("zero3", "heads"): "keep them out of zero.Init and fully_shard",
}


@pytest.mark.parametrize(
    ("kind", "what"), [pytest.param(*key, marks=DEEPSPEED if key[0] == "zero3" else ()) for key in REFUSALS]
)
def test_what_would_hang_is_refused(kind, what, ranks):
    for written in ranks(kind):
        assert re.search(REFUSALS[kind, what], written["seen"][what])


@DEEPSPEED
def test_heads_are_whole_while_a_zero3_config_is_alive(ranks):
    expected = random_heads().state_dict()
    for written in ranks("zero3"):
        assert written["seen"]["alive"]
        found = written["seen"]["loaded"]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
