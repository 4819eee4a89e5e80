"""One question answered twice, dense and with exits: what was said, what it took, and where the text looked."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from PIL import Image

from dyvte.data import Sample
from dyvte.evaluation.attention_shares import attention_map
from dyvte.evaluation.heat_map import heat_map, seen_picture, token_grid
from dyvte.evaluation.metrics import build_metric
from dyvte.evaluation.subject import Subject
from dyvte.evaluation.timing import measure
from dyvte.heads import ExitHeads
from dyvte.loading import Mllm
from dyvte.methods.learned import LearnedExit

SECONDS, PAIRS = 1.0, 5  # times are taken again until this is spent, and at most so often


@dataclass(frozen=True)
class Comparison:
    """What became of one question.

    Attributes:
        answer, dense: with exits, and without.
        exit_layer: how many of the ``num_layers`` decoder layers saw the image, 1 ... L.
        visual, text: tokens of the prompt.
        saved: share of the decoder's FLOPs over the prompt.
        seconds, dense_seconds: until the first token, vision tower included; medians.
        attention: share of the text's attention that goes to the image in the exit layer, 0 ... 1.
        picture: the image with what of it the text attends to there; None where visual tokens form no plain grid.
    """

    answer: str
    dense: str
    exit_layer: int
    num_layers: int
    visual: int
    text: int
    saved: float
    seconds: float
    dense_seconds: float
    attention: float
    picture: Image.Image | None


class SideBySide:
    """A model of transformers and its heads, ready to be asked; from one thread at a time.

    Args:
        mllm: the model.
        heads: made for it.
        max_new_tokens: longest answer.

    Raises:
        ValueError: the heads do not fit the model, or carry no promise.
    """

    def __init__(self, mllm: Mllm, heads: ExitHeads, max_new_tokens: int = 16):
        if heads.config.promise is None:
            raise ValueError("these heads carry no promise from which a risk could be chosen: run `dyvte calibrate`")
        self.subject = Subject(mllm.model, mllm.processor, build_metric("exact_match"), max_new_tokens)
        self.heads = heads
        with self.subject.under(LearnedExit(heads), []):
            pass

    @property
    def least_risk(self) -> float:
        """The smallest share of changed answers that the heads can promise."""
        return self.heads.config.promise.curve.bound[0]

    def ask(self, image: Image.Image, question: str, risk: float) -> Comparison:
        """Answers a question dense and with exits.

        Args:
            image: RGB.
            question: about it.
            risk: the share of answers that may change, 0 ... 1.

        Raises:
            ValueError: a question that the model's template does not take, or a risk that the heads cannot promise.
        """
        subject, policy = self.subject, LearnedExit(self.heads, risk=risk)
        samples = [Sample("question", [image], question, [], [], "")]
        inputs = subject.encode(samples)
        (dense,), (short,) = (subject.answer(inputs, way, samples) for way in (None, policy))
        times: dict[bool, list[float]] = {False: [], True: []}
        until = time.perf_counter() + SECONDS
        for pair in range(PAIRS):
            for exits in (False, True) if pair % 2 == 0 else (True, False):
                taken = measure(subject, inputs, 1, policy if exits else None, samples)
                times[exits].append(taken["whole"])
            if time.perf_counter() > until:
                break
        paid = attention_map(subject.model, inputs, short["exit_layer"])[0]
        visual = subject.visual_tokens(inputs)[0].cpu()
        grid = token_grid(inputs, subject.model.config, int(visual.sum()))
        picture = None
        if grid is not None:
            picture = heat_map(seen_picture(inputs, subject.processor, image), paid[visual].view(grid))
        return Comparison(
            answer=short["answer"],
            dense=dense["answer"],
            exit_layer=short["exit_layer"],
            num_layers=subject.num_layers,
            visual=short["visual_tokens"],
            text=short["text_tokens"],
            saved=1 - short["flops"] / dense["flops"],
            seconds=statistics.median(times[True]),
            dense_seconds=statistics.median(times[False]),
            attention=float(paid[visual].sum()),
            picture=picture,
        )
