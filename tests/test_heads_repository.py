"""A repository of heads works in one line of transformers, and its card says what was measured."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from models import batch_of, tiny_llama, tiny_llava
from promises import promise_record
from test_learned_exit import PROMPTS, heads_for
from transformers import dynamic_module_utils

import dyvte
from dyvte.promise import Promise


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def heads(model):
    heads = heads_for(model, batch_of(*PROMPTS), "shared", license="mit")
    heads.config.calibration = promise_record(heads.config.threshold)
    return heads


@pytest.fixture(scope="module")
def repository(heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "some-heads"
    heads.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(model, repository, monkeypatch, tmp_path):
    """``model.generate`` with the repository's code, a copy of which goes into a folder of this test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    inputs = batch_of(*PROMPTS)

    def call(called=model, **more):
        code = {"custom_generate": repository, "trust_remote_code": True}
        return called.generate(**inputs, max_new_tokens=4, do_sample=False, **code, **more)

    return call


def by_hand(model, heads, **settings):
    with dyvte.visual_exit(model, dyvte.LearnedExit(heads, **settings)) as exits:
        output = model.generate(**batch_of(*PROMPTS), max_new_tokens=4, do_sample=False)
    return output.tolist(), exits.layers.tolist()


def test_generate_with_the_repository_as_custom_generate(model, heads, generate):
    expected, layers = by_hand(model, heads)
    assert len(set(layers)) > 2
    assert generate().tolist() == expected
    told = generate(return_dict_in_generate=True)
    assert told.sequences.tolist() == expected and told.exit_layers.tolist() == layers
    careful = by_hand(model, heads, risk=0.01)
    assert careful[1] != layers
    assert generate(return_dict_in_generate=True, risk=0.01).exit_layers.tolist() == careful[1]
    dense = model.generate(**batch_of(*PROMPTS), max_new_tokens=4, do_sample=False)  # nothing is left on the model
    with dyvte.visual_exit(model, dyvte.NeverExit()):
        assert torch.equal(model.generate(**batch_of(*PROMPTS), max_new_tokens=4, do_sample=False), dense)


def test_custom_generate_with_other_models_or_risks_is_refused(generate):
    with pytest.raises(ValueError, match="cannot show a risk as low as 0.001"):
        generate(risk=0.001)
    with pytest.raises(ValueError, match="decoder|image"):
        generate(called=tiny_llama())


LOADED_BY_ITS_OWN_CODE = """
import sys
from transformers import AutoModel
heads = AutoModel.from_pretrained({repository!r}, trust_remote_code=True)
import dyvte
assert type(heads) is dyvte.ExitHeads, type(heads)
heads.save_pretrained({again!r})
"""
LOADED_ONCE_DYVTE_IS_USED = """
import dyvte
dyvte.FixedExit(3)
from transformers import AutoModel
assert type(AutoModel.from_pretrained({repository!r})) is dyvte.ExitHeads
"""


@pytest.mark.parametrize("script", [LOADED_BY_ITS_OWN_CODE, LOADED_ONCE_DYVTE_IS_USED])
def test_the_auto_classes_load_it(script, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = tmp_path / "again"
    run = [sys.executable, "-c", script.format(repository=repository, again=str(again))]
    subprocess.run(run, check=True, stdin=subprocess.DEVNULL, timeout=120)
    if script is LOADED_BY_ITS_OWN_CODE:  # and no source of the package was copied into what it saved
        files = dyvte.heads.repository.CODE_FILES
        assert {path.relative_to(again).as_posix() for path in again.rglob("*.py")} == set(files)


def test_the_card_says_what_was_measured(heads, repository):
    promise = Promise.from_dict(promise_record(heads.config.threshold))
    data = ModelCard.load(f"{repository}/README.md").data
    assert (data.license, data.library_name) == ("mit", "dyvte") and "custom_generate" in data.tags
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    expected = {"agreement": 1 - promise.risk, "changed_answers_bound": promise.bound, "left_out": promise.saved}
    assert measured == pytest.approx(expected)
    assert {result.dataset_name for result in data.eval_results} == {"1000 held-out samples of scenes"}


@pytest.mark.parametrize(("named", "shown"), [("some/model", "some/model"), ("/data/my model", None), (None, None)])
def test_the_card_names_base_models_that_the_hub_can_have(heads, named, shown):
    config = dyvte.ExitHeadsConfig(num_layers=3, hidden_size=8, base_model=named)
    data = ModelCard(dyvte.heads.card.model_card(config, 100)).data
    assert (data.base_model, data.license, data.eval_results) == (shown, "unknown", None)
