"""A method as a calibration left it: with the settings that keep a promise, for the model it was promised of."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.identity import model_fingerprint
from dyvte.methods.families import LEARNED, build
from dyvte.methods.learned import LearnedExit
from dyvte.promise import FILE, Promise
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import Reduction


class Promised(Reduction):
    """A method that keeps a promise. Made by :func:`load`.

    Attributes:
        promise: which.
        method: what is at work.
        other_weights: whether models that the promise is not about are accepted.
    """

    def __init__(self, promise: Promise, method: Reduction, other_weights: bool = False):
        self.promise, self.method, self.other_weights = promise, method, other_weights

    def parts(self) -> tuple[Reduction, ...]:
        return self.method.parts()

    def keyed(self, keys: Sequence[str]) -> Reduction:
        return Promised(self.promise, self.method.keyed(keys), self.other_weights)

    def check(self, spec: DecoderSpec) -> None:
        if not self.other_weights:
            name = getattr(getattr(spec.model, "config", None), "_name_or_path", None)
            self.promise.check_weights(model_fingerprint(spec.model), name)
        self.method.check(spec)

    def check_rows(self, rows: int) -> None:
        self.method.check_rows(rows)


def load(folder: str | os.PathLike, risk: float | None = None, other_weights: bool = False) -> Reduction:
    """What a calibration wrote into a folder, for :func:`dyvte.reduce_tokens`.

    Args:
        folder: of ``dyvte calibrate``, or of exit heads.
        risk: the share of answers that may change, instead of the one calibrated for; from the same curve.
        other_weights: use it on a model whose weights are not those it was calibrated for. No promise holds then.

    Raises:
        ValueError: there is nothing of the kind, it is damaged, or such a risk was not shown. On attaching: the model
            has other weights.
    """
    if (Path(folder) / FILE).exists():
        promise = Promise.read(folder)
        promise = promise if risk is None else promise.with_risk(risk)
        heads = ExitHeads.from_pretrained(folder) if LEARNED in promise.methods else None
        options = {} if heads is None else {"other_weights": other_weights}
        return Promised(promise, build(promise.methods, promise.setting, heads, **options), other_weights)
    config = Path(folder) / "config.json"
    if not config.exists() or json.loads(config.read_text()).get("model_type") != ExitHeadsConfig.model_type:
        raise ValueError(f"{folder} holds neither a promise nor exit heads: make one with `dyvte calibrate`")
    return LearnedExit(ExitHeads.from_pretrained(folder), risk=risk, other_weights=other_weights)
