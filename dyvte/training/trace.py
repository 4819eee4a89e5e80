"""One frozen pass per batch that teaches everything about its samples: text states, and what every exit would do.

After e layers, the text rows continue through the remaining layers alone, as a branch: that is what exiting at e does.
A branch is a group of the runtime; all branches under way run each layer together, in one batch of text-only rows, so
L labels cost a few dense forwards instead of L. The branches join the model's own last rows just before its final norm
and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dyvte.runtime.adaptation import Adaptation
from dyvte.runtime.bypass import Bypass
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.engine import Engine
from dyvte.runtime.locate import without_engine
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.reading import attention_layers, tower_of
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.splice import SplicedVisualMask
from dyvte.training.trace_pass import Trace, TracePass, refuse_without_image


@torch.no_grad()
def trace_batch(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
    exits: int | Sequence[int] | None = None,
    pruning: Reduction | None = None,
    **more: Any,
) -> Trace:
    """Traces a batch: one forward pass of the frozen model, with all exits as branches beside it.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes (peft's ``adapter_names`` too), padded on either side. For a given answer: the
            answer's tokens in the sequence and ``labels`` [batch, sequence], -100 everywhere else. Answer tokens never
            enter a text state. Without ``labels`` agreement and NLL are those of the dense model's next token.
        visual_mask: as in :func:`dyvte.attach`.
        decoder: as in :func:`dyvte.attach`.
        exits: which exit layers to trace: a stride k (every k-th layer that the model allows, and the last before L),
            or a list; all by default. A long text costs (L - 1) / 2 passes of the text for all exits, and 1 / k of
            that with a stride.
        pruning: a method that drops tokens, at work in the traced pass: what is traced is the model with it. The given
            answer, which should be that of the untouched model, is then what agreement is with, so ``labels`` are
            needed; KL is to the pruned model.

    Raises:
        ValueError: a pruning that cannot be traced, a sample without visual tokens, without text after them, labels
            before the last visual token, or states or logits that are not finite.
    """
    spec = DecoderSpec.of(model, decoder)
    traced = traced_exits(exits, spec)
    inputs = dict(inputs) | more
    labels = inputs.pop("labels", None)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("inputs hold neither input_ids nor inputs_embeds: pass what the model's forward takes")
    if labels is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels must be [batch, sequence] like the tokens {list(tokens.shape[:2])}, -100 off-answer")
    if visual_mask is None and inputs.get("input_ids") is not None:
        refuse_without_image(visual_tokens(spec.model, inputs["input_ids"]).any(1))  # before images are encoded
    if pruning is not None:
        _check_pruning(pruning, spec, labels)
    tower = None if pruning is None else tower_of(spec, pruning)
    passes: list[TracePass] = []

    def begin(prompt: Prompt, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> TracePass:
        own = labels
        if own is not None and isinstance(visual_mask, SplicedVisualMask):
            own = visual_mask.expand(own, -100)
        run = TracePass(spec, prompt, hidden, cache, past, own, traced)
        if pruning is not None:
            run.prune(pruning, None if vision is None else vision.take())
        return run

    called = spec.model if inputs.get("adapter_names") is None else _adapted(model, spec)
    read = () if pruning is None else attention_layers(spec, pruning)
    engine = Engine(spec, visual_mask, begin, passes.append, attention_of=read)
    vision = tower() if tower is not None else None
    try:
        logits = called(**inputs, use_cache=False).logits
    finally:
        engine.remove()
        if vision is not None:
            vision.remove()
    return passes[0].finish(logits)


def _check_pruning(pruning: Reduction, spec: DecoderSpec, labels: torch.Tensor | None) -> None:
    if labels is None:
        raise ValueError("a trace under a pruning needs the dense answer: give it with labels, see trace_batch")
    for part in pruning.parts():
        if isinstance(part, (LayerEdit, Bypass, Adaptation)):
            raise ValueError(
                f"{type(part).__name__} changes what layers compute, which exits cannot be traced on top of: choose a "
                "method that drops tokens, such as FastV"
            )
    pruning.check(spec)


def _adapted(model: nn.Module, spec: DecoderSpec) -> nn.Module:
    """The model within peft's wrapper, which gives every sample its adapter."""
    if hasattr(spec.model.get_output_embeddings(), "_mixed_batch_forward"):
        raise ValueError(
            "adapter_names cannot be traced where the language-model head has adapters of its own: trace the samples "
            "of each adapter by themselves, with set_adapter()"
        )
    return without_engine(model)


def traced_exits(exits: int | Sequence[int] | None, spec: DecoderSpec) -> list[int]:
    """The exit layers to trace, L left out: it is the dense model.

    Raises:
        ValueError: an exit layer that the model does not have or allow.
    """
    allowed = spec.exits
    if exits is None:
        return list(allowed)
    if isinstance(exits, int) and not isinstance(exits, bool) and exits >= 1:
        return sorted({*allowed[::exits], *allowed[-1:]})
    if isinstance(exits, Sequence) and all(isinstance(e, int) and not isinstance(e, bool) for e in exits):
        outside = [e for e in exits if e not in allowed and e != spec.num_layers]
        if exits and not outside:
            return sorted({*exits} - {spec.num_layers})
        raise ValueError(
            f"exits {outside or '[]'} cannot be traced: name exit layers {allowed.start} ... {allowed.stop - 1}"
        )
    raise ValueError(f"exits must be a stride of 1 or more, or a list of exit layers, not {exits!r}")
