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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from dyvte.data import Readable, Sample, SampleError, TooManyErrors, image_digest, sample_digest
from dyvte.methods.families import build, methods_of
from dyvte.provenance import claim, write_json
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.identity import PROVENANCE, check_same, trace_record
from dyvte.training.lock import one_run, run_name
from dyvte.training.plan import MAX_UNIT, PLAN, Plan
from dyvte.training.tracer import ANSWERS, trace_samples
from dyvte.training.units import DamagedUnit, Manifest, read_manifest, verify_unit, write_unit


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
    pruning: Mapping[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    unit_size: int = MAX_UNIT,
    seed: int = 0,
    on_error: str = "stop",
    max_errors: int = 100,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Traces every sample, in units that ranks share and that a restart does not repeat.

    A run that goes on compares every finished unit with its manifest and its samples; what is damaged is named and
    made again. It may have another number of ranks.

    Args:
        answers: "dense" traces the model's own greedy answer, so that full agreement means that greedy decoding with
            that exit gives the identical answer; "dataset" traces the first given answer.
        exits: which exit layers to trace, see :func:`dyvte.trace_batch`.
        pruning: a method that drops tokens, by ``method.argument`` such as ``{fastv.layer: 2, fastv.keep: 0.5}``: what
            is traced is the model with it, and agreement is with the answers of the model without it.
        provenance: what the samples come from, such as the data config, for the record.
        unit_size: samples per unit, the most that a kill costs each rank.
        seed: of the order of the samples.
        on_error: what to do about a sample that cannot be used: "stop" or "skip", see :class:`dyvte.data.Readable`.
        max_errors: how many samples a rank may skip, those of earlier runs included.

    Raises:
        ValueError: wrong settings, no samples, a folder that holds traces of something else or that another run is
            working in, or a disk that does not take what is written.
        SampleError, TooManyErrors: samples that cannot be used.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers must be one of {', '.join(ANSWERS)}, not {answers!r}")
    if len(samples) == 0:
        raise ValueError("there are no samples to trace: check the data config")
    lengths = getattr(samples, "lengths", None)
    plan = Plan.of(len(samples), batch_size, unit_size, seed, lengths)
    readable = Readable(Traceable(samples, answers), on_error, max_errors)
    folder, spec = Path(folder), DecoderSpec.of(model)
    record = trace_record(spec, processor, samples, plan, answers, max_new_tokens, template, exits, pruning)
    method = None if pruning is None else build(methods_of(pruning), pruning)
    if method is not None and answers != "dense":
        raise ValueError("a trace under a pruning is about the model's own answers: use answers=dense")
    record["data"] = provenance or {}
    with ExitStack() as stack:
        with _faults_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_run(folder, run_name(world_size)))
            share = plan.share(rank, world_size)
            _sweep(folder, share, rank)
            claim(folder / PROVENANCE, record, partial(check_same, folder), write=rank == 0)
            if rank == 0:
                write_json(folder / PLAN, plan.as_dict())
        todo = _unfinished(folder, plan, share, readable, progress=rank == 0)
        title = "trace" if world_size == 1 else f"trace (share of rank 0 of {world_size})"
        total = sum(len(plan.units[number]) for number in share)
        bar = stack.enter_context(tqdm(total=total, desc=title, unit="sample", disable=rank != 0))
        bar.update(total - sum(len(plan.units[number]) for number in todo))
        for number in todo:
            read = list(readable.at(plan.units[number]))
            rows: dict[int, dict[str, Any]] = {}
            for batch in plan.batches(read):
                asked = [sample for _, sample in batch]
                found = trace_samples(model, processor, asked, answers, max_new_tokens, template, exits, method)
                rows |= {index: row for (index, _), row in zip(batch, found)}
                bar.update(len(batch))
            bar.update(len(plan.units[number]) - len(read))
            with _faults_of(folder):
                manifest = _manifest(plan.units[number], read, readable)
                write_unit(folder, number, [rows[index] for index in manifest.index], manifest)
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


def _manifest(planned: Sequence[int], read: Sequence[tuple[int, Sample]], readable: Readable) -> Manifest:
    images = [[image_digest(image) for image in sample.images] for _, sample in read]
    return Manifest(
        index=[index for index, _ in read],
        ids=[sample.id for _, sample in read],
        digests=[sample_digest(sample, some) for (_, sample), some in zip(read, images)],
        images=images,
        answers=[list(sample.answers) for _, sample in read],
        skipped=[one for one in readable.record() if one["index"] in set(planned)],
    )


def _unfinished(folder: Path, plan: Plan, share: Sequence[int], readable: Readable, progress: bool) -> list[int]:
    """The units of a rank that are missing or damaged; what finished ones skipped counts as skipped.

    Raises:
        ValueError: a finished unit is about samples that have changed since.
    """
    todo, finished = [], []
    for number in share:
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
    for manifest in tqdm(finished, desc="compare with the data", unit="unit", disable=not (progress and finished)):
        for one in manifest.skipped:
            readable.skipped[one["index"]] = SampleError(one["id"], one["file"], one["reason"])
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
    if len(readable.skipped) > readable.max_errors:
        raise TooManyErrors(list(readable.skipped.values()), readable.max_errors)
    return sorted(todo)


def _sweep(folder: Path, share: Sequence[int], rank: int) -> None:
    """Removes what killed writers left of the files that only this rank writes."""
    mine = {f"{number:06d}{suffix}" for number in share for suffix in (".arrow", ".json")}
    mine |= {PROVENANCE, PLAN} if rank == 0 else set()
    for path in (*folder.glob(".*-*-*"), *folder.glob("units/.*-*-*")):
        if path.name.split("-", 2)[2] in mine:
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
