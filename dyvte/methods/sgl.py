"""SGL (arXiv 2412.03324): a small MLLM's attention prunes a large one's visual tokens, or spares it altogether.

Confirmed by the public code (NUS-HPC-AI-Lab/SGL). The small model answers first; what its layers, heads and rows gave
each visual token ranks the tokens of the large model, which keeps the first ``int(n * ratio)`` at layer
``int(L * prune_layer)``. The code never lets the small answer stand; that its :func:`decision` is compared with a
threshold is the paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dyvte.methods.selection import rows_after
from dyvte.runtime.attention import AttentionCall, find_attention, watch
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.runtime.reduction import LayerView, Reduction, TopK


def aggregate(
    prompt: Sequence[torch.Tensor],
    steps: Sequence[Sequence[torch.Tensor]],
    visual: torch.Tensor,
    valid: torch.Tensor | None = None,
    generated: torch.Tensor | None = None,
    inclusive: bool = True,
) -> torch.Tensor:
    """The importance of each visual token: attention summed over layers, heads and rows of the small model.

    Rows are those of the prompt from the last visual token on, and that of every decoding step. The paper speaks of
    the prompt tokens after the image; the code begins one row earlier, with the last visual token, and so does the
    default here. The last generated token is never fed, so it has no row.

    Args:
        prompt: attention of each layer over the prompt, [n, heads, s, s], weights after softmax.
        steps: for each decoding step the attention of each layer, [n, heads, 1, s + generated tokens]; columns after
            the prompt are not read.
        visual: bool [n, s]. The reference also scores the separators between tiles, from the first visual token to the
            last; mark them here to have them scored.
        valid: bool [n, s], no padding; None: there is none.
        generated: bool [n, steps], which steps belong to a sample's answer; None: all. A sample that has ended while
            others go on must not count what it pads with.
        inclusive: whether the row of the last visual token counts.

    Returns:
        float32 [n, s], 0 at columns that are not visual.
    """
    rows = rows_after(visual, inclusive)
    rows = (rows if valid is None else rows & valid).float()
    total = sum(torch.einsum("nqs,nq->ns", layer.sum(1, dtype=torch.float32), rows) for layer in prompt)
    for index, step in enumerate(steps):
        given = sum(layer[..., : visual.shape[1]].sum((1, 2), dtype=torch.float32) for layer in step)
        total = total + (given if generated is None else given * generated[:, index, None])
    return total.where(visual, 0)


def confidence(probabilities: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The geometric mean of the small model's probabilities of its own greedy answer.

    Args:
        probabilities: [..., tokens], the largest probability at each step.
        mask: bool [..., tokens], the tokens of the answer; None: all.

    Returns:
        float32 [...], 0 ... 1; 1 for an empty answer.
    """
    log, length = _log(probabilities, mask)
    return (log.sum(-1) / length.clamp(min=1)).exp()


def consistency(probabilities: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The probability of the same answer once the small model has been pruned by its own importance.

    The reference prunes at layer 0 to 5 % of the visual tokens and takes the product, not the geometric mean.

    Args:
        probabilities: [..., tokens], of each token of the answer, under teacher forcing.
        mask: bool [..., tokens], the tokens of the answer; None: all.

    Returns:
        float32 [...], 0 ... 1; 1 for an empty answer.
    """
    return _log(probabilities, mask)[0].sum(-1).exp()


def decision(confidence: torch.Tensor, consistency: torch.Tensor) -> torch.Tensor:
    """The mean of both; above a threshold the large model is not asked. Our reading: no code computes it."""
    return (confidence + consistency) / 2


def _log(probabilities: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(probabilities, dtype=torch.bool) if mask is None else mask
    return probabilities.float().log().where(mask, 0), mask.sum(-1)


@torch.no_grad()
def importance(
    model: nn.Module,
    inputs: Mapping[str, Any],
    visual_mask: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    inclusive: bool = True,
) -> torch.Tensor:
    """Lets the small model answer, greedily, and adds up what its attention gave each visual token.

    The same sum as :func:`aggregate`, read layer by layer while the model runs, with any attention implementation. A
    step counts for a sample as long as its answer has not ended.

    Args:
        model: the small MLLM; its attention must be readable, see :mod:`dyvte.runtime.attention`.
        inputs: of its ``generate``.
        visual_mask: bool [batch, sequence], where ``input_ids`` cannot show the visual tokens.
        max_new_tokens: the longest answer.
        inclusive: see :func:`aggregate`.

    Returns:
        float32 [batch, sequence], 0 at columns that are not visual; see :func:`transfer` for another tokenizer.
    """
    spec = DecoderSpec.of(model)
    visual = visual_tokens(spec.model, inputs["input_ids"]) if visual_mask is None else visual_mask
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(visual) if mask is None else mask.bool().to(visual.device)
    rows, width = rows_after(visual & valid, inclusive) & valid, visual.shape[1]
    given: list[torch.Tensor] = []  # by pass: the prompt, then every step

    def add(index: int, call: AttentionCall) -> None:
        first, new = index == 0, call.query.shape[1]
        prompt = not given or (len(given) == 1 and not first)
        asked = rows if prompt else torch.ones(len(rows), new, dtype=torch.bool, device=rows.device)
        paid = call.paid_to_all(asked.to(call.query.device)) * spec.config.num_attention_heads
        end = width + (len(given) if first else len(given) - 1)
        start = end - paid.shape[1]  # sliding layers hold the last columns only
        columns = torch.zeros_like(visual, dtype=torch.float32)
        columns[:, max(start, 0) :] = paid[:, max(-start, 0) : width - start].to(columns.device)
        if first:
            given.append(columns)
        else:
            given[-1] += columns

    watched = [
        watch(find_attention(layer), lambda: valid, functools.partial(add, index))
        for index, layer in enumerate(spec.layers)
    ]
    try:
        answer = spec.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    finally:
        for undo in watched:
            undo()
    ends = _end_ids(spec.model)
    answer = answer[:, -len(given) :] if "input_ids" in inputs else answer
    going = (~torch.isin(answer, ends.to(answer.device))).cumprod(1).bool()[:, : len(given) - 1]
    total = given[0]
    for step, columns in enumerate(given[1:]):
        total = total + columns * going[:, step, None].to(columns.device)
    return total.where(visual, 0)


def transfer(scores: torch.Tensor, visual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scores for the prompts of another model, visual token by visual token.

    Args:
        scores: float [n, s].
        visual: bool [n, s], the visual tokens they are of.
        target: bool [n, t], the visual tokens of the same samples in the other model.

    Raises:
        ValueError: a sample has other numbers of visual tokens in the two models.
    """
    if visual.sum(1).tolist() != target.sum(1).tolist():
        raise ValueError(
            f"{visual.sum(1).tolist()} visual tokens in one model and {target.sum(1).tolist()} in the other: SGL needs "
            "two models that cut images into the same tokens"
        )
    moved = scores.new_zeros(target.shape).to(target.device)
    moved[target] = scores[visual].to(target.device)
    return moved


class SGL(TopK):
    """Keeps the visual tokens that a small model found important.

    Args:
        layer: how many decoder layers see all visual tokens, 0 ... L; the reference's is ``int(L * prune_layer)``, and
            its scripts set prune_layer and ratio to .4, or to .3.
        keep: the share of visual tokens that goes on, 0 ... 1; see :meth:`TopK.count` (the reference rounds down).
        scores: float [batch, sequence] of the prompts to come, see :func:`importance`; read at visual tokens.
    """

    def __init__(self, layer: int, keep: float, scores: torch.Tensor):
        super().__init__({layer: keep})
        if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or not scores.is_floating_point():
            raise ValueError("scores must be float [batch, sequence], such as sgl.importance(small_model, inputs)")
        if not bool(scores.isfinite().all()):
            raise ValueError("scores must be finite: look at what the small model got")
        self.scores = scores

    def check_rows(self, rows: int) -> None:
        if rows % len(self.scores):
            raise ValueError(f"SGL holds scores of {len(self.scores)} samples but the batch has {rows} rows: give both")

    def start(self, view: LayerView) -> Reduction:
        length, prompt = self.scores.shape[1], view.prompt
        longer = prompt.answer is not None and prompt.shape[1] > length  # generate without a cache
        if prompt.shape[1] != length and not longer:
            raise ValueError(
                f"SGL holds scores of prompts of {length} tokens, but these have {prompt.shape[1]}: score the same "
                "prompts, or use sgl.transfer"
            )
        return self

    def score(self, view: LayerView) -> torch.Tensor:
        grid = nn.functional.pad(self.scores, (0, view.prompt.shape[1] - self.scores.shape[1]))
        copies = view.prompt.shape[0] // len(grid)
        return view.tokens.gather(grid.to(view.visual.device), view.samples // copies)


def _end_ids(model: nn.Module) -> torch.Tensor:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=torch.long)
