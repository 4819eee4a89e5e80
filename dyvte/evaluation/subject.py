"""The model under evaluation: its prompts, its greedy answers under a policy, and what they cost in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dyvte.data import GREEDY, Sample, encode
from dyvte.evaluation.costs import attention_flops, kv_width, pass_flops
from dyvte.evaluation.metrics import AnswerMetric
from dyvte.evaluation.policies import Policy, VisualMask, applied
from dyvte.provenance import weights_fingerprint
from dyvte.runtime import Reduction
from dyvte.runtime.decoder import visual_token_ids
from dyvte.runtime.locate import find_decoder, underlying_model


class Subject:
    """A model with everything its calls need.

    Args:
        model: the MLLM, in evaluation mode.
        processor: its processor.
        scorer: the metric of its answers.
        max_new_tokens: longest answer.
        template: chat template, where the processor has none.
        visual_mask: see :func:`dyvte.evaluation.policies.applied`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        scorer: AnswerMetric,
        max_new_tokens: int,
        template: str | None = None,
        visual_mask: VisualMask | None = None,
    ):
        self.model, self.processor, self.scorer = model, processor, scorer
        self.max_new_tokens, self.template, self.visual_mask = max_new_tokens, template, visual_mask
        base = underlying_model(model)
        decoder = find_decoder(base)
        self.layers, self.config = decoder.layers, getattr(decoder, "config", model.config)
        self.name = getattr(base.config, "_name_or_path", "") or None
        self.visual_ids = None if visual_mask is not None else visual_token_ids(base)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        eos = model.generation_config.eos_token_id
        self.eos = set(eos) if isinstance(eos, list) else {eos} - {None}

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def identity(self) -> dict[str, Any]:
        """What the answers depend on; where the model was loaded from is not part of it."""
        return {
            "class": type(underlying_model(self.model)).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.model),
        }

    def check(self, sample: Sample, policies: Iterable[Policy]) -> None:
        """Raises ``ValueError`` before any work if a policy does not fit the model, or the metric the data."""
        for policy in policies:
            with self.under(policy, [sample]):
                pass
        if sample.answers:
            self.scorer.score_sample("", sample.answers, sample.choices)

    def under(self, policy: Policy | None, samples: Sequence[Sample]) -> AbstractContextManager[Any]:
        """The model with a policy at work on a batch, see :func:`dyvte.evaluation.policies.applied`."""
        return applied(self.model, policy, samples, self.visual_mask)

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The model's inputs for a batch."""
        return encode(self.processor, samples, self.template).to(self.model.device, self.model.dtype)

    def token_counts(self, inputs: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Text and visual tokens of every prompt."""
        valid, visual = inputs["attention_mask"].bool(), self.visual_tokens(inputs)
        return (valid & ~visual).sum(1).tolist(), (valid & visual).sum(1).tolist()

    def visual_tokens(self, inputs: dict[str, Any]) -> torch.Tensor:
        """bool [batch, sequence], the visual tokens of every prompt; padding may be among them."""
        if self.visual_mask is not None:
            return self.visual_mask(dict(inputs)).to(inputs["attention_mask"].device)
        return torch.isin(inputs["input_ids"], torch.tensor(self.visual_ids, device=inputs["input_ids"].device))

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], tokens: int, **options: Any) -> Any:
        """Greedy generation of at most ``tokens`` tokens."""
        return self.model.generate(**inputs, max_new_tokens=tokens, **GREEDY, **options)

    def answer(self, inputs: dict[str, Any], policy: Policy | None, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """One row for each sample of a batch."""
        with self.under(policy, samples) as exits:
            ids = self.generate(inputs, self.max_new_tokens)[:, inputs["input_ids"].shape[1] :].tolist()
        text_tokens, visual_tokens = self.token_counts(inputs)
        counts = getattr(exits, "counts", None)
        counts = [[n] * self.num_layers for n in visual_tokens] if counts is None else counts.T.tolist()
        layers = getattr(exits, "layers", None)
        layers = [self.num_layers] * len(samples) if layers is None else layers.tolist()
        rows = []
        for sample, new, exit_layer, text, visual, count in zip(
            samples, ids, layers, text_tokens, visual_tokens, counts
        ):
            end = next((i + 1 for i, token in enumerate(new) if token in self.eos), len(new))
            said = self.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            rows.append(
                {
                    "id": sample.id,
                    "kind": sample.kind,
                    "question": sample.question,
                    "answers": sample.answers,
                    "choices": sample.choices,
                    "answer": said,
                    "ids": new[:end],
                    "score": self.scorer.score_sample(said, sample.answers, sample.choices) if sample.answers else None,
                    "exit_layer": exit_layer,
                    "text_tokens": text,
                    "visual_tokens": visual,
                    "visual_places": sum(count),
                    "flops": self.flops(policy, text, count),
                    "kv_bytes": self.kv_bytes(text, sum(count)),
                }
            )
        return rows

    def flops(self, policy: Policy | None, text: int, counts: Sequence[int]) -> int:
        """Of one sample's prompt in the decoder, what a method reads of its attention included."""
        parts = policy.parts() if isinstance(policy, Reduction) else ()
        read = {k - 1 for part in parts if part.reads_attention for k in part.layers or range(1, self.num_layers)}
        reading = sum(attention_flops(self.config, text + counts[k]) for k in read if counts[k] > 0)
        return pass_flops(self.config, text, counts) + reading

    def kv_bytes(self, text: int, places: int) -> int:
        """Keys and values at the end of prefill: the text in all layers, and the layers' visual tokens in sum."""
        return (self.num_layers * text + places) * kv_width(self.config) * self.model.dtype.itemsize
