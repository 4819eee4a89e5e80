"""The promise: how often a method may change an answer, the curve that shows it, and what it is true of.

There is one record. Calibration makes it, checkpoints carry it, and everything that shows a number of it reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dyvte.promise.checks import RULE, boldest_safe, faults
from dyvte.provenance import write_json

FILE = "promise.json"
AGAIN = "it was changed by hand or made by another version of dyvte: calibrate again"


@dataclass(frozen=True)
class Curve:
    """What every setting did to the same held-out samples, from the safest setting to the boldest.

    Attributes:
        settings: by ``method.argument``, such as ``fastv.keep``, the value in every setting.
        risk: share of samples whose answer is not the dense model's.
        bound: upper confidence bound of that share.
        saved: mean share of a sample's visual-token layers that were left out; the work that edits of layers save
            inside of layers does not count.
    """

    settings: Mapping[str, Sequence[Any]]
    risk: Sequence[float]
    bound: Sequence[float]
    saved: Sequence[float]

    def __len__(self) -> int:
        return len(self.risk)

    def setting(self, index: int) -> dict[str, Any]:
        """One setting, by ``method.argument``."""
        return {name: values[index] for name, values in self.settings.items()}

    @property
    def varied(self) -> dict[str, Sequence[Any]]:
        """Of the settings, those that are not the same everywhere."""
        return {name: values for name, values in self.settings.items() if any(v != values[0] for v in values)}


@dataclass(frozen=True)
class Reliability:
    """How often an exit agreed where heads gave a probability of so much: bins over all exit layers."""

    confidence: Sequence[float]
    frequency: Sequence[float]
    count: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """With confidence 1 - ``delta``, at most ``alpha`` of the answers differ from the dense model's.

    It is about greedy answers of one model to samples like those it was calibrated on.

    Attributes:
        alpha: what is promised.
        delta: 1 - confidence.
        samples: how many held-out samples showed it.
        methods: names of the methods at work, see :data:`dyvte.methods.METHODS`; "learned" for exit heads.
        curve: what every setting did.
        chosen: the boldest setting that keeps the promise, an index into the curve.
        base_model: the model's name, for the reader.
        identity: fingerprints of the model's weights and of its processor, its dtype and its attention; None where
            they were not recorded.
        data: the configs that the samples come from.
        content: digest of the samples, see :func:`dyvte.data.dataset_digest`; None where it is not known.
        shared_images: how many of their images the heads were trained on; None where it is not known.
        reliability: of exit heads, if there are any.
        rule: how the setting was chosen.
    """

    alpha: float
    delta: float
    samples: int
    methods: Sequence[str]
    curve: Curve
    chosen: int
    base_model: str | None
    identity: Mapping[str, str] | None
    data: Any
    content: str | None
    shared_images: int | None
    reliability: Reliability | None
    rule: str = RULE

    def __post_init__(self) -> None:
        fault = next(faults(self), None)
        if fault is not None:
            raise ValueError(f"this is no promise: {fault}; {AGAIN}")

    @property
    def setting(self) -> dict[str, Any]:
        """The chosen setting, by ``method.argument``."""
        return self.curve.setting(self.chosen)

    @property
    def risk(self) -> float:
        """The share of the samples whose answer the chosen setting changed."""
        return self.curve.risk[self.chosen]

    @property
    def bound(self) -> float:
        """Upper confidence bound of the chosen setting's risk."""
        return self.curve.bound[self.chosen]

    @property
    def saved(self) -> float:
        """Mean share of the visual-token layers that the chosen setting left out."""
        return self.curve.saved[self.chosen]

    def of_method(self, method: str) -> dict[str, Any]:
        """The arguments of one method in the chosen setting."""
        parted = ((*name.split(".", 1), value) for name, value in self.setting.items())
        return {argument: value for of, argument, value in parted if of == method}

    def with_risk(self, alpha: float) -> Promise:
        """Another promise from the same curve.

        Raises:
            ValueError: no share, or one that so many samples cannot show.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ValueError(f"risk must lie strictly between 0 and 1, not {alpha}: it is a share of changed answers")
        chosen = boldest_safe(self.curve.bound, alpha)
        if chosen is None:
            raise ValueError(
                f"{self.samples} calibration samples cannot show a risk as low as {alpha}: "
                f"the least is {self.curve.bound[0]:.4g}; calibrate on more samples"
            )
        return replace(self, alpha=alpha, chosen=chosen)

    def check_weights(self, weights: str, name: str | None) -> None:
        """Raises ``ValueError`` for a model of other weights than those that the promise is about.

        Args:
            weights: the model's :func:`~dyvte.identity.model_fingerprint`.
            name: of the model, for the message.
        """
        known = (self.identity or {}).get("weights")
        if known != weights:
            raise ValueError(
                f"this promise is about other weights ({self.base_model} in {(self.identity or {}).get('dtype')}, "
                f"{str(known)[:12]}) than those of {name} ({weights[:12]}): load the model in that dtype, with the "
                "same adapters and quantisation, or calibrate for it. load(..., other_weights=True) uses the settings "
                "all the same; then no promise holds"
            )

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, record: Any) -> Promise:
        """The record from JSON.

        Raises:
            ValueError: something is missing, unknown, of another type, or cannot be.
        """
        content = dict(_record(cls, record, "promise"))
        content["curve"] = Curve(**_record(Curve, content["curve"], "curve"))
        if content["reliability"] is not None:
            content["reliability"] = Reliability(**_record(Reliability, content["reliability"], "reliability"))
        return cls(**content)

    def write(self, folder: str | os.PathLike) -> None:
        """Writes promise.json into a folder."""
        write_json(Path(folder, FILE), self.as_dict())

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Promise:
        """From the promise.json of a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder, FILE)
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ValueError(f"there is no {FILE} in {folder}: make one with `dyvte calibrate`") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _record(of: type, value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"the {name} is no record but {type(value).__name__}; {AGAIN}")
    known = {field.name for field in fields(of)}
    missing, unknown = sorted(known - set(value)), sorted(set(value) - known)
    if missing or unknown:
        raise ValueError(f"the {name} has missing fields {missing} and unknown fields {unknown}; {AGAIN}")
    return value
