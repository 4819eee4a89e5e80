from __future__ import annotations

import math

import pytest
import torch

from dyvte.evaluation.metrics import METRICS, MultipleChoice, YesNo, build_metric, normalise_vqa, says


@pytest.mark.parametrize(
    ("name", "prediction", "answers", "score"),
    [
        ("exact_match", " Red. ", ["red"], 1),
        ("exact_match", "1 2 3", ["1 2 4", "1  2 3"], 1),
        ("exact_match", "dark red", ["red"], 0),
        ("exact_match", "", ["red"], 0),
        ("vqa_accuracy", "two", ["2"] * 4 + ["3"] * 6, 1),
        ("vqa_accuracy", "two", ["2"] * 3 + ["3"] * 7, 0.9),  # 3 of 10 times one of the three is left out: 2/3
        ("vqa_accuracy", "two", ["2"] + ["3"] * 9, 0.3),  # left out once: 0, else 1/3
        ("vqa_accuracy", "The dog", ["dog"], 1),
        ("anls", "Hello  world", ["hello world"], 1),
        ("anls", "hella world", ["hello world"], 10 / 11),
        ("anls", "xyz", ["hello world"], 0),
        ("anls", "", ["hello"], 0),
        ("relaxed_accuracy", "104", ["100"], 1),
        ("relaxed_accuracy", "106", ["100"], 0),
        ("relaxed_accuracy", "52%", ["0.5"], 1),
        ("relaxed_accuracy", "0", ["0"], 1),
        ("relaxed_accuracy", "Blue ", ["blue"], 1),
        ("contains", "It says STOP here", ["stop", "halt"], 1),
        ("contains", r"\frac { 1 } { 2 }", [r"\frac{1}{2}"], 1),
        ("contains", "x = -1", ["-1<AND>-5"], 0.5),
        ("contains", "a bus", ["car<OR>bus"], 1),
        ("yes_no", "Yes, there is.", ["yes"], 1),
        ("yes_no", "There is not a dog", ["Yes"], 0),
        ("yes_no", "perhaps", ["yes"], 0),
    ],
)
def test_scores_of_single_answers(name, prediction, answers, score):
    assert build_metric(name).score_sample(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("(B)", "B"),
        ("B. a cat", "B"),
        ("a cat", "B"),
        ("A dog.", "A"),
        ("The answer is C", "C"),
        ("The correct option: (C).", "C"),
        ("It is probably a bird, I think", "C"),
        ("a dog and a cat", None),
        ("Bread", None),
        ("E", None),
        ("", None),
    ],
)
def test_multiple_choice_understands_how_models_answer(said, letter):
    choices = ["a dog", "a cat", "a bird", "nothing"]
    scores = [MultipleChoice().score_sample(said, [right], choices) for right in "ABCD"]
    assert scores == [float(right == letter) for right in "ABCD"]


def test_multiple_choice_takes_the_wording_as_the_answer():
    assert MultipleChoice().score_sample("B", ["a cat"], ["a dog", "a cat"]) == 1
    with pytest.raises(ValueError, match="map `choices`"):
        MultipleChoice().score_sample("B", ["B"])
    with pytest.raises(ValueError, match="neither a letter nor one of the options"):
        MultipleChoice().score_sample("B", ["fish"], ["a dog", "a cat"])


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The Cat's paw!", "cat 's paw"),
        ("1,000", "1000"),
        ("3.5 metres.", "3.5 metres"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("black/white", "black white"),
        ("none", "0"),
        ("a\nred  ball", "red ball"),
    ],
)
def test_vqa_normalisation(raw, normal):
    assert normalise_vqa(raw) == normal


def test_yes_no_gives_what_pope_publishes():
    said = ["yes", "Yes.", "no", "No, it is not", "yes", "maybe"]
    right = [["yes"], ["no"], ["yes"], ["no"], ["yes"], ["no"]]
    metric = YesNo()
    metric.update(said[:2], right[:2])
    metric.update(said[2:], right[2:])
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result["accuracy"] == pytest.approx(3 / 6)
    assert result["precision"] == pytest.approx(2 / 3)
    assert result["recall"] == pytest.approx(2 / 3)
    assert result["score"] == pytest.approx(2 / 3)
    assert result["yes_rate"] == pytest.approx(3 / 6)
    assert says("neither") is None


def test_the_error_of_f1_is_that_of_resampling():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(400, generator=generator) < 0.4
    said = torch.where(torch.rand(400, generator=generator) < 0.85, right, ~right)

    def f1(rows):
        both = (said[rows] & right[rows]).sum()
        return float(2 * both / (said[rows].sum() + right[rows].sum()))

    resampled = torch.tensor([f1(torch.randint(400, (400,), generator=generator)) for _ in range(1000)])
    metric = YesNo()
    words = {True: "yes", False: "no"}
    metric.update([words[s] for s in said.tolist()], [[words[r]] for r in right.tolist()])
    assert float(metric.compute()["stderr"]) == pytest.approx(float(resampled.std()), rel=0.1)


def test_mean_standard_error_and_count():
    metric = build_metric("exact_match")
    metric.update(["a", "b", "c", "d"], [["a"], ["b"], ["x"], ["d"]])
    result = metric.compute()
    assert float(result["score"]) == 0.75 and int(result["n"]) == 4
    assert float(result["stderr"]) == pytest.approx(math.sqrt(0.25 / 4))
    metric.reset()
    metric.update(["a"], [["a"]])
    assert math.isnan(metric.compute()["stderr"])


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'bleu': choose from exact_match"):
        build_metric("bleu")
    for name in METRICS:
        with pytest.raises(ValueError, match="list of accepted answers"):
            build_metric(name).update(["a"], ["a"])
        with pytest.raises(ValueError, match="give one of each per sample"):
            build_metric(name).update(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="must be yes or no"):
        build_metric("yes_no").update(["yes"], [["red"]])
