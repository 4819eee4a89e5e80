"""What traces are about: a model, a processor, samples and the settings that bits depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte import promise
from dyvte.data import Sample
from dyvte.identity import model_fingerprint, processor_fingerprint
from dyvte.provenance import differing, versions
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.plan import Plan
from dyvte.training.trace import traced_exits

PROVENANCE = "provenance.json"
FORMAT = 2

# What makes the bits of a trace, and what to do where it differs.
SETTINGS = {
    "format": "the traces are of another version of dyvte: choose another folder, and trace again",
    "weights": "the model has other weights, another adapter or another type: load the one that was traced",
    "dtype": "load the model in the same dtype",
    "attention": "load the model with the same attention implementation",
    "processor": "the processor has another vocabulary, other image settings or another chat template",
    "answers": "trace the same answers",
    "max_new_tokens": "let answers be as long",
    "exits": "trace the same exits",
    "pruning": "trace on top of the same pruning",
    "batch_size": "padding changes bits: use the same batch_size",
    "samples": "the data set has another number of samples",
    "source": "the data config, or the file it names, has changed",
    "plan": "use the same unit_size, seed and samples",
}
IDENTITY = promise.IDENTITY  # what of it goes into heads
MIXABLE = ("format", "weights", "dtype", "attention", "processor", "answers", "exits")


def trace_record(
    spec: DecoderSpec,
    processor: Any,
    samples: Sequence[Sample],
    plan: Plan,
    answers: str,
    max_new_tokens: int,
    template: str | None,
    exits: int | Sequence[int] | None,
    pruning: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is noted beside traces, as JSON can hold it."""
    base = spec.model
    return {
        "format": FORMAT,
        "base_model": getattr(base.config, "_name_or_path", None) or None,
        "base_revision": getattr(base.config, "_commit_hash", None),
        "weights": model_fingerprint(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": spec.config._attn_implementation,
        "processor": processor_fingerprint(processor, template),
        "num_layers": spec.num_layers,
        "hidden_size": spec.config.hidden_size,
        "min_layer": spec.min_layer,
        "exits": None if exits is None else traced_exits(exits, spec),
        "pruning": None if pruning is None else dict(pruning),
        "answers": answers,
        "max_new_tokens": max_new_tokens,
        "batch_size": plan.batch_size,
        "samples": len(samples),
        "source": getattr(samples, "fingerprint", None),
        "plan": plan.fingerprint,
        "versions": versions(),
    }


def check_same(folder: Path, noted: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The noted record, if a run may go on under it: names, places and versions may have changed.

    Raises:
        ValueError: the traces in the folder are of something else.
    """
    other = differing(noted, {name: record[name] for name in SETTINGS})
    if other:
        faults = "; ".join(f"{name} was {old!r}, is {record[name]!r}: {SETTINGS[name]}" for name, old in other.items())
        raise ValueError(f"{folder} holds traces made otherwise ({faults}). Or choose another folder")
    return dict(noted)


def check_mixable(folder: Path, first: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if the traces of two folders are not of one model, seen the same way."""
    other = differing(first, {name: record[name] for name in MIXABLE})
    if other:
        faults = "; ".join(f"{name} {record[name]!r}, elsewhere {old!r}" for name, old in other.items())
        raise ValueError(f"{folder} does not go together with the other traces: {faults}")
