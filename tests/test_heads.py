"""The checkpoint of heads: what it holds, what it refuses, and the published form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from promises import promise_record
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import dyvte
from dyvte import ExitHeads, ExitHeadsConfig

FILES = {"README.md", "config.json", "model.safetensors", "modeling_exit_heads.py", "custom_generate/generate.py"}
LAYERS, SIZE = 5, 16


def some_heads(form="shared", **changes) -> ExitHeads:
    torch.manual_seed(0)
    settings = {"num_layers": LAYERS, "hidden_size": SIZE, "width": 8, "form": form} | changes
    return ExitHeads(ExitHeadsConfig(**settings)).eval()


def original_gates(layers=LAYERS, size=SIZE, width=12):
    generator = torch.Generator().manual_seed(1)
    state = {}
    for i in range(layers):
        state[f"model.visual_gates_router.{i}.w1.weight"] = torch.randn(width, 2 * size, generator=generator)
        state[f"model.visual_gates_router.{i}.w2.weight"] = torch.randn(2, width, generator=generator)
    return state


@pytest.mark.parametrize("form", ["shared", "original"])
def test_saved_and_loaded(form, tmp_path, caplog):
    heads = some_heads(
        form, base_model="some/model", base_revision="abc", threshold=0.8, calibration=promise_record(0.8)
    )
    heads.save_pretrained(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == FILES
    with caplog.at_level("WARNING", "dyvte"):
        loaded = ExitHeads.from_pretrained(tmp_path)
    assert not caplog.records
    state = torch.randn(3, LAYERS, 2 * SIZE)
    assert torch.equal(loaded(state), heads(state))
    fields = ("num_layers", "hidden_size", "base_model", "base_revision", "threshold", "calibration", "text_state")
    assert all(getattr(loaded.config, name) == getattr(heads.config, name) for name in fields)
    assert loaded.config.dyvte_version == dyvte.__version__
    card = (tmp_path / "README.md").read_text()
    assert "some/model (revision abc)" in card and "| alpha | 0.02 |" in card


def test_the_auto_classes_of_transformers_know_heads(tmp_path):
    heads, state = some_heads(guard=0.9, threshold=0.8), torch.randn(3, LAYERS, 2 * SIZE)
    heads.save_pretrained(tmp_path)
    config, loaded = AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(config) is ExitHeadsConfig and type(loaded) is ExitHeads
    assert config.threshold == loaded.config.threshold == 0.8
    assert torch.equal(loaded(state), heads(state))
    rewrite(tmp_path, lambda weights: weights.pop("heads.out.weight"))
    with pytest.raises(ValueError, match="missing weights: heads.out.weight"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", ["shared", "original"])
def test_one_layer_decides_as_all_layers_do(form):
    heads, state = some_heads(form), torch.randn(4, LAYERS, 2 * SIZE)
    together = heads(state)
    assert together.shape == (4, LAYERS)
    for layer in range(1, LAYERS + 1):
        expected = together[:, layer - 1].sigmoid() > 0.4
        assert heads.confident(state[:, layer - 1], layer, 0.4).tolist() == expected.tolist()
        assert not heads.confident(state[:, layer - 1], layer, 1.0).any()


@pytest.mark.parametrize("form", ["shared", "original"])
def test_looking_ahead_reads_an_earlier_state(form):
    """Exit layer e is decided by its own head, from the state after e - lookahead layers."""
    plain, ahead, state = some_heads(form), some_heads(form, lookahead=2), torch.randn(4, LAYERS, 2 * SIZE)
    earlier = torch.cat([torch.zeros(4, 2, 2 * SIZE), state[:, :-2]], 1)
    logits, expected = ahead(state), plain(earlier)
    assert (logits[:, :2] == -math.inf).all()
    torch.testing.assert_close(logits[:, 2:], expected[:, 2:])
    for layer in range(3, LAYERS + 1):
        assert torch.equal(ahead.confident(state[:, layer - 3], layer, 0.5), logits[:, layer - 1] > 0)


def test_small_at_the_shape_of_a_7b_model():
    heads = ExitHeads(ExitHeadsConfig(num_layers=32, hidden_size=4096))
    assert sum(p.numel() for p in heads.parameters()) <= 4_000_000


def test_gates_of_the_original_decide_the_same():
    gates, state = original_gates(), torch.randn(50, LAYERS, 2 * SIZE)
    heads = ExitHeads.from_original(gates)
    assert (heads.config.num_layers, heads.config.hidden_size, heads.config.width) == (LAYERS, SIZE, 12)
    decisions = set()
    for i in range(LAYERS):
        w1, w2 = (gates[f"model.visual_gates_router.{i}.{name}.weight"] for name in ("w1", "w2"))
        logits = F.linear(F.gelu(F.linear(state[:, i], w1)), w2)  # GELU by erf, no biases
        expected = logits[:, 1] > logits[:, 0]
        assert heads.confident(state[:, i], i + 1, heads.config.threshold).tolist() == expected.tolist()
        decisions |= set(expected.tolist())
    assert decisions == {True, False}


def test_unknown_keys_warn(tmp_path, caplog):
    some_heads().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"colour": "blue"}))
    with caplog.at_level("WARNING", "dyvte"):
        ExitHeads.from_pretrained(tmp_path)
    assert "unknown keys" in caplog.text and "colour" in caplog.text


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("heads.out.weight"), "missing weights: heads.out.weight"),
        (lambda w: w.update({"heads.extra": torch.zeros(1)}), "unexpected weights: heads.extra"),
        (lambda w: w.update({"heads.out.bias": torch.zeros(2)}), "another shape.*heads.out.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, match):
    some_heads().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        ExitHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"form": "deep"}, "unknown form"),
        ({"label_rule": "mine"}, "unknown label rule"),
        ({"text_state": "last token"}, "another text state"),
        ({"threshold": 0.0}, "threshold must lie"),
        ({"width": 0}, "width must be"),
        ({"lookahead": 1}, "lookahead must be 0 ... 0"),
    ],
)
def test_bad_configs(settings, match):
    with pytest.raises(ValueError, match=match):
        ExitHeadsConfig(num_layers=2, hidden_size=4, **settings)


@pytest.mark.parametrize(
    ("shape", "name", "match"),
    [
        ((LAYERS + 1, SIZE), None, "fit a decoder of 5 layers"),
        ((LAYERS, SIZE * 2), None, "16 wide"),
        ((LAYERS, SIZE), "some/other-model", "trained for some/model"),
    ],
)
def test_heads_of_another_model(shape, name, match):
    with pytest.raises(ValueError, match=match):
        some_heads(base_model="some/model").check_fits(*shape, name)


def test_a_local_copy_of_the_base_model_fits():
    some_heads(base_model="some/model").check_fits(LAYERS, SIZE, "/somewhere/else/model/")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: g.clear(), "router.0.w1.weight"),
        (lambda g: g.pop("model.visual_gates_router.2.w2.weight"), "router.2.w2.weight"),
        (lambda g: g.update({"model.visual_gates_router.1.w1.weight": torch.zeros(3, 32)}), "gate 1 has shapes"),
    ],
)
def test_gates_that_are_not_right(change, match):
    gates = original_gates()
    change(gates)
    with pytest.raises(ValueError, match=match):
        ExitHeads.from_original(gates)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, math.nan, True, "high"])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold must lie"):
        dyvte.LearnedExit(some_heads(), threshold=threshold)


def test_a_push_uploads_what_is_saved(monkeypatch):
    """The hub is not there in tests: what would be sent to it is."""
    sent = {}

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **more):
            files = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*.*")}
            sent.update(files=files, repo_id=repo_id, **more)
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert some_heads(base_model="some/model").push_to_hub("heads", commit_message="first") == "commit"
    assert sent["repo_id"] == "me/heads" and sent["commit_message"] == "first"
    assert set(sent["files"]) == FILES
    assert b"base_model: some/model" in sent["files"]["README.md"]
