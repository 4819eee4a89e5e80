"""What ships: the reference MLLM and its heads do what the README says, and its table is that of the committed JSON."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import dyvte
from dyvte.data import Sample, encode, load_samples

ROOT = Path(__file__).parents[1]
MLLM, HEADS = ROOT / "checkpoints/reference-mllm", ROOT / "checkpoints/reference-heads"


@pytest.fixture(scope="module")
def mllm():
    model = AutoModelForImageTextToText.from_pretrained(MLLM, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(MLLM)


def code_of(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_mllm_is_a_real_one(mllm):
    model, processor = mllm
    assert type(model) is LlavaForConditionalGeneration
    assert len(model.get_decoder().layers) >= 10 and model.config.image_seq_length >= 64
    weights = MLLM / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert AutoModelForImageTextToText.from_pretrained(MLLM).dtype == torch.float16
    sample = load_samples({"scenes": {"split": "test", "n": 2}})[1]
    inputs = encode(processor, [sample])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
    assert inputs["pixel_values"].shape[-1] == sample.images[0].width  # nothing was resized


def test_its_report_passes_the_bar():
    report = json.loads((MLLM / "report.json").read_text())
    assert report["questions"] == 2000 and report["accuracy"] >= 0.95
    assert min(report["by_kind"].values()) >= 0.85


def test_the_use_shown_in_the_readme(mllm, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code_of("README.md")[0], names)
    assert capsys.readouterr().out.split() == ["5", "green", "2"]  # as the picture shows
    layers = [prompt.layers.tolist() for prompt in names["handle"].record]
    assert layers == [[1], [2], [7]]
    ask, text = names["image"], ("what is 2 plus 3 ?", "which colour is at row 1 column 1 ?", "how many 9 are there ?")
    chats = [[{"role": "user", "content": [ask, {"type": "text", "text": one}]}] for one in text]
    names["answer"](text=chats, batch_size=2, max_new_tokens=16)
    assert [prompt.layers.tolist() for prompt in names["handle"].record[3:]] == [[1, 2], [7]]
    model, processor = mllm
    sample = Sample("one", [Image.open("docs/figures/scene.png")], names["question"], ["2"], [], "count")
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.load(HEADS)) as exits:
        model(**encode(processor, [sample]))
    assert exits.layers.tolist() == layers[-1]


def test_the_use_shown_in_the_documents(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exits, reductions = code_of("docs/usage.md")
    with torch.no_grad():
        exec(exits, names)
        answers = names["output"][:, names["inputs"]["input_ids"].shape[1] :]
        said = names["processor"].batch_decode(answers, skip_special_tokens=True)
        assert sum(a.strip() == sample.answers[0] for a, sample in zip(said, names["samples"])) >= 44
        assert names["exits"].layers.shape == (48,) and len(set(names["exits"].layers.tolist())) > 2
        exec(reductions, names)
    handle, visual = names["handle"], names["model"].config.image_seq_length
    assert handle.counts[:, 0].tolist() == [visual] * 2 + [visual // 2] * 4 + [0] * 4
    assert handle.kept(2).sum() == (names["inputs"]["attention_mask"].sum() - 48 * visual // 2)


def test_the_tour_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    with warnings.catch_warnings(), torch.enable_grad():  # what the tour switches off is on again after it
        warnings.simplefilter("ignore")  # matplotlib has no window to show
        for cell in json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert names["agreement"].shape == (len(names["samples"]), 10) and names["agreement"][:, -1].eq(1).all()
    assert names["saved"] > 0.3


def test_the_heads_know_where_they_come_from(mllm):
    heads = dyvte.ExitHeads.from_pretrained(HEADS)
    config = heads.config
    assert config.base_model.endswith("reference-mllm") and config.promise.alpha == 0.01
    assert config.promise.bound <= 0.01 and config.training["data"][0]["scenes"]["split"] == "train"
    assert sum(path.stat().st_size for path in HEADS.iterdir()) < 4_000_000
    dyvte.attach(mllm[0], dyvte.LearnedExit(heads)).detach()


def test_committed_results_hold_what_was_promised():
    result = json.loads((ROOT / "benchmarks/results/reference.json").read_text())
    learned = result["from_traces"]["learned"]
    assert result["samples"] == 2000
    assert learned["agreement"] >= 0.99 and learned["oracle_share"] >= 0.65
    measured = result["policies"]["learned"]
    assert measured["agreement"] == pytest.approx(learned["agreement"], abs=0.002)
    assert measured["mean_exit_layer"] == pytest.approx(learned["mean_exit_layer"], abs=0.02)


def test_the_table_in_the_readme_is_that_of_the_results():
    path = ROOT / "benchmarks/reference_results.py"
    spec = importlib.util.spec_from_file_location("reference_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULT.read_text())) in (ROOT / "README.md").read_text()


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"(?:configs|train|benchmarks)/[\w/-]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


def test_importing_dyvte_needs_torch_transformers_and_safetensors_only():
    script = "import sys; from dyvte import *; print(*(m for m in sys.modules if m.startswith('dyvte.')))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {name.split(".")[1] for name in out.split()} == {
        "heads",
        "identity",
        "methods",
        "promise",
        "provenance",
        "runtime",
        "training",
        "version",
    }
    assert {name for name in out.split() if ".training" in name} == {
        "dyvte.training",
        *("dyvte.training." + name for name in ("trace", "trace_head", "trace_pass")),
    }
    for name in out.split():
        path = ROOT / name.replace(".", "/")
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
        assert imported <= {*sys.stdlib_module_names, "torch", "transformers", "safetensors", "dyvte"}, name
