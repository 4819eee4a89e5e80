"""Training of EAS in a few steps: what it writes, that it goes on, ranks, a LoRA base, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import batch_of, tiny_llava
from safetensors.torch import load_file
from test_eas import adapters_for
from test_launchers import LAUNCHERS, ROOT, SECONDS, needed
from test_pruning import RAGGED, STEPS, generate
from test_traces_on_disk import mllm  # noqa: F401 (a fixture)
from torch import nn

import dyvte
from dyvte import EAS, reduce_tokens
from dyvte.config import EASConfig, EASSettings
from dyvte.data import load_samples
from dyvte.loading import load_mllm
from dyvte.methods.eas_adapters import EASAdapters, EASAdaptersConfig, random_adapters
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.agreement import dense_answers, keeps_answers
from dyvte.training.eas import train_eas
from dyvte.training.eas_learner import AdapterLearner
from dyvte.training.parallel import Group
from dyvte.training.promise import calibrate_method

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SCENES = {"scenes": {"split": "train", "n": 40, "seed": 1}}
SHORT = {"skip": 1, "width": 4, "adapted_width": 4, "search_steps": 6, "warmup": 2, "every": 2, "sets": 2}
SHORT |= {"steps": 4, "batch_size": 6, "lr": 0.02, "dropout": 0.0, "save_every": 2}


def config(folder: Path, model, **more) -> EASConfig:
    asked = {"model": str(model), "dtype": "float32", "data": SCENES, "device": "cpu"}
    asked |= {"output": str(folder / "adapters"), "work": str(folder / "work"), "eas": EASSettings(**SHORT)}
    return EASConfig(**asked | more)


def trained(config: EASConfig, **more) -> EASAdapters:
    return train_eas(load_mllm(config), load_samples(config.data), config, Group(), progress=False, **more)


class Stopped(Exception):
    pass


def same(one: EASAdapters, other: EASAdapters) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_learns_and_goes_on_where_it_was_stopped(mllm, tmp_path, monkeypatch):  # noqa: F811
    told = []
    whole = config(tmp_path / "whole", mllm[2])
    expected = trained(whole, log=lambda stage: lambda step, figures: told.append((stage, step, figures["loss"])))
    assert [one[:2] for one in told] == [("search", 6), ("train", 4)]
    assert expected.config.skipped == expected.config.training["layers"] != [0]
    assert len(expected.config.skipped + expected.config.adapted) == expected.config.num_layers

    step, left = AdapterLearner.step, [3, 4, 100]  # in the search, then in the training

    def stopping(learner, skipped):
        left[0] -= 1
        if left[0] < 0:
            left.pop(0)
            raise Stopped
        return step(learner, skipped)

    monkeypatch.setattr(AdapterLearner, "step", stopping)
    parts = config(tmp_path / "parts", mllm[2])
    for _ in range(2):
        with pytest.raises(Stopped):
            trained(parts)
    again = trained(parts)
    assert same(again, expected) and again.config.skipped == expected.config.skipped
    monkeypatch.setattr(AdapterLearner, "step", None)  # nothing is left to do
    assert same(trained(parts), expected)
    with pytest.raises(ValueError, match="holds the state of another training"):
        trained(config(tmp_path / "parts", mllm[2], eas=EASSettings(**SHORT | {"lr": 0.01})))


def test_losses_fall_and_the_model_stays_as_it_is(mllm, tmp_path):  # noqa: F811
    losses = []
    settings = EASSettings(**SHORT | {"layers": [1, 2], "steps": 30, "batch_size": 12})
    asked = config(tmp_path, mllm[2], eas=settings, answers="dense", max_new_tokens=3)
    base = load_mllm(asked)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    adapters = train_eas(
        base,
        load_samples(SCENES),
        asked,
        Group(),
        log=lambda stage: lambda step, figures: losses.append(figures["loss"]),
        progress=False,
    )
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())
    assert adapters.config.skipped == [1, 2] and "scores" not in adapters.config.training
    assert not (tmp_path / "work/search").exists()


def test_on_a_lora_base(mllm, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    plain = load_mllm(config(tmp_path, mllm[2])).model
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)", init_lora_weights=False)
    peft.get_peft_model(plain, lora).save_pretrained(tmp_path / "lora")
    asked = config(tmp_path, mllm[2], adapter=str(tmp_path / "lora"))
    trained(asked).save(tmp_path / "adapters")
    assert not any("lora" in name for name in load_file(tmp_path / "adapters/model.safetensors"))
    with reduce_tokens(load_mllm(asked).model, EAS(tmp_path / "adapters")):
        pass
    with pytest.raises(ValueError, match="trained on other weights"):
        reduce_tokens(load_mllm(config(tmp_path, mllm[2])).model, EAS(tmp_path / "adapters")).__enter__()


def test_answers_have_no_say():
    """One pass over prompts and answers agrees with decoding, so that adapters are trained as they are used."""
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    ids, answer = dense_answers(model, inputs, STEPS)
    for seed, spread in enumerate((0.0, 0.05, 0.3)):
        adapters = adapters_for(model, [5])
        for number, parameter in enumerate(adapters.parameters()):
            nn.init.normal_(parameter, std=spread, generator=torch.Generator().manual_seed(100 * seed + number))
        with reduce_tokens(model, EAS(adapters)):
            own = generate(model, inputs)[:, -STEPS:]
        same, _ = keeps_answers(model, EAS(adapters), inputs, ids, answer)
        assert same.tolist() == (own == ids).all(1).tolist()


def test_a_promise_chooses_among_checkpoints(mllm, tmp_path):  # noqa: F811
    model, processor, _ = mllm
    spec = DecoderSpec.of(model)
    folders = [str(tmp_path / f"skip-{count}") for count in (0, 1)]
    for count, folder in enumerate(folders):
        layers = list(range(spec.num_layers))
        shape = {"num_layers": spec.num_layers, "hidden_size": spec.config.hidden_size, "width": 4, "adapted_width": 4}
        random_adapters(EASAdaptersConfig(**shape, skipped=layers[1 : 1 + count], adapted=layers), 0).save(folder)
    asked = {"settings": [{"adapters": folder} for folder in folders], "alpha": 0.1, "progress": False}
    promise = calibrate_method(model, processor, load_samples(SCENES), tmp_path, "eas", max_new_tokens=3, **asked)
    assert promise.curve.risk[0] == 0 and promise.setting["eas.adapters"] in folders
    method = dyvte.load(tmp_path)
    with reduce_tokens(model, method):
        assert method.method.skipped == (() if promise.chosen == 0 else (1,))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"skip": 9}, "eas.skip must be 1 ..."),
        ({"layers": [0, 1]}, "eas.layers must be some of"),
        ({"layers": [1, 1]}, "each once"),
        ({"warmup": 6}, "leaves none of 6 search steps"),
    ],
)
def test_settings_that_do_not_fit(mllm, tmp_path, changes, match):  # noqa: F811
    with pytest.raises(ValueError, match=match):
        trained(config(tmp_path, mllm[2], eas=EASSettings(**SHORT | changes)))


def launch(launcher: str, model, folder: Path) -> Path:
    keys = {"model": model, "dtype": "float32", "device": "cpu", "data": "{scenes: {split: train, n: 40, seed: 1}}"}
    keys |= {"output": folder / "adapters", "work": folder / "work", "tracking": "tensorboard"}
    keys |= {f"eas.{name}": value for name, value in SHORT.items()}
    command = [*LAUNCHERS[launcher], str(ROOT / "train/eas.py"), *(f"{k}={v}" for k, v in keys.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert '"layers": [' in done.stdout
    return folder / "adapters"


@pytest.mark.parametrize("launcher", ["torchrun", needed("deepspeed")])
def test_ranks_make_the_same_adapters(mllm, tmp_path, launcher):  # noqa: F811
    expected = trained(config(tmp_path / "alone", mllm[2]))
    (tmp_path / "ranks").mkdir()
    made = EASAdapters.load(launch(launcher, mllm[2], tmp_path / "ranks"))
    assert made.config.skipped == expected.config.skipped and any((tmp_path / "ranks/adapters").rglob("*tfevents*"))
    for one, other in zip(made.state_dict().values(), expected.state_dict().values(), strict=True):
        # AdamW makes steps of about lr = 0.02 of the tiniest gradients, whose sums over ranks round otherwise.
        torch.testing.assert_close(one, other, atol=4e-3, rtol=0)


def test_a_script_explains_itself():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train/eas.py"), "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "eas.search_steps" in done.stdout
