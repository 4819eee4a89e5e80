"""Heads that learn while the model is traced: no states of training on the disk, however many samples there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyvte.config import FitSettings, OnlineSettings, PromiseSettings, TraceSettings
from dyvte.data import DatasetDigest, Readable, Sample, TooManyErrors, image_digest, sample_digest
from dyvte.heads import ExitHeads
from dyvte.loading import sharing
from dyvte.ranks import Ranks
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.calibrate import calibrate, check_enough
from dyvte.training.content import Content
from dyvte.training.epochs import Log, split
from dyvte.training.fit import heads_config, settings_record
from dyvte.training.held_out import check_held_out
from dyvte.training.identity import IDENTITY, trace_record
from dyvte.training.labels import LEAST
from dyvte.training.lock import one_run, run_name
from dyvte.training.online_rounds import VALIDATION, OnlineRounds
from dyvte.training.parallel import Group
from dyvte.training.plan import Plan
from dyvte.training.replay import Stream
from dyvte.training.state import TrainingState
from dyvte.training.store import load_traces
from dyvte.training.tracer import trace_samples
from dyvte.training.write import Traceable, write_traces

HELD_OUT = "held-out"


def train_online(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] | None,
    work: Path,
    settings: FitSettings | None = None,
    online: OnlineSettings | None = None,
    promise: PromiseSettings | None = None,
    trace: TraceSettings | None = None,
    *,
    max_new_tokens: int = 16,
    template: str | None = None,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
    provenance: Mapping[str, Any] | None = None,
    held_out_provenance: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    log: Log | None = None,
) -> ExitHeads:
    """Traces samples round by round, and takes steps on the latest traces after each round; then calibrates.

    The same call goes on where it was stopped, and ends with the same bits. The state on the disk holds weights and
    moments, not the traces to learn from: a run that goes on traces the latest ``online.buffer`` samples again. On
    other numbers of ranks the heads are the same but for rounding.

    A share ``settings.validation`` of the samples, but 2,048 at most, trains nothing: they are traced first and stay in
    memory, choose the weights that are kept, every ``online.save_every`` rounds, and set the guard's radii. Mean and
    spread of the guard come from the traces that are in the buffer at the end. ``settings.epochs``, ``batch_size`` and
    ``save_every`` play no part. The held-out samples are traced last, into ``work``, so that calibrating them is what
    it is for traces on the disk.

    Args:
        samples, held_out: what to train on, and what to calibrate on, which is not looked at without a
            promise (``promise.alpha``).
        work: folder of the state, and of the held-out traces.
        trace: how samples are traced.
        max_new_tokens, template, visual_mask, decoder: see :func:`dyvte.training.write.write_traces`.
        provenance, held_out_provenance: what the samples come from, for the record.
        ranks: who traces the held-out samples; the same ranks as those of ``torch.distributed``.
        device, log: as in :func:`dyvte.training.fit.fit_heads`; the log is of rounds.

    Raises:
        ValueError: samples that are in both sets, too few of them, states or a loss that are not finite, labels that
            are all alike, a state of something else; on all ranks, if on one.
    """
    settings, online = settings or FitSettings(), online or OnlineSettings()
    promise, trace, group = promise or PromiseSettings(), trace or TraceSettings(), Group.here(device)
    if promise.alpha is None:
        held_out = None
    elif held_out is None:
        raise ValueError("a promise needs held-out samples: give some, or set alpha=None for heads without one")
    elif (ranks or Ranks()).world_size != group.size:
        raise ValueError(f"{group.size} ranks train together: pass `ranks`, so that they share the held-out samples")
    usable, content, digest = _digests(samples, trace, group)
    if len(usable) < LEAST:
        raise ValueError(f"{len(usable)} samples are too few to train heads: take at least some hundred")
    if held_out is not None:
        _, shown, _ = _digests(held_out, trace, group)
        check_enough(len(shown.samples), promise.alpha, promise.delta)
        check_held_out(content.sketch(), shown, promise.shared_images)
    spec = DecoderSpec.of(model, decoder)
    plan = Plan([], trace.batch_size, settings.seed)
    source = trace_record(spec, processor, samples, plan, trace.answers, max_new_tokens, template, trace.exits)
    source |= {"content": digest, "data": [dict(provenance or {})]}
    config = heads_config(source, settings, spec.num_layers, spec.config.hidden_size)
    asked = {
        "max_new_tokens": max_new_tokens,
        "template": template,
        "visual_mask": visual_mask,
        "decoder": decoder,
        "answers": trace.answers,
        "exits": trace.exits,
    }
    shared = sharing(model)
    tracer = partial(trace_samples, model, processor, **asked)
    tracer = partial(tracer, together=shared == "weights" and group.size > 1)
    validation, training = split(len(usable), settings)
    training = torch.cat([training, validation[VALIDATION:]])
    stream = partial(Stream, samples, trace=tracer, group=group, batch_size=trace.batch_size, sharing=shared)
    stream = partial(stream, round_size=online.round_size, seed=settings.seed)
    names = (*IDENTITY, "exits", "min_layer", "answers", "max_new_tokens", "batch_size", "content")
    record = {
        "traces": {name: source[name] for name in names},
        "settings": settings_record(settings),
        "online": asdict(online),
    }
    with ExitStack() as stack:
        run = run_name(group)
        with group.together():
            Path(work).mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_run(Path(work), run))
        state = TrainingState(Path(work), record, group)
        rounds = OnlineRounds(
            config,
            settings,
            online,
            group,
            stream(indices=[usable[i] for i in training.tolist()], passes=online.passes),
            stream(indices=[usable[i] for i in validation[:VALIDATION].tolist()]),
        )
        heads = rounds.run(state, progress, log)
    heads.config.training |= {name: source[name] for name in ("data", "content", "answers")}
    heads.config.training |= asdict(settings) | {"online": asdict(online)}
    heads.trained_on = content.sketch()
    if held_out is None:
        return heads
    write_traces(
        model,
        processor,
        held_out,
        Path(work) / HELD_OUT,
        batch_size=trace.batch_size,
        unit_size=trace.unit_size,
        seed=trace.seed,
        on_error=trace.on_error,
        max_errors=trace.max_errors,
        provenance=dict(held_out_provenance or {}),
        ranks=ranks,
        **asked,
    )
    with group.together():
        if group.rank == 0:
            calibrate(heads, load_traces(Path(work) / HELD_OUT), promise.alpha, promise.delta, promise.shared_images)
    told = (heads.config.threshold, heads.config.calibration)
    heads.config.threshold, heads.config.calibration = group.gather(told)[0]
    return heads


def _digests(samples: Sequence[Sample], trace: TraceSettings, group: Group) -> tuple[list[int], Content, str]:
    """Which samples can be traced, what they show, and the :class:`DatasetDigest` of them; ranks share the reading."""
    readable, read = Readable(Traceable(samples, trace.answers), trace.on_error, trace.max_errors), []
    with group.together():
        for index, sample in readable.at(group.share(len(samples))):
            images = [image_digest(image) for image in sample.images]
            read.append((index, sample_digest(sample, images), images, list(sample.answers)))
    skipped = [error for some in group.gather(list(readable.skipped.values())) for error in some]
    if len(skipped) > trace.max_errors:
        raise TooManyErrors(skipped, trace.max_errors)
    read, digest = [one for some in group.gather(read) for one in some], DatasetDigest()
    for _, shown, _, answers in read:
        digest.update(shown, answers)
    content = Content.of([one[1] for one in read], [one[2] for one in read])
    return [one[0] for one in read], content, digest.hexdigest()
