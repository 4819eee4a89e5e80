"""A promise for any method: the boldest of its settings that changes no more answers than promised.

One pass over held-out samples for each setting, from the safest on, until one changes too many answers. The dense
answers are generated once. What is done is kept below ``work`` and not done again::

    work/provenance.json   what all of it is made from; another model, other data or settings are refused
    work/plan.json         which samples make up which unit
    work/answers/          dense answers, a file a unit
    work/settings/         which answers every setting changed, and what it left out
    promise.json           the promise, written at the end
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import DatasetDigest, Readable, Sample, encode, sample_digest
from dyvte.methods.families import LEARNED, Family, Shape, build
from dyvte.promise import IDENTITY, Curve, Promise, boldest_safe
from dyvte.provenance import claim, fingerprint, write_json
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.runtime.reduction import Reduction
from dyvte.training.agreement import dense_answers, keeps_answers
from dyvte.training.calibrate import check_enough, clopper_pearson
from dyvte.training.identity import PROVENANCE, check_same, trace_record
from dyvte.training.lock import one_run, run_name
from dyvte.training.plan import MAX_UNIT, PLAN, Plan
from dyvte.training.write import Traceable


def calibrate_method(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    folder: str | os.PathLike,
    method: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    settings: Sequence[Mapping[str, Any]] | None = None,
    alpha: float = 0.01,
    delta: float = 0.1,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    template: str | None = None,
    provenance: dict[str, Any] | None = None,
    on_error: str = "stop",
    max_errors: int = 100,
    progress: bool = True,
) -> Promise:
    """Finds the boldest setting of a method with P(answer differs from dense) <= alpha, confidence 1 - delta.

    Args:
        samples: held out from whatever the method, or its order of settings, was tuned on.
        folder: where the promise goes, for :func:`dyvte.load`. The same call goes on where an earlier one stopped;
            with another alpha or delta it uses what is there.
        method: a name in :data:`dyvte.methods.METHODS`, or several, joined by ``&``.
        fixed, settings: in place of what the method declares, see :meth:`dyvte.methods.families.Family.of`.
        provenance: what the samples come from, such as the data config, for the record.
        on_error, max_errors: samples that cannot be used, see :class:`dyvte.data.Readable`.

    Raises:
        ValueError: too few samples, a method or settings that do not fit, a folder that holds something else or that
            another run is working in, or not even the safest setting keeps the promise.
        SampleError, TooManyErrors: samples that cannot be used.
    """
    check_enough(len(samples), alpha, delta)
    folder, spec = Path(folder), DecoderSpec.of(model)
    plan = Plan.of(len(samples), batch_size, MAX_UNIT, 0, getattr(samples, "lengths", None))
    readable = Readable(Traceable(samples, "dense"), on_error, max_errors)
    record = trace_record(spec, processor, samples, plan, "dense", max_new_tokens, template, None)
    record["data"] = provenance or {}
    family = Family.of(method, _shape(spec, processor, readable, template), fixed, settings)
    if LEARNED in family.methods:
        raise ValueError("exit heads are calibrated on traces: use dyvte.training.calibrate or .together")
    for setting in family.settings:  # what does not fit is said before any work
        build(family.methods, setting).check(spec)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    with one_run(folder / "work", run_name(1)):
        claim(folder / "work" / PROVENANCE, record, partial(check_same, folder / "work"))
        write_json(folder / "work" / PLAN, plan.as_dict())
        work = _Work(folder / "work", model, processor, plan, readable, template, max_new_tokens, progress)
        asked = work.answer()
        check_enough(asked, alpha, delta)
        promise = _promise(work, family, alpha, delta, record)
        promise.write(folder)
    if promise.saved == 0 and len(promise.curve) > 1 and max(promise.curve.saved) > 0:
        warnings.warn(
            f"{method} saves nothing in the setting that keeps the promise, {promise.setting}: allow more than "
            f"{alpha} of the answers to change, or use more than {asked} samples",
            stacklevel=2,
        )
    return promise


def _shape(spec: DecoderSpec, processor: Any, readable: Readable, template: str | None) -> Shape:
    """Of the first sample that can be used."""
    sample = next((sample for _, sample in readable), None)
    if sample is None:
        raise ValueError("none of the samples can be used: look at what is wrong with them with on_error=stop")
    visual = visual_tokens(spec.model, encode(processor, [sample], template)["input_ids"])
    return Shape.of(spec, int(visual.sum()), len(sample.images))


def _promise(work: _Work, family: Family, alpha: float, delta: float, record: Mapping[str, Any]) -> Promise:
    """Fixed-sequence testing: one setting after the other, until the first that fails."""
    risk, bound, saved = [], [], []
    for index, setting in enumerate(family.settings):
        outcome = work.try_setting(family.methods, setting, f"{index + 1} of {len(family.settings)}")
        count = len(outcome.changed)
        risk.append(sum(outcome.changed) / count)
        bound.append(float(clopper_pearson(sum(outcome.changed), count, delta)))
        saved.append(min(max(sum(outcome.saved) / count, 0.0), 1.0))
        if bound[-1] > alpha:
            break
    chosen = boldest_safe(bound, alpha)
    if chosen is None:
        raise ValueError(
            f"not even the safest setting, {dict(family.settings[0])}, keeps the risk below {alpha} with confidence "
            f"{1 - delta:g}: it changes {risk[0]:.3g} of {count} answers. Allow more risk, declare safer settings, or, "
            "if it should change none, load the model in float32, where rounding changes fewer answers"
        )
    return Promise(
        alpha=alpha,
        delta=delta,
        samples=count,
        methods=list(family.methods),
        curve=Curve(family.columns(len(risk)), risk, bound, saved),
        chosen=chosen,
        base_model=record["base_model"],
        identity={name: record[name] for name in IDENTITY},
        data=[record["data"]],
        content=work.content,
        shared_images=0,  # nothing was trained
        reliability=None,
    )


@dataclass(frozen=True)
class Outcome:
    """What a setting did to every sample, in the order of their indices."""

    setting: Mapping[str, Any]
    changed: list[bool]
    saved: list[float]


class _Work:
    """The folder of a calibration: answers and outcomes that are there, and how to make those that are not."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        processor: Any,
        plan: Plan,
        readable: Readable,
        template: str | None,
        max_new_tokens: int,
        progress: bool,
    ):
        self.folder, self.model, self.processor, self.plan, self.readable = folder, model, processor, plan, readable
        self.template, self.max_new_tokens, self.progress = template, max_new_tokens, progress
        self.answers: dict[int, list[int]] = {}  # ids of the dense answer, by sample
        self.digests: dict[int, str] = {}
        self.content = ""
        for name in ("answers", "settings"):
            (folder / name).mkdir(exist_ok=True)

    def answer(self) -> int:
        """Generates the dense answers that are missing; how many samples there are.

        Raises:
            ValueError: a sample has changed since it was answered.
        """
        digest, given = DatasetDigest(), {}
        for number, unit in self._units("dense answers"):
            path = self.folder / "answers" / f"{number:06d}.json"
            known = {row["index"]: row for row in _read(path, [])}
            rows = []
            for batch in self.plan.batches(unit):
                if all(index in known for index, _ in batch):
                    rows += [known[index] for index, _ in batch]
                    continue
                ids, answer = dense_answers(self.model, self._encode(batch), self.max_new_tokens)
                rows += [
                    {"index": index, "digest": sample_digest(sample), "ids": ids[i][answer[i]].tolist()}
                    for i, (index, sample) in enumerate(batch)
                ]
            if len(known) < len(rows):
                write_json(path, rows)
            found = {row["index"]: row for row in rows}
            for index, sample in unit:
                if found[index]["digest"] != sample_digest(sample):
                    raise ValueError(
                        f"sample {sample.id!r} has another image or text than when it was answered in {self.folder}: "
                        "bring the old data back, or choose another folder"
                    )
                self.answers[index], given[index] = found[index]["ids"], sample.answers
                self.digests[index] = found[index]["digest"]
        for index in sorted(self.answers):
            digest.update(self.digests[index], given[index])
        self.content = digest.hexdigest()
        return len(self.answers)

    def try_setting(self, methods: Sequence[str], setting: Mapping[str, Any], title: str) -> Outcome:
        """What a setting does, from the folder if it is there."""
        name = fingerprint([list(methods), dict(setting), sorted(self.answers)])
        path = self.folder / "settings" / f"{name}.json"
        known = _read(path, None)
        if known is not None:
            return Outcome(**known)
        method = build(methods, setting)
        changed, saved = {}, {}
        for _, unit in self._units(f"setting {title}"):
            for batch in self.plan.batches(unit):
                same, left_out = self._keeps(method, batch)
                for (index, _), kept, share in zip(batch, same.tolist(), left_out.tolist()):
                    changed[index], saved[index] = not kept, share
        outcome = Outcome(dict(setting), [changed[i] for i in sorted(changed)], [saved[i] for i in sorted(saved)])
        write_json(path, asdict(outcome))
        return outcome

    def _keeps(self, method: Reduction, batch: Sequence[tuple[int, Sample]]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, answers = self._encode(batch), [self.answers[index] for index, _ in batch]
        width = max(map(len, answers))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in answers], device=self.model.device)
        lengths = torch.tensor([len(row) for row in answers], device=ids.device)
        answer = torch.arange(width, device=ids.device) < lengths[:, None]
        return keeps_answers(self.model, method.keyed([sample.id for _, sample in batch]), inputs, ids, answer)

    def _encode(self, batch: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
        samples = [sample for _, sample in batch]
        return encode(self.processor, samples, self.template).to(self.model.device, self.model.dtype)

    def _units(self, title: str) -> Iterator[tuple[int, list[tuple[int, Sample]]]]:
        with tqdm(total=len(self.readable.samples), desc=title, unit="sample", disable=not self.progress) as bar:
            for number, planned in enumerate(self.plan.units):
                yield number, list(self.readable.at(planned))
                bar.update(len(planned))


def _read(path: Path, missing: Any) -> Any:
    """JSON that was written whole; a damaged file is named and made again."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return missing
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}); it is made again", stacklevel=3)
        return missing
