"""One question, dense and with exits, against the same steps taken one by one; and the heat map."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import dyvte
from dyvte.cli.app import SCENES
from dyvte.cli.demo import REFERENCE
from dyvte.config import ModelConfig
from dyvte.data import GREEDY, encode, load_samples
from dyvte.evaluation.costs import prefill_flops
from dyvte.evaluation.heat_map import heat_map, seen_picture, token_grid
from dyvte.evaluation.side_by_side import SideBySide
from dyvte.loading import load_mllm


@pytest.fixture(scope="module")
def asked():
    mllm = load_mllm(ModelConfig(model=str(REFERENCE / "reference-mllm"), dtype="float32", device="cpu"))
    return SideBySide(mllm, dyvte.ExitHeads.from_pretrained(REFERENCE / "reference-heads"))


@pytest.mark.parametrize("risk", [0.005, 0.1])
def test_both_answers_and_what_they_took(asked, risk):
    model, processor = asked.subject.model, asked.subject.processor
    for sample in load_samples(SCENES)[:4]:
        found = asked.ask(sample.images[0], sample.question, risk)
        inputs = encode(processor, [sample])
        text = inputs["input_ids"].shape[1] - 100

        def answer(inputs=inputs):
            ids = model.generate(**inputs, max_new_tokens=16, **GREEDY)[0, inputs["input_ids"].shape[1] :]
            return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

        assert found.dense == answer()
        with dyvte.visual_exit(model, dyvte.LearnedExit(asked.heads, risk=risk)) as exits:
            assert found.answer == answer()
        assert (found.exit_layer, found.visual, found.text) == (int(exits.layers), 100, text)
        spent, whole = (prefill_flops(model.config.text_config, text, 100, e) for e in (found.exit_layer, 10))
        assert found.saved == pytest.approx(1 - spent / whole)
        assert found.seconds > 0 and found.dense_seconds > 0 and 0 < found.attention < 1
        assert found.picture.size == (480, 480)
        seen = seen_picture(inputs, processor, sample.images[0])
        difference = torch.tensor(list(seen.tobytes())).float() - torch.tensor(list(sample.images[0].tobytes())).float()
        assert float(difference.abs().max()) <= 1


def test_heads_without_a_promise_are_refused(asked):
    heads = dyvte.ExitHeads(dyvte.ExitHeadsConfig(num_layers=10, hidden_size=128))
    with pytest.raises(ValueError, match="no promise .*dyvte calibrate"):
        SideBySide(SimpleNamespace(model=asked.subject.model, processor=None), heads)


def test_the_largest_weight_is_the_most_coloured():
    weights = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 0.4]])
    drawn = heat_map(Image.new("RGB", (90, 60), "white"), weights)
    assert drawn.size == (480, 320)

    def colourful(row, column):
        red, _, blue = drawn.getpixel((160 * column + 80, 160 * row + 80))
        return red - blue

    assert colourful(1, 2) > 150 > colourful(0, 1) > 20 > colourful(0, 0) == 0


@pytest.mark.parametrize(
    ("inputs", "count", "grid"),
    [
        ({"pixel_values": torch.zeros(1, 3, 90, 90)}, 100, (10, 10)),
        ({"pixel_values": torch.zeros(1, 3, 90, 90)}, 101, None),  # a token for the end of the image
        ({"pixel_values": torch.zeros(1, 5, 3, 90, 90)}, 576, None),  # tiles
        ({"pixel_values": torch.zeros(96, 12), "image_grid_thw": torch.tensor([[1, 8, 12]])}, 24, (4, 6)),
    ],
)
def test_where_visual_tokens_lie(inputs, count, grid):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    assert token_grid(inputs, config, count) == grid
