"""The training of the reference MLLM, in a few steps of a far smaller one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dyvte.data import encode, scenes
from dyvte.data.samples import Sample

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

from reference_mllm import __main__ as command  # noqa: E402
from reference_mllm import build_model, build_processor, turns  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGE = {"lr": 0.01, "weight_decay": 0.01, "warmup": 2, "log_every": 1, "evaluate_every": 3, "save_every": 2}
SETTINGS = {
    "vision_config": SIZES | {"patch_size": 9, "projection_dim": 16},
    "text_config": SIZES,
    "vision": STAGE | {"steps": 3, "batch_size": 4},
    "answers": STAGE
    | {"steps": 4, "batch_size": 4, "turns": 3}
    | {"phases": [{"until": 2, "weights": {"digit_of": 0.0}}, {"until": 4, "weights": {"read_row": 3.0}}]},
    "report": {"questions": 24, "seed": 1},
}


def train(folder: Path, *more: str) -> None:
    settings = folder / "settings.yaml"
    folder.mkdir(exist_ok=True)
    settings.write_text(yaml.safe_dump(SETTINGS))
    command.main(["--config", str(settings), "--work", str(folder / "work"), "--output", str(folder / "out"), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


def test_a_stopped_run_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    """Stopped in the third step of either stage, one step after the latest state."""
    draw, drawn = scenes.draw, []

    def stop(*args, **kwargs):
        drawn.append(args)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(scenes, "draw", stop)
    for stage in ("vision", "answers"):
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "--stage", stage)
        assert torch.load(tmp_path / "work" / f"{stage}.pt")["step"] == 2
        train(tmp_path, "--stage", stage)
        steps = [json.loads(row)["step"] for row in (tmp_path / "work" / f"{stage}.jsonl").read_text().splitlines()]
        assert steps == list(range(1, SETTINGS[stage]["steps"] + 1))
    found, expected = (load_file(folder / "out" / "model.safetensors") for folder in (tmp_path, trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_stages_train_what_they_should(trained):
    processor = build_processor(9)
    torch.manual_seed(0)
    untrained = build_model(SETTINGS, len(processor.tokenizer)).state_dict()
    found = AutoModelForImageTextToText.from_pretrained(trained / "out", dtype=torch.float32).state_dict()
    moved = {name for name in found if (found[name] - untrained[name]).abs().max() > 1e-3}
    inner = {name for name in found if "layers" in name and name.endswith("proj.weight")}
    assert len(inner) > 20 and inner <= moved and "lm_head.weight" in moved
    tower = torch.load(trained / "work" / "vision.pt")["module"]["tower.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(found["model.vision_tower.encoder.layers.0.mlp.fc1.weight"], tower.half().float())


def test_the_report(trained):
    result = json.loads((trained / "out" / "report.json").read_text())
    assert result["questions"] == 24 and result["by_kind"].keys() == scenes.KINDS.keys()
    assert result["accuracy"] == pytest.approx(sum(result["by_kind"].values()) / 12)  # two questions of each kind
    text = (trained / "out" / "README.md").read_text()
    assert f"**{100 * result['accuracy']:.1f} %**" in text and "digit_at" in text
    assert (trained / "out" / "curves.png").stat().st_size > 1000
    row = json.loads((trained / "out" / "answers.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and {"loss", "dev_accuracy", *scenes.KINDS} <= row.keys()
    assert AutoProcessor.from_pretrained(trained / "out").tokenizer.padding_side == "left"


@torch.no_grad()
def test_a_turn_is_trained_as_the_prompt_it_will_be():
    """Packed with others behind one image, a question has the logits of its own prompt."""
    processor = build_processor(9)
    torch.manual_seed(0)
    model = build_model(SETTINGS, len(processor.tokenizer)).eval()
    batch = scenes.draw(2, "dev", torch.Generator().manual_seed(3))
    packer = turns.Turns(processor, model.config.image_seq_length)
    packed = packer.pack(batch, 4, [1.0] * len(turns.KINDS), seed=5)
    packed["inputs"]["attention_mask"] = packed["inputs"]["attention_mask"].float()
    logits = model(**packed["inputs"]).logits
    ids = packed["inputs"]["input_ids"]
    for row in range(2):
        for turn in range(1, 5):
            own = packed["turn"][row] == turn
            first = int(packed["labels"][row, own].ne(turns.IGNORED).nonzero()[0])  # the last token of the prompt
            question = processor.decode(ids[row, own][: first + 1]).removesuffix(" ASSISTANT:").replace(" ?", "?")
            kind = turns.KINDS[packed["kind"][row, own][0]]
            image = [batch.images[row].numpy()]
            prompt = encode(processor, [Sample("1", image, question, ["?"], [], kind)])
            assert prompt["input_ids"][0].tolist() == packer.prefix + ids[row, own][: first + 1].tolist()
            expected = model(**prompt).logits[0, -1]
            torch.testing.assert_close(logits[row, own][first], expected, atol=1e-5, rtol=1e-4)


def test_answers_need_a_tower(tmp_path):
    with pytest.raises(ValueError, match="run the stage vision first"):
        train(tmp_path, "--stage", "answers")
