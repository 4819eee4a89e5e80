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

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyvte.config import MethodConfig
from dyvte.data import Readable, Sample, fingerprint, load_samples, read_config
from dyvte.loading import load_mllm
from dyvte.methods.exits import NeverExit
from dyvte.methods.families import LEARNED, Family, Shape, build
from dyvte.promise import IDENTITY, Curve, Promise, boldest_safe
from dyvte.provenance import claim, write_json
from dyvte.ranks import Ranks
from dyvte.runtime import reduce_tokens
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.calibrate import check_enough, clopper_pearson
from dyvte.training.identity import PROVENANCE, check_same, trace_record
from dyvte.training.lock import one_run, run_name
from dyvte.training.outcomes import Work
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
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
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
        visual_mask, decoder: as in :func:`dyvte.attach`, for models of other code bases.
        provenance: what the samples come from, such as the data config, for the record.
        on_error, max_errors: samples that cannot be used, see :class:`dyvte.data.Readable`.

    Raises:
        ValueError: too few samples, a method or settings that do not fit, a folder that holds something else or that
            another run is working in, or not even the safest setting keeps the promise.
        SampleError, TooManyErrors: samples that cannot be used.
    """
    check_enough(len(samples), alpha, delta)
    folder, spec = Path(folder), DecoderSpec.of(model, decoder)
    plan = Plan.of(len(samples), batch_size, MAX_UNIT, 0, getattr(samples, "lengths", None))
    readable = Readable(Traceable(samples, "dense"), on_error, max_errors)
    record = trace_record(spec, processor, samples, plan, "dense", max_new_tokens, template, None)
    record["data"] = provenance or {}
    asking = (template, max_new_tokens, visual_mask, decoder, progress)
    work = Work(folder / "work", model, processor, plan, readable, *asking)
    family = Family.of(method, _shape(work), fixed, settings)
    if LEARNED in family.methods:
        raise ValueError("exit heads are calibrated on traces: use dyvte.training.calibrate or .together")
    for setting in family.settings:  # what does not fit is said before any work
        build(family.methods, setting).check(spec)
    work.folder.mkdir(parents=True, exist_ok=True)
    with one_run(work.folder, run_name(Ranks())):
        claim(work.folder / PROVENANCE, record, partial(check_same, work.folder))
        write_json(work.folder / PLAN, plan.as_dict())
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


def calibrate_config(config: MethodConfig) -> Promise:
    """:func:`calibrate_method` as a config asks for it, in one process.

    Raises:
        ValueError: nothing is promised, or the model is to be laid over several ranks.
    """
    if config.alpha is None:
        raise ValueError("alpha is what is promised and cannot be null here: set for example alpha=0.01")
    if config.shard not in ("none", "device_map"):
        raise ValueError(f"a method is calibrated in one process, not with shard={config.shard}: use device_map")
    data = read_config(config.data)
    samples = load_samples(data)  # what is wrong with it is said before a model is loaded
    mllm = load_mllm(config)
    return calibrate_method(
        mllm.model,
        mllm.processor,
        samples,
        config.output,
        config.method,
        fixed=config.fixed,
        settings=config.settings,
        alpha=config.alpha,
        delta=config.delta,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens or data.get("max_new_tokens", 16),
        template=data.get("template"),
        visual_mask=mllm.visual_mask,
        decoder=mllm.decoder,
        provenance=data | {"fingerprint": fingerprint(data)},
        on_error=config.on_error,
        max_errors=config.max_errors,
    )


@torch.no_grad()
def _shape(work: Work) -> Shape:
    """Of the first sample that can be used; one pass of the model tells."""
    first = next(iter(work.readable), None)
    if first is None:
        raise ValueError("none of the samples can be used: look at what is wrong with them with on_error=stop")
    with reduce_tokens(work.model, NeverExit(), work.visual_mask, work.decoder) as handle:
        handle.spec.model(**work.encode([first]), use_cache=False)
    return Shape.of(handle.spec, int(handle.record[-1].visual), len(first[1].images))


def _promise(work: Work, family: Family, alpha: float, delta: float, record: Mapping[str, Any]) -> Promise:
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
