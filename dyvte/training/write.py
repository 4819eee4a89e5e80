"""Tracing a data set into a folder, so that nothing is lost and nothing is done twice.

::

    provenance.json   what the traces are made from; another model, other data or settings are refused
    plan.json         which samples make up which unit, see :mod:`dyvte.training.plan`
    units/            the units and their manifests, see :mod:`dyvte.training.units`
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from dyvte.data import Readable, Sample, SampleError, TooManyErrors, sample_digest
from dyvte.loading import sharing
from dyvte.methods.families import build, methods_of
from dyvte.provenance import claim, write_json
from dyvte.ranks import Ranks
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.identity import PROVENANCE, check_same, trace_record
from dyvte.training.lock import one_run, run_name
from dyvte.training.plan import MAX_UNIT, PLAN, Plan
from dyvte.training.rounds import Rounds
from dyvte.training.tracer import ANSWERS, trace_samples
from dyvte.training.units import DamagedUnit, read_manifest, verify_unit, write_unit


def write_traces(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    folder: str | os.PathLike,
    *,
    answers: str = "dense",
    batch_size: int = 8,
    max_new_tokens: int = 16,
    template: str | None = None,
    exits: int | Sequence[int] | None = None,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
    pruning: Mapping[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    unit_size: int = MAX_UNIT,
    seed: int = 0,
    on_error: str = "stop",
    max_errors: int = 100,
    ranks: Ranks | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Traces every sample, in units that ranks share and that a restart does not repeat.

    A run that goes on compares every finished unit with its manifest and its samples, which it reads again for that;
    what is damaged is named and made again. It may have another number of ranks. Ranks that share the weights of the
    model take equally many steps.

    Args:
        answers: "dense" traces the model's own greedy answer, so that full agreement means that greedy decoding with
            that exit gives the identical answer; "dataset" traces the first given answer.
        exits: which exit layers to trace, see :func:`dyvte.trace_batch`.
        visual_mask, decoder: as in :func:`dyvte.attach`, for models of other code bases.
        pruning: a method that drops tokens, by ``method.argument`` such as ``{fastv.layer: 2, fastv.keep: 0.5}``: what
            is traced is the model with it, and agreement is with the answers of the model without it.
        provenance: what the samples come from, such as the data config, for the record.
        unit_size: samples per unit, the most that a kill costs each rank.
        seed: of the order of the samples.
        on_error: what to do about a sample that cannot be used: "stop" or "skip", see :class:`dyvte.data.Readable`.
        max_errors: how many samples may be skipped, by all ranks, those of earlier runs included.
        ranks: who shares the work; this process alone if not given.
        report: called on the first rank, now and then, with how many samples are traced and how many there are.

    Raises:
        ValueError: wrong settings, no samples, a folder that holds traces of something else or that another run is
            working in, or a disk that does not take what is written.
        SampleError, TooManyErrors: samples that cannot be used.
        RankError: any of this on another rank.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers must be one of {', '.join(ANSWERS)}, not {answers!r}")
    if len(samples) == 0:
        raise ValueError("there are no samples to trace: check the data config")
    ranks = Ranks() if ranks is None else ranks
    lengths = getattr(samples, "lengths", None)
    plan = Plan.of(len(samples), batch_size, unit_size, seed, lengths)
    readable = Readable(Traceable(samples, answers), on_error, max_errors)
    folder, spec = Path(folder), DecoderSpec.of(model, decoder)
    record = trace_record(spec, processor, samples, plan, answers, max_new_tokens, template, exits, pruning)
    method = None if pruning is None else build(methods_of(pruning), pruning)
    if method is not None and answers != "dense":
        raise ValueError("a trace under a pruning is about the model's own answers: use answers=dense")
    record["data"] = provenance or {}
    shared = sharing(model)
    run = partial(
        trace_samples,
        model,
        processor,
        answers=answers,
        max_new_tokens=max_new_tokens,
        template=template,
        exits=exits,
        visual_mask=visual_mask,
        decoder=decoder,
        together=shared == "weights" and ranks.world_size > 1,
        pruning=method,
    )
    with ExitStack() as stack:
        with _faults_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_run(folder, run_name(ranks.world_size)))
            if ranks.first:
                _sweep(folder)
                claim(folder / PROVENANCE, record, partial(check_same, folder))
                write_json(folder / PLAN, plan.as_dict())
            ranks.wait()
            claim(folder / PROVENANCE, record, partial(check_same, folder), write=False)
        todo = _unfinished(folder, plan, readable, ranks)
        finished = len(samples) - sum(len(plan.units[number]) for number in todo)
        title = f"trace {folder.name}"
        bar = tqdm(total=len(samples), initial=finished, desc=title, unit="sample", disable=not ranks.first)
        stack.enter_context(bar)
        traced = ranks.counter()
        for unit in Rounds(plan, todo, readable, ranks, shared).run(run):
            if unit.number is not None:
                with _faults_of(folder):
                    write_unit(folder, unit.number, unit.rows, unit.manifest)
            done = finished + traced(unit.samples)
            if ranks.first:
                bar.update(done - bar.n)
                if report is not None:
                    report(done, len(samples))
        ranks.wait()
        if ranks.first:
            bar.update(len(samples) - bar.n)
    return folder


class Traceable(Sequence[Sample]):
    """Samples, of which those that no trace can be made of are damaged."""

    def __init__(self, samples: Sequence[Sample], answers: str):
        self.samples, self.answers = samples, answers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        sample = self.samples[index]
        origin = getattr(self.samples, "origin", type(self.samples).__name__)
        if not sample.images:
            raise SampleError(sample.id, origin, "there is no image, so an exit means nothing")
        if self.answers == "dataset" and not (sample.answers and sample.answers[0].strip()):
            raise SampleError(sample.id, origin, "there is no answer to trace: use answers=dense, or map the column")
        return sample


def _unfinished(folder: Path, plan: Plan, readable: Readable, ranks: Ranks) -> list[int]:
    """The units that are missing or damaged, the same on all ranks; what finished ones skipped counts as skipped.

    Every rank looks at its share of the units.

    Raises:
        ValueError: a finished unit is about samples that have changed since.
    """
    todo, finished = [], []
    for number in range(ranks.rank, len(plan.units), ranks.world_size):
        try:
            manifest = read_manifest(folder, number, plan.units[number])
            if manifest is None:
                todo.append(number)
                continue
            verify_unit(folder, number, manifest)
            finished.append(manifest)
        except DamagedUnit as error:
            warnings.warn(f"{error}; unit {number} is made again", stacklevel=3)
            todo.append(number)
    skipped = [one for manifest in finished for one in manifest.skipped]
    quiet = not (ranks.first and finished)
    for manifest in tqdm(finished, desc="compare with the data", unit="unit", disable=quiet):
        now = {index: sample for index, sample in readable.at(manifest.index)}
        changed = [
            name
            for index, name, digest, answers in zip(manifest.index, manifest.ids, manifest.digests, manifest.answers)
            if index not in now or sample_digest(now[index]) != digest or now[index].answers != answers
        ]
        if changed:
            raise ValueError(
                f"{len(changed)} samples of {folder} have another image, text or answer than when they were traced, "
                f"such as {changed[0]!r}: bring the old data back, or choose another folder"
            )
    looked_at = ranks.gather([todo, skipped])
    for one in (one for _, some in looked_at for one in some):
        readable.skipped[one["index"]] = SampleError(one["id"], one["file"], one["reason"])
    if len(readable.skipped) > readable.max_errors:
        raise TooManyErrors(list(readable.skipped.values()), readable.max_errors)
    return sorted(number for some, _ in looked_at for number in some)


def _sweep(folder: Path) -> None:
    """Removes what killed writers left; the folder is ours, and nobody writes yet."""
    for path in (*folder.glob(".*-*-*"), *folder.glob("units/.*-*-*")):
        path.unlink(missing_ok=True)


@contextmanager
def _faults_of(folder: Path) -> Iterator[None]:
    """Turns what the system says about the folder into what to do about it."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / PROVENANCE} is damaged ({error}): choose another folder") from error
    except OSError as error:
        raise ValueError(
            f"{folder} does not take what is written ({error.strerror or error}): make room, or choose another folder; "
            "finished units are whole, and the same command goes on after them"
        ) from error
