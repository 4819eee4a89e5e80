"""One recipe, started in every way there is, on replicated and sharded models: the same traces, the same heads."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_sharded import BUILD, DEEPSPEED
from test_traces_on_disk import files, mllm  # noqa: F401 (a fixture)

from dyvte.heads import ExitHeads

ROOT = Path(__file__).parents[1]
SECONDS = 300  # to start the interpreters of two ranks, and to trace and train; a hang is a failure
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {
    "python": PYTHON,
    "torchrun": TORCHRUN,
    "deepspeed": [*PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
    "accelerate": [*PYTHON, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
needed = functools.partial(pytest.param, marks=DEEPSPEED)
RUNS = [
    ("torchrun", "none"),
    ("accelerate", "none"),
    needed("deepspeed", "none"),
    ("torchrun", "fsdp2"),
    ("torchrun", "tp"),
    needed("torchrun", "zero3"),
]


def launch(launcher: str, shard: str, model: Path, folder: Path) -> Path:
    """Trains heads from nothing; their folder."""
    scenes = "{{scenes: {{split: {}, n: {}, seed: {}}}}}"
    keys = {
        "model": model,
        "shard": shard,
        "dtype": "float32",
        "attention": "eager",
        "device": "cpu",
        "data": scenes.format("train", 70, 1),
        "held_out": scenes.format("dev", 41, 2),
        "unit_size": 8,
        "batch_size": 4,
        "max_new_tokens": 3,
        "alpha": 0.4,
        "fit.epochs": 4,
        "fit.batch_size": 16,
        "work": folder / "work",
        "output": folder / "heads",
    }
    command = [*LAUNCHERS[launcher], str(ROOT / "train/train.py"), *(f"{key}={value}" for key, value in keys.items())]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PYTHONPATH": str(ROOT), "PATH": tools, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    folder.mkdir()
    if importlib.util.find_spec("deepspeed") and (launcher == "deepspeed" or shard == "zero3"):
        subprocess.run([*PYTHON, "-c", BUILD], env=os.environ | more, check=True, timeout=900)
    with subprocess.Popen(
        command, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    ) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            output, _ = process.communicate(timeout=60)
            pytest.fail(f"{launcher} took more than {SECONDS} s\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]
    return folder / "heads"


@pytest.fixture(scope="module")
def alone(mllm, tmp_path_factory):  # noqa: F811
    return launch("python", "none", mllm[2], tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(("launcher", "shard"), RUNS)
def test_the_same_heads(launcher, shard, mllm, alone, tmp_path):  # noqa: F811
    heads = launch(launcher, shard, mllm[2], tmp_path / "run")
    summed_otherwise = shard in ("tp", "zero3")  # sums over weights in another order
    if not summed_otherwise:
        for name in ("train", "held-out"):
            assert files(heads.parent / "work" / name) == files(alone.parent / "work" / name)
    found, expected = (load_file(folder / "model.safetensors") for folder in (heads, alone))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error < (1e-2 if summed_otherwise else 1e-6), name
    first, second = (ExitHeads.from_pretrained(folder).config for folder in (heads, alone))
    assert first.identity == second.identity and first.calibration["samples"] == 41
    if not summed_otherwise:
        torch.testing.assert_close(first.threshold, second.threshold, atol=1e-6, rtol=0)
