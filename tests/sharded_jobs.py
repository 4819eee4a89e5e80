"""What is run on a model whose weights are sharded, and on the same model in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from models import LAYERS, batch_of, prompt

import dyvte
import dyvte.training.trace_pass

# Ranks differ in everything: their prompts, the exit layers of their samples, how much they generate.
PROMPTS = ([(3, 5), (1, 9)], [(6, 4), (2, 5)])
EXITS = ([2, 5], [3, 3])
NEW_TOKENS = (3, 6)


def inputs_of(rank: int) -> dict[str, torch.Tensor]:
    rows = [prompt(before, after, seed=10 * rank + row) for row, (before, after) in enumerate(PROMPTS[rank])]
    return batch_of(*rows, seed=rank)


def random_heads() -> dyvte.ExitHeads:
    """Heads that are sure of themselves, since weights that are summed in another order must not change their mind."""
    torch.manual_seed(11)
    heads = dyvte.ExitHeads(dyvte.ExitHeadsConfig(num_layers=LAYERS, hidden_size=32)).eval()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    return heads


@torch.no_grad()
def forward(model: Any, rank: int, method: dyvte.Reduction) -> dict[str, torch.Tensor]:
    with dyvte.visual_exit(model, method) as handle:
        logits = model(**inputs_of(rank)).logits
    return {"logits": logits, "exits": handle.layers, "counts": handle.counts}


def dense(model: Any, rank: int) -> dict[str, torch.Tensor]:
    return forward(model, rank, dyvte.NeverExit())


def fixed(model: Any, rank: int) -> dict[str, torch.Tensor]:
    return forward(model, rank, dyvte.FixedExit(EXITS[rank]))


def learned(model: Any, rank: int) -> dict[str, torch.Tensor]:
    return forward(model, rank, dyvte.LearnedExit(random_heads(), threshold=0.6))


def fastv(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """The samples of one rank alone are pruned further, so only some passes read attention."""
    return forward(model, rank, dyvte.FastV(2, keep=0.5) & dyvte.FixedExit([e if rank else 1 for e in EXITS[rank]]))


@torch.no_grad()
def generate(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """``generate`` belongs to the model inside an engine."""
    inner = getattr(model, "module", model)
    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS[rank])) as handle:
        ids = inner.generate(
            **inputs_of(rank),
            max_new_tokens=NEW_TOKENS[rank],
            do_sample=False,
            synced_gpus=torch.distributed.is_initialized(),
        )
    return {"ids": ids, "exits": handle.layers}


def trace(model: Any, rank: int) -> dict[str, torch.Tensor]:
    inputs = inputs_of(rank)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return vars(dyvte.trace_batch(model, inputs | {"labels": labels}))


def trace_in_parts(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """The logits of one rank are too many to be made at once."""
    with mock.patch.object(dyvte.training.trace_pass, "LOGITS_AT_ONCE", 0 if rank else 2**20):
        return trace(model, rank)


JOBS: dict[str, Callable[[Any, int], dict[str, torch.Tensor]]] = {
    job.__name__: job for job in (dense, fixed, learned, fastv, trace, trace_in_parts, generate)
}
EXACT = ("exits", "counts", "ids", "agreement")  # equal also where sums are taken in another order
