"""Where the attention of the text after an image goes, in every decoder layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyvte.runtime.attention import AttentionRows, call_arguments, find_attention
from dyvte.runtime.tokens import Prompt, find_decoder, underlying_model, visual_tokens

SEEN = ("visual", "prompt", "text")
READERS = ("text", "last")


@dataclass
class Shares:
    """Where attention goes in every decoder layer, averaged over heads.

    Attributes:
        share: float32 [batch, L, 2, 3]; the readers are the text tokens after the image (mean) and the last one of
            them alone, and they see visual tokens, the prompt's text before them, and text after them. Sums to 1.
        tokens: long [batch, 3], how many tokens there are of each.
    """

    share: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def attention_shares(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_mask: torch.Tensor | None = None,
    decoder: str | nn.Module | None = None,
) -> Shares:
    """How much attention the text after the image pays to whom, in one forward pass over a batch of prompts.

    "After the image" is after the last visual token; text between two images counts as before. The model keeps its
    attention implementation; the rows of the text tokens are computed a second time, head group by head group, and
    reduced at once.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes, padded on either side.
        visual_mask: bool [batch, sequence], where ``input_ids`` cannot show the visual tokens.
        decoder: the module that owns the decoder layers, or the dotted path to it.

    Raises:
        ValueError: a sample without visual tokens or without text after them, or attention that cannot be read.
    """
    model = underlying_model(model)
    layers = find_decoder(model, decoder).layers
    attentions = [find_attention(layer) for layer in layers]
    if visual_mask is None:
        if inputs.get("input_ids") is None:
            raise ValueError("without input_ids nothing shows the visual tokens: pass visual_mask [batch, sequence]")
        visual_mask = visual_tokens(model, inputs["input_ids"])
    valid = inputs.get("attention_mask")
    prompt = Prompt.of(visual_mask, torch.ones_like(visual_mask) if valid is None else valid.bool())
    if not bool(prompt.can_leave.all()):
        rows = (~prompt.can_leave).nonzero().flatten().tolist()
        raise ValueError(f"samples {rows} have no visual tokens, or no text after them: leave them out")
    column = torch.arange(visual_mask.shape[1], device=visual_mask.device)
    last_visual = torch.where(prompt.visual, column, -1).amax(1, keepdim=True)
    groups = [prompt.visual, prompt.text & (column < last_visual), prompt.text & (column > last_visual)]
    seen = torch.stack(groups, -1)  # [batch, sequence, 3]
    share = torch.zeros(len(seen), len(layers), len(READERS), len(SEEN))
    rows: dict[int, AttentionRows] = {}

    def before(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows[index] = read = AttentionRows(module, call_arguments(module, args, kwargs), prompt.tail)
        target = seen.to(read.key.device, torch.float32)
        paid = sum((weights.sum(1) @ target for weights in read), torch.zeros(())) / read.query.shape[1]
        weight = prompt.tail.valid.to(paid)[..., None]
        mean = (paid * weight).sum(1) / weight.sum(1)
        share[:, index] = torch.stack([mean, paid[:, -1]], 1).cpu()

    def after(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        rows.pop(index).check(output, prompt.tail)

    hooks = []
    try:
        for index, attention in enumerate(attentions):
            hooks.append(attention.register_forward_pre_hook(functools.partial(before, index), with_kwargs=True))
            hooks.append(attention.register_forward_hook(functools.partial(after, index), with_kwargs=True))
        model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Shares(share, seen.sum(1).cpu())
