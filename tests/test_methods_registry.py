"""Methods by name, and a config that evaluates several of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import dyvte
from dyvte.cli.policies import make_policies
from dyvte.methods import METHODS, by_name

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))


def test_names_make_what_they_say():
    himap = by_name("himap", layers=[2, 5], keep=[0.4, 0.1])
    assert isinstance(himap, dyvte.methods.HiMAP) and himap.shares == {2: 0.4, 5: 0.1}
    assert by_name("fixed", layer=3).layer == 3
    assert all(getattr(dyvte.methods, kind.__name__) is kind for kind in METHODS.values())


@pytest.mark.parametrize(
    "name, settings, match",
    [
        ("fast-v", {}, "unknown method 'fast-v': choose from never, fixed"),
        ("fastv", {"layers": 2}, "wrong settings for method 'fastv'"),
        ("fastv", {"keep": 2}, "keep must be the share"),
        ("sgl", {}, "unknown method 'sgl'"),
    ],
)
def test_bad_names_and_settings(name, settings, match):
    with pytest.raises(ValueError, match=match):
        by_name(name, **settings)


def test_a_config_evaluates_them(tmp_path):
    from reference_mllm import build_model, build_processor
    from test_evaluation import SETTINGS

    from dyvte.data import load_samples
    from dyvte.evaluation.runner import evaluate

    torch.manual_seed(0)
    processor = build_processor(9)
    model = build_model(SETTINGS, len(processor.tokenizer)).eval()
    layers = len(model.model.language_model.layers)
    policies = make_policies(
        {
            "himap": {"layers": [1, 2], "keep": [0.5, 0.25]},
            "folder-50": {"remove": 0.5, "exit": {"fixed": {"layer": 2}}},
            "divprune": {"keep": 0.5},
            "fastv-50": {"layer": 1, "keep": 0.5},
        },
        None,
    )
    assert [len(policy.parts()) for policy in policies.values()] == [1, 2, 1, 1]
    samples = load_samples({"scenes": {"split": "dev", "n": 4}})
    settings = {"batch_size": 4, "max_new_tokens": 2, "timing_batches": 1, "progress": False}
    summary = evaluate(model, processor, samples, policies, tmp_path, **settings)["policies"]
    assert summary["folder-50"]["mean_exit_layer"] == 2
    assert summary["divprune"]["mean_exit_layer"] == layers
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        make_policies({"best": {}}, None)
