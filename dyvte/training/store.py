"""Traces on disk: a resumable Arrow data set in half precision, with its provenance, readable without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import GREEDY, Sample, encode
from dyvte.provenance import atomic_path, claim, differing, versions
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.runtime.locate import underlying_model
from dyvte.training.trace import trace_batch

ANSWERS = ("dense", "dataset")
PROVENANCE = "provenance.json"
TENSORS = ("state", "visual", "agreement", "nll", "kl", "dense_nll")


@dataclass
class TraceSet:
    """All traces of a data set, in memory.

    Attributes:
        state: float16 [n, L, 2d].
        visual: float16 [n, d].
        agreement, nll, kl: float32 [n, L]; column e - 1 stands for exit layer e, see ``trace.Trace``.
        dense_nll: float32 [n].
        rows: per sample its id, kind, question, answer, dense answer and token counts.
        provenance: model, revision, data, dtype and versions.
    """

    state: torch.Tensor
    visual: torch.Tensor
    agreement: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    dense_nll: torch.Tensor
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.state)

    @property
    def num_layers(self) -> int:
        return self.agreement.shape[1]

    @property
    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.rows]

    def select(self, index: torch.Tensor | Sequence[int]) -> TraceSet:
        """Some of the samples, by index."""
        index = torch.as_tensor(index)
        tensors = {name: getattr(self, name)[index] for name in TENSORS}
        return TraceSet(**tensors, rows=[self.rows[i] for i in index.tolist()], provenance=self.provenance)


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
    provenance: dict[str, Any] | None = None,
    shard_size: int = 256,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Traces every sample and writes shards that a restart does not repeat; several ranks share the shards.

    Args:
        answers: "dense" traces the model's own greedy answer, so that full agreement means that greedy decoding with
            that exit gives the identical answer; "dataset" traces the first given answer.
        provenance: what determines the samples (such as the data config); a folder with another one is refused.
        shard_size: samples per shard, the unit of work that a restart repeats.

    Raises:
        ValueError: unknown kind of answers, no samples, or a folder that holds traces of something else.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers must be one of {', '.join(ANSWERS)}, not {answers!r}")
    if len(samples) == 0:
        raise ValueError("there are no samples to trace: check the data config")
    if answers == "dataset" and not samples[0].answers:
        raise ValueError("the samples have no answers to trace: use answers=dense, or map the column of answers")
    folder, spec = Path(folder), DecoderSpec.of(model)
    base = spec.model
    record = {
        "base_model": getattr(base.config, "_name_or_path", None) or None,
        "base_revision": getattr(base.config, "_commit_hash", None),
        "num_layers": spec.num_layers,
        "hidden_size": spec.config.hidden_size,
        "min_layer": spec.min_layer,
        "dtype": str(base.dtype).removeprefix("torch."),
        "answers": answers,
        "max_new_tokens": max_new_tokens,
        "samples": len(samples),
        "shard_size": shard_size,
        "data": provenance or {},
        "versions": versions(),
    }
    _claim(folder, record, rank)
    starts = list(range(0, len(samples), shard_size))[rank::world_size]
    share = sum(min(shard_size, len(samples) - start) for start in starts)
    title = "trace" if world_size == 1 else f"trace (share of rank 0 of {world_size})"
    with tqdm(total=share, desc=title, unit="sample", disable=rank != 0) as bar:
        for start in starts:
            size = min(shard_size, len(samples) - start)
            shard = folder / f"shard-{start:08d}.arrow"
            if not shard.exists():
                rows: list[dict[str, Any]] = []
                for first in range(start, start + size, batch_size):
                    batch = [samples[i] for i in range(first, min(first + batch_size, start + size))]
                    rows += _trace_samples(model, processor, batch, answers, max_new_tokens, template)
                    bar.update(len(batch))
                _save(rows, shard)
            else:
                bar.update(size)
    return folder


def _claim(folder: Path, record: dict[str, Any], rank: int) -> None:
    """Notes what the traces are made from, or checks it; only the versions may change when a run goes on."""

    def same(noted: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        other = differing(noted, {key: value for key, value in record.items() if key != "versions"})
        if other:
            raise ValueError(
                f"{folder} holds traces made otherwise ({', '.join(f'{key}: {old!r}' for key, old in other.items())}): "
                "choose another folder or remove this one"
            )
        return noted

    claim(folder / PROVENANCE, record, same, write=rank == 0)


def _trace_samples(
    model: nn.Module,
    processor: Any,
    samples: list[Sample],
    answers: str,
    max_new_tokens: int,
    template: str | None,
) -> list[dict[str, Any]]:
    inputs = encode(processor, samples, template).to(model.device, model.dtype)
    tokenizer = processor.tokenizer
    length = inputs["input_ids"].shape[1]
    if answers == "dense":
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)[:, length:]
    else:
        rows = [tokenizer(sample.answers[0], add_special_tokens=False).input_ids for sample in samples]
        rows = [row + [tokenizer.eos_token_id] for row in rows]
        pad = max(map(len, rows))
        ids = torch.tensor([row + [-100] * (pad - len(row)) for row in rows], device=model.device)
    answer = _answer_mask(ids, model.generation_config.eos_token_id)
    traced = append_answer(inputs, ids, answer)
    trace = trace_batch(model, traced)
    full, text = prompt_lengths(model, inputs)
    out = []
    for i, sample in enumerate(samples):
        out.append(
            {
                "id": sample.id,
                "kind": sample.kind,
                "question": sample.question,
                "answers": sample.answers,
                "traced_answer": tokenizer.decode(ids[i][answer[i]], skip_special_tokens=True).strip(),
                "text_tokens": int(text[i]),
                "visual_tokens": int(full[i] - text[i]),
                "state": _half(trace.state[i]).flatten().cpu().numpy(),
                "visual": _half(trace.visual[i]).cpu().numpy(),
                "agreement": trace.agreement[i].cpu().numpy(),
                "nll": trace.nll[i].half().cpu().numpy(),
                "kl": trace.kl[i].half().cpu().numpy(),
                "dense_nll": float(trace.dense_nll[i]),
            }
        )
    return out


def _half(states: torch.Tensor) -> torch.Tensor:
    """In half precision; what is too large for it is cut off there, which keeps directions where infinity would not."""
    limit = torch.finfo(torch.float16).max
    return states.clamp(-limit, limit).half()


def _answer_mask(ids: torch.Tensor, eos: int | list[int] | None) -> torch.Tensor:
    """True up to and including the first end-of-sequence token of each answer."""
    if eos is None:
        return ids >= 0
    ends = torch.isin(ids, torch.tensor(eos if isinstance(eos, list) else [eos], device=ids.device))
    before_end = ends.int().cumsum(1) - ends.int() == 0
    return before_end & (ids >= 0)


def append_answer(inputs: dict[str, Any], ids: torch.Tensor, answer: torch.Tensor) -> dict[str, Any]:
    """Prompt inputs (left-padded) with answers appended, and the labels that mark them.

    Args:
        inputs: what the model takes for the prompts.
        ids: [batch, answer length].
        answer: bool [batch, answer length], what belongs to the answer.
    """
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    mask = torch.cat([mask, answer.to(mask.dtype)], 1)
    traced = dict(inputs) | {
        "input_ids": torch.cat([prompt, ids.where(answer, 0)], 1),
        "attention_mask": mask,
        "labels": torch.cat([torch.full_like(prompt, -100), ids.where(answer, -100)], 1),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:  # answers are text
            traced[name] = torch.cat([inputs[name], torch.zeros_like(ids)], 1)
    return traced


def prompt_lengths(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each prompt, and how many of them are text: two long [batch]."""
    full = inputs["attention_mask"].sum(1)
    return full, full - visual_tokens(underlying_model(model), inputs["input_ids"]).sum(1)


def _save(rows: list[dict[str, Any]], shard: Path) -> None:
    """Writes a shard whole or not at all."""
    value, layers, width = datasets.Value, len(rows[0]["agreement"]), len(rows[0]["state"])
    features = datasets.Features(
        {name: value("string") for name in ("id", "kind", "question", "traced_answer")}
        | {"answers": datasets.List(value("string")), "text_tokens": value("int32"), "visual_tokens": value("int32")}
        | {"state": datasets.List(value("float16"), length=width), "dense_nll": value("float32")}
        | {"visual": datasets.List(value("float16"), length=len(rows[0]["visual"]))}
        | {"agreement": datasets.List(value("float32"), length=layers)}
        | {name: datasets.List(value("float16"), length=layers) for name in ("nll", "kl")}
    )
    columns = {name: [row[name] for row in rows] for name in features}
    with atomic_path(shard) as fresh, ArrowWriter(path=str(fresh), features=features) as writer:
        writer.write_batch(columns)
        writer.finalize()


def _tensor(table: datasets.Dataset, name: str) -> torch.Tensor:
    """A numeric column in its own type: the formatters of ``datasets`` would widen half precision."""
    chunks = table.data.column(name).chunks
    flat = [chunk.flatten() if hasattr(chunk, "flatten") else chunk for chunk in chunks]
    parts = [chunk.to_numpy(zero_copy_only=False) for chunk in flat]
    values = torch.from_numpy(np.concatenate(parts))
    return values if len(values) == len(table) else values.view(len(table), -1)


def load_traces(*folders: str | os.PathLike) -> TraceSet:
    """Traces from one or more folders, all of the same model.

    Raises:
        ValueError: a folder without traces, an unfinished one, or traces of different models.
    """
    tables, provenance = [], None
    for folder in map(Path, folders):
        if not (folder / PROVENANCE).exists():
            raise ValueError(f"{folder} holds no traces: make some with `dyvte trace`")
        record = json.loads((folder / PROVENANCE).read_text())
        shards = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("shard-*.arrow"))]
        found = sum(map(len, shards))
        if found != record["samples"]:
            raise ValueError(
                f"{folder} holds {found} of {record['samples']} traces: run `dyvte trace` again, "
                "it goes on where it stopped"
            )
        if provenance is not None:
            for key in ("base_model", "num_layers", "hidden_size", "answers"):
                if provenance[key] != record[key]:
                    raise ValueError(f"{folder} differs in {key}: {record[key]!r} and {provenance[key]!r} do not mix")
            provenance["data"] = [*provenance["data"], record["data"]]
        else:
            provenance = record | {"data": [record["data"]]}
        tables += shards
    if not tables:
        raise ValueError("no trace folder was named")
    table = datasets.concatenate_datasets(tables)
    arrays = {name: _tensor(table, name) for name in TENSORS}
    n, layers = arrays["agreement"].shape
    # Exits that the model does not allow count as changed answers.
    arrays["agreement"][:, : provenance.get("min_layer", 1) - 1] = 0
    rows = table.remove_columns(list(arrays)).to_list()
    return TraceSet(
        state=arrays["state"].view(n, layers, -1),
        visual=arrays["visual"],
        agreement=arrays["agreement"].float(),
        nll=arrays["nll"].float(),
        kl=arrays["kl"].float(),
        dense_nll=arrays["dense_nll"].float(),
        rows=rows,
        provenance=provenance,
    )
