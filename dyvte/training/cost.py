"""What a run would do and what it would take, told without loading any weights (``plan=true``).

Memory and forwards are arithmetic on the model's shape and on the first prompts, not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dyvte.config import FitConfig, FitSettings, ModelConfig, OnlineSettings, TraceConfig, TraceSettings, TrainConfig
from dyvte.data import encode, load_samples, read_config
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.loading import load_empty
from dyvte.ranks import Ranks
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.training.store import load_traces
from dyvte.training.trace import traced_exits
from dyvte.training.trace_pass import LOGITS_AT_ONCE

LOOKED_AT = 8  # prompts that are encoded, to know how long they are
ADAM = 16  # bytes for each trained parameter: itself, its gradient and two moments, in float32
BITS = {"load_in_4bit": 4, "load_in_8bit": 8}


@dataclass(frozen=True)
class Shape:
    """A model, as far as costs depend on it.

    Attributes:
        layers, size, inner, vocabulary: of the decoder.
        exits: the exit layers that are traced.
        parameters: of the whole model.
        weight_bytes: of a whole copy.
        item_bytes: of one number in a state.
    """

    layers: int
    size: int
    inner: int
    vocabulary: int
    exits: tuple[int, ...]
    parameters: int
    weight_bytes: int
    item_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, exits: int | Sequence[int] | None) -> Shape:
        model = load_empty(config)
        spec = DecoderSpec.of(model)
        weights = list(model.parameters())
        item = next(weight.element_size() for weight in weights if weight.is_floating_point())
        bits = next((bits for name, bits in BITS.items() if (config.quantization or {}).get(name)), 8 * item)
        decoder = spec.config
        count = sum(weight.numel() for weight in weights)
        return cls(
            spec.num_layers,
            decoder.hidden_size,
            getattr(decoder, "intermediate_size", 4 * decoder.hidden_size),
            decoder.vocab_size,
            tuple(traced_exits(exits, spec)),
            count,
            count * bits // 8,
            item,
        )

    @property
    def sample_bytes(self) -> int:
        """What the numbers of one trace take on the disk, see :mod:`dyvte.training.units`."""
        return 2 * self.layers * 2 * self.size + 2 * self.size + (4 + 2 + 2) * self.layers + 4

    def forwards(self, text: float, tokens: float) -> float:
        """Passes of the dense model that one trace costs: its own, and the text alone after every exit.

        Args:
            text: text tokens, those of the answer included.
            tokens: all tokens.
        """
        return 1 + sum(self.layers - e for e in self.exits) / self.layers * text / tokens

    def pass_bytes(self, batch: int, text: float, tokens: float, answer: int, whole_logits: bool) -> int:
        """The widest moment of a traced batch, beside the weights.

        Args:
            answer: tokens of the answer.
            whole_logits: all logits at once, since ranks share the head.
        """
        branches = len(self.exits)
        rows = batch * (tokens + branches * text)
        layer = rows * (2 * self.size + 3 * self.inner) * self.item_bytes
        logits = (branches + 1) * batch * answer * self.vocabulary * 4
        states = batch * self.layers * 2 * self.size * 4
        return round(max(layer, logits if whole_logits else min(logits, LOGITS_AT_ONCE)) + states)


def plan(config: TraceConfig | FitConfig | TrainConfig, world_size: int = 1) -> str:
    """What a run would do, in words and figures.

    Raises:
        ValueError: what would stop the run at its beginning, as far as the config, the data and the processor tell.
    """
    if isinstance(config, FitConfig):
        names = [config.traces] if isinstance(config.traces, str) else config.traces
        traces = load_traces(*names)
        record = traces.provenance
        return "\n".join(_fit_lines(config.fit, len(traces), record["num_layers"], record["hidden_size"]))
    sets: dict[str, Any] = {"trace": config.data}
    if isinstance(config, TrainConfig):
        held_out = {} if config.held_out is None else {"trace held-out": config.held_out}
        sets = {f"trace {'online' if config.mode == 'online' else 'train'}": config.data} | held_out
    if config.loader is not None:
        return "\n".join(_units_line(name, config, len(load_samples(read_config(data)))) for name, data in sets.items())
    shape = Shape.of(config, config.exits)
    shared = config.shard in ("zero3", "fsdp2", "tp") and world_size > 1
    copies = (
        f"1/{world_size} of it on each of {world_size} ranks" if shared else f"a copy on each of {world_size} ranks"
    )
    lines = [
        f"model: {config.model}: {shape.parameters / 1e9:.3g} B parameters, {shape.layers} layers of width "
        f"{shape.size}, {_size(shape.weight_bytes)} of weights, {copies}"
    ]
    for name, data in sets.items():
        lines += _trace_lines(name, config, shape, read_config(data), shared, world_size)
    if isinstance(config, TrainConfig):
        samples = len(load_samples(read_config(config.data)))
        online = config.online if config.mode == "online" else None
        lines += _fit_lines(config.fit, samples, shape.layers, shape.size, online)
    return "\n".join(lines)


def told(config: TraceConfig | FitConfig | TrainConfig, ranks: Ranks) -> bool:
    """Prints the plan of a run that is asked for no more than that (``plan=true``); whether it is."""
    if config.plan and ranks.first:
        print(plan(config, ranks.world_size))
    return config.plan


def _trace_lines(
    name: str,
    config: ModelConfig | TraceSettings,
    shape: Shape,
    data: Mapping[str, Any],
    shared: bool,
    world_size: int,
) -> list[str]:
    samples = load_samples(data)
    answer = config.max_new_tokens or data.get("max_new_tokens", 16)
    prompt_text, visual = _prompt(config, samples, data)
    text, tokens = prompt_text + answer, prompt_text + visual + answer
    each = shape.forwards(text, tokens)
    kept = 0 if "online" in name else len(samples) * shape.sample_bytes
    memory = shape.weight_bytes // (world_size if shared else 1)
    memory += shape.pass_bytes(config.batch_size, text, tokens, answer, config.shard in ("zero3", "tp"))
    answers = f", and {len(samples)} greedy answers" if config.answers == "dense" else ""
    return [
        _units_line(name, config, len(samples)),
        f"  prompts  {prompt_text:.0f} text and {visual:.0f} visual tokens, answers of up to {answer}",
        f"  compute  {each:.2f} dense forwards a sample, {each * len(samples):,.0f} in all{answers}",
        f"  disk     {_size(shape.sample_bytes)} a sample, {_size(kept)} in all",
        f"  memory   about {_size(memory)} on each device",
    ]


def _units_line(name: str, settings: Any, samples: int) -> str:
    units = math.ceil(samples / settings.unit_size)
    return f"{name}: {samples:,} samples in {units:,} units, batches of {settings.batch_size}"


def _fit_lines(
    settings: FitSettings, samples: int, layers: int, size: int, online: OnlineSettings | None = None
) -> list[str]:
    with torch.device("meta"):
        heads = ExitHeads(
            ExitHeadsConfig(num_layers=layers, hidden_size=size, form=settings.form, width=settings.width, guard=None)
        )
    parameters = sum(weight.numel() for weight in heads.parameters())
    training = samples - max(1, round(settings.validation * samples))
    steps = settings.epochs * math.ceil(training / settings.batch_size)
    compute = f"{settings.epochs} epochs, {steps:,} steps of {settings.batch_size} traces"
    memory = f"{_size(ADAM * parameters)} of weights, gradients and moments"
    if online is not None:
        compute = f"{online.updates} steps of {online.batch_size} traces after every round of {online.round_size}"
        memory += f", and {_size(2 * layers * 2 * size * online.buffer)} of the latest {online.buffer:,} states"
    return [
        f"fit: {parameters:,} parameters ({settings.form}), {training:,} traces to learn from, "
        f"{samples - training:,} that train nothing",
        f"  compute  {compute}",
        f"  memory   {memory}",
    ]


def _prompt(config: Any, samples: Sequence[Any], data: Mapping[str, Any]) -> tuple[float, float]:
    """Text and visual tokens of a prompt: means over the first ones."""
    from transformers import AutoProcessor

    source = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    processor = AutoProcessor.from_pretrained(config.model, **source)
    seen = [samples[i] for i in range(min(LOOKED_AT, len(samples)))]
    inputs = encode(processor, seen, data.get("template"))
    full = inputs["attention_mask"].sum().item()
    visual = visual_tokens(load_empty(config), inputs["input_ids"]).sum().item()
    return (full - visual) / len(seen), visual / len(seen)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
