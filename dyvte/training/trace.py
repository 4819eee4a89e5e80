"""One frozen pass per batch that teaches everything about its samples: text states, and what every exit would do.

After e layers, the text rows continue through the remaining layers alone, as a branch: that is what exiting at e does.
All branches under way run each layer together, in one batch of text-only rows, so L labels cost a few dense forwards
instead of L. The branches join the model's own last rows just before its final norm and head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.runtime.layout import compact_arguments, compact_mask, layer_call
from dyvte.runtime.tokens import Columns, Prompt, find_decoder, underlying_model, visual_tokens


@dataclass
class Trace:
    """What one pass teaches. Column e - 1 stands for exit layer e = 1 ... L; e = L is the dense model itself.

    Attributes:
        state: float32 [batch, L, 2d], the text state after every layer (``Prompt.text_state``).
        visual: float32 [batch, d], the mean of the visual tokens before the first layer.
        agreement: float32 [batch, L], the share of answer tokens whose most likely token is the dense model's.
        nll: float32 [batch, L], negative log-likelihood of the answer, nats per token.
        kl: float32 [batch, L], KL(exit || dense) of the next token at the last prompt position, nats (the criterion of
            VTW, arXiv 2405.05803).
        dense_nll: float32 [batch].
    """

    state: torch.Tensor
    visual: torch.Tensor
    agreement: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    dense_nll: torch.Tensor

    def to(self, device: str | torch.device) -> Trace:
        return Trace(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@torch.no_grad()
def trace_batch(
    model: nn.Module, inputs: dict[str, torch.Tensor], visual_mask: torch.Tensor | None = None, **more: Any
) -> Trace:
    """Traces a batch: one forward pass of the frozen model, with all exits as branches beside it.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes, padded on either side. For a given answer: the answer's tokens in the sequence and
            ``labels`` [batch, sequence], -100 everywhere else. Answer tokens never enter a text state. Without
            ``labels`` agreement and NLL are those of the dense model's next token.
        visual_mask: bool [batch, sequence], where ``input_ids`` cannot show the visual tokens.

    Raises:
        ValueError: a sample without visual tokens, without text after them, or labels before the last visual token.
    """
    model = underlying_model(model)
    decoder = find_decoder(model)
    inputs = dict(inputs) | more
    labels = inputs.pop("labels", None)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("inputs hold neither input_ids nor inputs_embeds: pass what the model's forward takes")
    if visual_mask is None:
        if inputs.get("input_ids") is None:
            raise ValueError(
                "inputs_embeds do not show where the visual tokens are: pass visual_mask, bool [batch, sequence]"
            )
        visual_mask = visual_tokens(model, inputs["input_ids"])
    if visual_mask.dtype != torch.bool:
        raise ValueError(f"visual_mask must be bool [batch, sequence], not {visual_mask.dtype}")
    valid = inputs.get("attention_mask")
    valid = torch.ones_like(visual_mask) if valid is None else valid.bool()
    if valid.shape != visual_mask.shape:
        raise ValueError(
            f"attention_mask {list(valid.shape)} and visual_mask {list(visual_mask.shape)} differ: both must be "
            "[batch, sequence] as the decoder sees it"
        )
    if labels is not None and labels.shape != visual_mask.shape:
        raise ValueError(f"labels must be [batch, sequence] like the tokens {list(visual_mask.shape)}, -100 off-answer")
    branches = _Branches(decoder, visual_mask, valid, labels)
    with branches:
        output = model(**inputs, use_cache=False)
    return branches.finish(output.logits)


class _Branches:
    """The hooks of a trace: branches are born before each layer, run with it, and are read out after the last."""

    def __init__(self, decoder: nn.Module, visual: torch.Tensor, valid: torch.Tensor, labels: torch.Tensor | None):
        self.layers, self.config = decoder.layers, decoder.config
        self.batch, self.length = visual.shape
        answer = None if labels is None else (labels != -100) & valid
        self.prompt = Prompt.of(visual, valid, answer)
        if not bool(self.prompt.can_leave.all()):
            rows = (~self.prompt.can_leave).nonzero().flatten().tolist()
            raise ValueError(
                f"samples {rows} have no visual tokens, or no prompt text after them: an exit means nothing there, "
                "leave them out of the trace"
            )
        self.columns = Columns.of(self.prompt.text)
        last = self._last_prompt_column()
        if answer is None:
            # The dense model's next token, at the last prompt token.
            predicts = torch.arange(self.length, device=visual.device) == last[:, None]
            self.targets = None
        else:
            if not bool(answer.any(1).all()):
                rows = (~answer.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"samples {rows} have no answer tokens: labels are -100 everywhere")
            predicts = F.pad(answer[:, 1:], (0, 1))  # the token before predicts
            if bool((predicts & (torch.arange(self.length, device=visual.device) < last[:, None])).any()):
                raise ValueError("labels stand before the end of the prompt: only the last answer can be traced")
        self.reads = Columns.of(predicts)
        if answer is not None:
            self.targets = labels.gather(1, (self.reads.index + 1).clamp(max=self.length - 1))
        # The same places in the compact rows of the branches.
        rank = self.prompt.text.long().cumsum(1) - 1 + (self.columns.index.shape[1] - self.prompt.text.sum(1))[:, None]
        self.compact_reads = Columns(rank.gather(1, self.reads.index).clamp(min=0), self.reads.valid, self.reads.ragged)
        # The first read is at the last prompt token.
        self.first_read = (~self.reads.valid).sum(1)
        self.rows: torch.Tensor | None = None  # [branches * batch, width, d]
        self.states: list[torch.Tensor] = []
        self.arguments: dict[str, Any] = {}
        self.masks: dict[int, tuple[Any, Any]] = {}
        self.inside = False
        self.hooks: list[Any] = []

    def _last_prompt_column(self) -> torch.Tensor:
        return self.prompt.tail.index[:, -1]

    def __enter__(self) -> _Branches:
        for index, layer in enumerate(self.layers):
            self.hooks.append(
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, index=index: self._before(index, module, args, kwargs),
                    with_kwargs=True,
                )
            )
        self.hooks.append(self.layers[-1].register_forward_hook(self._after_last))
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.inside:
            return
        hidden, kwargs = layer_call(layer, args, kwargs)
        if index == 0:
            self.visual = self.prompt.visual_state(hidden)
            return
        self.states.append(self.prompt.text_state(hidden))
        born = self.columns.take(hidden)
        self.rows = born if self.rows is None else torch.cat([self.rows.to(born.device), born])
        arguments = compact_arguments(kwargs, self.columns, self.length)
        mask = kwargs.get("attention_mask")
        if id(mask) not in self.masks:  # kept with what was made of it, so that its id stays its own
            self.masks[id(mask)] = mask, compact_mask(mask, self.columns, self.config, born)
        arguments["attention_mask"] = self.masks[id(mask)][1]
        arguments = {key: self._for_all_branches(value) for key, value in arguments.items()}
        self.inside = True
        try:
            output = layer(self.rows, **arguments)
        finally:
            self.inside = False
        self.rows = output[0] if isinstance(output, tuple) else output

    def _for_all_branches(self, value: Any) -> Any:
        """Repeats a compact argument of one branch for all of them; rows are branch-major."""
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and len(value) == self.batch:
            return value.repeat(len(self.rows) // self.batch, *[1] * (value.ndim - 1))
        if isinstance(value, tuple):
            return tuple(self._for_all_branches(part) for part in value)
        if isinstance(value, dict):
            return {key: self._for_all_branches(part) for key, part in value.items()}
        return value

    def _after_last(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if self.inside:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self.states.append(self.prompt.text_state(hidden))
        dense = self.reads.take(hidden)
        if self.rows is not None:
            count = len(self.rows) // self.batch
            reads = Columns(self.compact_reads.index.repeat(count, 1), self.compact_reads.valid, False)
            dense = torch.cat([reads.take(self.rows).to(dense.device), dense])
        # The model's own norm and head see the places that matter, of every branch and of the dense rows (last).
        return (dense, *output[1:]) if isinstance(output, tuple) else dense

    def finish(self, logits: torch.Tensor) -> Trace:
        """From logits [L * batch, reads, vocabulary], exit layer by exit layer, the dense model last."""
        num_layers = len(self.layers)
        by_layer = logits.view(num_layers, self.batch, -1, logits.shape[-1])
        valid = self.reads.valid.to(logits.device)
        count = valid.sum(1)
        dense = by_layer[-1].float().log_softmax(-1)
        choice = dense.argmax(-1)
        targets = choice if self.targets is None else self.targets.to(logits.device)
        targets = targets.where(valid, 0)
        sample = torch.arange(self.batch, device=logits.device)
        first = self.first_read.to(logits.device)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * valid).sum(1) / count

        agreement, nll, kl = [], [], []
        for layer in by_layer:
            log_p = layer.float().log_softmax(-1)
            agreement.append(mean((log_p.argmax(-1) == choice).float()))
            nll.append(mean(-log_p.gather(-1, targets[..., None]).squeeze(-1)))
            exit_next, dense_next = log_p[sample, first], dense[sample, first]
            kl.append(F.kl_div(dense_next, exit_next, reduction="none", log_target=True).sum(-1).clamp(min=0))
        return Trace(
            state=torch.stack([state.to(logits.device) for state in self.states], 1),
            visual=self.visual.to(logits.device),
            agreement=torch.stack(agreement, 1),
            nll=torch.stack(nll, 1),
            kl=torch.stack(kl, 1),
            dense_nll=nll[-1],
        )
