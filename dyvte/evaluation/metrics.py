"""Task scores: what share of the answers is right, as each benchmark counts it.

Every metric is a torchmetrics ``Metric``: ``update(predictions, answers, choices)``, then ``compute()``, which returns
``score``, its standard error over samples ``stderr``, ``n``, and whatever else the benchmark publishes, all in 0 ... 1.
``score_sample`` scores a single answer. ``METRICS`` holds them by the name that stands under ``metric:`` in a config.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_f1_score, binary_precision, binary_recall
from torchmetrics.functional.text import edit_distance
from torchmetrics.utilities import dim_zero_cat

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class AnswerMetric(Metric):
    """Mean over samples of a score in 0 ... 1. Subclasses define :meth:`score_sample`."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        """The score of one prediction, given the accepted answers and, for multiple choice, the options."""
        raise NotImplementedError

    def update(
        self,
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Adds samples.

        Raises:
            ValueError: lists of different lengths, or a sample without an answer.
        """
        choices = [()] * len(predictions) if choices is None else choices
        if not len(predictions) == len(answers) == len(choices):
            raise ValueError(
                f"{len(predictions)} predictions, {len(answers)} lists of answers and {len(choices)} lists of choices: "
                "give one of each per sample"
            )
        for given in answers:
            if isinstance(given, str) or len(given) == 0:
                raise ValueError(f"each sample needs a list of accepted answers, not {given!r}")
        scores = [self.score_sample(*sample) for sample in zip(predictions, answers, choices)]
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """``score``, ``stderr`` (of the mean; NaN for a single sample) and ``n``."""
        scores = dim_zero_cat(self.scores)
        return {"score": scores.mean(), "stderr": _standard_error(scores), "n": torch.tensor(len(scores))}


def _standard_error(values: torch.Tensor) -> torch.Tensor:
    return values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))


class ExactMatch(AnswerMetric):
    """1 if the prediction is one of the answers; case, spacing and punctuation around words do not count."""

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    words = (word.strip(".,;:!?\"'()[]") for word in text.casefold().split())
    return " ".join(word for word in words if word)


class VQAAccuracy(AnswerMetric):
    """min(1, annotators who agree / 3), averaged over leaving each annotator out (Antol et al., 2015).

    Predictions and answers are normalised as in the public evaluation server. A single answer counts as a match or not.
    """

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        given, right = normalise_vqa(prediction), [normalise_vqa(answer) for answer in answers]
        if len(right) == 1:
            return float(given == right[0])
        agree = right.count(given)
        others = [agree - (answer == given) for answer in right]
        return sum(min(1.0, count / 3) for count in others) / len(others)


NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't should've shouldn't "
    "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's "
    "they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've "
    "couldn't've hadn't've he'd've it'd've mightn't've shouldn't've there'd've they'd've we'd've who'd've wouldn't've "
    "you'd've y'all'll"
).split()


def _without_one_apostrophe(word: str) -> set[str]:
    places = [i for i, letter in enumerate(word) if letter == "'"]
    return {word[:i] + word[i + 1 :] for i in places}


CONTRACTIONS = {bare: word for word in APOSTROPHES for bare in _without_one_apostrophe(word)}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,+\d")
LONELY_PERIOD = re.compile(r"\.(?!\d)")


def normalise_vqa(answer: str) -> str:
    """Lower case, no punctuation, digits for number words, no articles, apostrophes where they were left out."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " ").replace("\t", " ")
    text = text.strip()
    grouped = DIGIT_COMMA.search(text) is not None
    # A mark beside a space or in a grouped number vanishes; one inside a word becomes a space.
    marks = {m: "" if grouped or m + " " in text or " " + m in text else " " for m in MARKS}
    text = LONELY_PERIOD.sub("", text.translate(str.maketrans(marks)))
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class ANLS(AnswerMetric):
    """Average normalised Levenshtein similarity (Biten et al., 2019): 1 - distance / length, 0 where that is below 0.5.

    The best of the accepted answers counts.
    """

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        given = " ".join(prediction.lower().split())
        right = [" ".join(answer.lower().split()) for answer in answers]
        if given in right:
            return 1.0
        distances = edit_distance([given] * len(right), right, reduction="none").tolist()
        best = max(1 - d / max(len(given), len(answer), 1) for d, answer in zip(distances, right))
        return best if best >= 0.5 else 0.0


class YesNo(AnswerMetric):
    """F1 of "yes" with POPE's accuracy, precision, recall and rate of "yes" (Li et al., 2023).

    A prediction says no if its first sentence has the word "no" or "not", else yes if it has "yes"; one that says
    neither is wrong and counts as not yes. ``score`` is F1 and ``stderr`` its delta-method standard error; the score
    of a sample is whether it is right.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("said_yes", default=[], dist_reduce_fx="cat")
        self.add_state("is_yes", default=[], dist_reduce_fx="cat")

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return float(says(prediction) == self._right(answers))

    @staticmethod
    def _right(answers: Sequence[str]) -> str:
        right = says(answers[0])
        if right is None:
            raise ValueError(f"the answer of a yes/no question must be yes or no, not {answers[0]!r}: choose a metric")
        return right

    def update(
        self,
        predictions: Sequence[str],
        answers: Sequence[Sequence[str]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().update(predictions, answers, choices)
        self.said_yes.append(torch.tensor([says(p) == "yes" for p in predictions], device=self.device).long())
        self.is_yes.append(torch.tensor([self._right(a) == "yes" for a in answers], device=self.device).long())

    def compute(self) -> dict[str, torch.Tensor]:
        """``score`` (F1), ``stderr``, ``n``, ``accuracy``, ``precision``, ``recall``, ``yes_rate``."""
        said, right = dim_zero_cat(self.said_yes), dim_zero_cat(self.is_yes)
        f1 = binary_f1_score(said, right)
        # F1 is a ratio of two means, 2 * both and said + right: the error of a ratio follows from its residuals.
        both, either = 2.0 * (said & right), (said + right).double()
        residual = (both - f1 * either) / either.mean().clamp(min=1e-12)
        return super().compute() | {
            "score": f1,
            "stderr": _standard_error(residual),
            "accuracy": dim_zero_cat(self.scores).mean(),
            "precision": binary_precision(said, right),
            "recall": binary_recall(said, right),
            "yes_rate": said.double().mean(),
        }


def says(text: str) -> str | None:
    """ "yes", "no", or None if the first sentence says neither."""
    words = set(re.findall(r"[a-z]+", re.split(r"[.\n]", text.strip().lower(), maxsplit=1)[0]))
    if words & {"no", "not"}:
        return "no"
    return "yes" if "yes" in words else None


class MultipleChoice(AnswerMetric):
    """1 if the prediction names the right option, by its letter or by its text."""

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        if not choices:
            raise ValueError("multiple choice needs the options of each sample: map `choices` in the data config")
        right = {_letter(answer, choices) for answer in answers}
        if right == {None}:
            raise ValueError(f"{list(answers)} is neither a letter nor one of the options {list(choices)}")
        return float(_letter(prediction, choices) in right - {None})


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The option a text names: its wording, a letter at the start, "the answer is B", or the only wording inside."""
    plain = [_plain(choice) for choice in choices]
    said = _plain(text)
    if said in plain:
        return LETTERS[plain.index(said)]
    letters = LETTERS[: len(choices)]
    match = re.match(rf"\(?([{letters}])(?:[).:,\s]*$|[).:,])", text.strip()) or re.search(
        rf"\b(?:answer|option|choice)\b\W*(?:is\b)?\W*([{letters}])\b", text
    )
    if match:
        return match[1]
    inside = [LETTERS[i] for i, choice in enumerate(plain) if choice and f" {choice} " in f" {said} "]
    return inside[0] if len(inside) == 1 else None


class RelaxedAccuracy(AnswerMetric):
    """1 for a number within 5 % of the right one, or the same text (Masry et al., 2022); per cent means hundredths."""

    tolerance = 0.05

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return float(any(self._close(prediction, answer) for answer in answers))

    def _close(self, prediction: str, answer: str) -> bool:
        given, right = _number(prediction), _number(answer)
        if given is None or not right:
            return prediction.strip().lower() == answer.strip().lower()
        return abs(given - right) <= self.tolerance * abs(right)


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


class Contains(AnswerMetric):
    """1 if an answer appears in the prediction, case and spacing aside (LaTeX is compared without spaces).

    An answer of several parts, joined by ``<AND>``, scores the share of them; ``<OR>`` separates alternatives.
    """

    def score_sample(self, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        alternatives = [alternative for answer in answers for alternative in answer.split("<OR>")]
        return max(self._share(prediction, alternative.split("<AND>")) for alternative in alternatives)

    @staticmethod
    def _share(prediction: str, parts: Sequence[str]) -> float:
        found = 0
        for part in parts:
            gap = "" if "\\" in part else " "
            found += gap.join(part.lower().split()) in gap.join(prediction.lower().split())
        return found / len(parts)


METRICS: dict[str, type[AnswerMetric]] = {
    "exact_match": ExactMatch,
    "vqa_accuracy": VQAAccuracy,
    "anls": ANLS,
    "yes_no": YesNo,
    "multiple_choice": MultipleChoice,
    "relaxed_accuracy": RelaxedAccuracy,
    "contains": Contains,
}


def build_metric(name: str, **settings: Any) -> AnswerMetric:
    """A fresh metric by its name, with settings of ``torchmetrics.Metric``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    return METRICS[name](**settings)
