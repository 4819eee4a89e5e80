"""From samples to rows of traces: the answer that is traced, and what is kept of a trace."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dyvte.data import GREEDY, Sample, encode
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import visual_tokens
from dyvte.runtime.locate import underlying_model, without_engine
from dyvte.runtime.reduction import Reduction
from dyvte.training.trace import trace_batch
from dyvte.training.trace_pass import TraceError

ANSWERS = ("dense", "dataset")


def trace_samples(
    model: nn.Module,
    processor: Any,
    samples: list[Sample],
    answers: str = "dense",
    max_new_tokens: int = 16,
    template: str | None = None,
    exits: int | Sequence[int] | None = None,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
    together: bool = False,
    pruning: Reduction | None = None,
) -> list[dict[str, Any]]:
    """The rows of one batch, see :mod:`dyvte.training.units` for their columns.

    Args:
        visual_mask, decoder: as in :func:`dyvte.attach`.
        together: other ranks share the model's weights, and generate at the same time.

    Raises:
        ValueError: samples that cannot be traced, by their ids.
    """
    model = without_engine(model)
    device = next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))
    inputs = encode(processor, samples, template).to(device, model.dtype)
    tokenizer = processor.tokenizer
    if answers == "dense":
        ids = greedy_answers(model, inputs, max_new_tokens, together)
    else:
        rows = [tokenizer(sample.answers[0], add_special_tokens=False).input_ids for sample in samples]
        rows = [row + [tokenizer.eos_token_id] for row in rows]
        pad = max(map(len, rows))
        ids = torch.tensor([row + [-100] * (pad - len(row)) for row in rows], device=device)
    answer = answer_mask(ids, model.generation_config.eos_token_id)
    traced = append_answer(inputs, ids, answer)
    try:
        own = None if pruning is None else pruning.keyed([sample.id for sample in samples])
        trace = trace_batch(model, traced, visual_mask, decoder, exits, own)
    except TraceError as error:
        names = ", ".join(repr(samples[row].id) for row in error.rows)
        raise ValueError(f"sample {names}: {error.reason}") from error
    return [
        {
            "id": sample.id,
            "kind": sample.kind,
            "question": sample.question,
            "answers": sample.answers,
            "traced_answer": tokenizer.decode(ids[i][answer[i]], skip_special_tokens=True).strip(),
            "text_tokens": int(trace.text_tokens[i]),
            "visual_tokens": int(trace.visual_tokens[i]),
            "state": _half(trace.state[i]).flatten().cpu().numpy(),
            "visual": _half(trace.visual[i]).cpu().numpy(),
            "agreement": trace.agreement[i].cpu().numpy(),
            "nll": trace.nll[i].half().cpu().numpy(),
            "kl": trace.kl[i].half().cpu().numpy(),
            "dense_nll": float(trace.dense_nll[i]),
        }
        | ({} if pruning is None else {"visual_counts": trace.visual_counts[i].tolist()})
        for i, sample in enumerate(samples)
    ]


@torch.no_grad()
def greedy_answers(model: nn.Module, inputs: dict[str, Any], max_new_tokens: int, together: bool) -> torch.Tensor:
    """The tokens after each prompt, [batch, answer length]."""
    prompt, given = inputs["input_ids"], dict(inputs)
    takes = inspect.signature(underlying_model(model).generate).parameters
    if "inputs" in takes and "generation_config" not in takes:  # LLaVA's code base knows no other name
        given["inputs"] = given.pop("input_ids")
    settings = GREEDY | {"max_new_tokens": max_new_tokens} | ({"synced_gpus": True} if together else {})
    ids = model.generate(**given, **settings)
    length = prompt.shape[1]
    # Models that make embeddings of the prompt themselves return the answer alone.
    with_prompt = ids.shape[1] >= length and torch.equal(ids[:, :length], prompt)
    return ids[:, length:] if with_prompt else ids


def _half(states: torch.Tensor) -> torch.Tensor:
    """In half precision; what is too large for it is cut off there, which keeps directions where infinity would not."""
    limit = torch.finfo(torch.float16).max
    return states.clamp(-limit, limit).half()


def answer_mask(ids: torch.Tensor, eos: int | list[int] | None) -> torch.Tensor:
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
