"""DeepSpeed's ZeRO under the fit: the heads are those of one process, and what was stopped goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import groups
import pytest
import torch
from test_fitting import made_up_traces
from test_sharded import BUILD

from dyvte.training.fit import FitSettings, fit_heads

pytest.importorskip("deepspeed")
CONFIGS = Path(__file__).parents[1] / "configs/deepspeed"
SETTINGS = FitSettings(form="original", width=16, epochs=4, batch_size=50, dropout=0.2, validation=0.5)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=900)
        yield


def fitted(traces, settings, work=None, log=None):
    return fit_heads(traces, settings, progress=False, work=work, log=log).state_dict()


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_makes_the_heads_of_one_process_and_goes_on(stage, tmp_path):
    traces = made_up_traces(205)
    settings = replace(SETTINGS, deepspeed=str(CONFIGS / f"zero{stage}.json"))
    expected = fitted(traces, SETTINGS)
    whole = groups.results(2, tmp_path / "once", lambda rank: fitted(traces, settings, tmp_path / "whole"))
    for name, weight in expected.items():
        assert (whole[0][name] - weight).norm() <= 1e-6 * weight.norm()
        assert torch.equal(whole[0][name], whole[1][name])

    def dies(epoch, losses):
        if epoch == 2:
            os._exit(1)

    pids = groups.start(2, tmp_path / "first", lambda rank: fitted(traces, settings, tmp_path / "work", dies))
    assert groups.wait(pids) and (tmp_path / "work/state-000002.safetensors").exists()
    groups.results(2, tmp_path / "again", lambda rank: fitted(traces, settings, tmp_path / "work"))
    for name in ("state.json", "state-000004.safetensors"):
        assert (tmp_path / "work" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_configs_for_bfloat16_learn(stage, tmp_path):
    settings = replace(SETTINGS, deepspeed=str(CONFIGS / f"zero{stage}_bf16.json"))
    expected = fitted(made_up_traces(205), SETTINGS)
    found = groups.results(2, tmp_path, lambda rank: fitted(made_up_traces(205), settings))[0]
    assert all(0 < (found[name] - weight).norm() < 0.1 * weight.norm() for name, weight in expected.items())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"zero_optimization": {"stage": 3}}, "not with stage 3; ZeRO-3 is for the base"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, "sets optimizer, but that comes from the settings"),
        ("configs/deepspeed/none.json", "there is no DeepSpeed config"),
        ({"zero_optimization": {"stage": 1}}, "start with torchrun or deepspeed"),
    ],
)
def test_configs_that_cannot_be(config, match):
    with pytest.raises(ValueError, match=match):
        fit_heads(made_up_traces(60), replace(SETTINGS, deepspeed=config), progress=False)
