"""What a run would do and what it would take, told without loading any weights (``plan=true``).

Memory and forwards are arithmetic on the model's shape and on the first prompts, not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dyvte.config import FitConfig, FitSettings, ModelConfig, OnlineSettings, TraceConfig, TraceSettings, TrainConfig
from dyvte.data import encode, load_samples, read_config
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.loading import load_empty
from dyvte.ranks import Ranks
from dyvte.runtime.decoder import visual_tokens
from dyvte.training.shape import SHARED, Shape
from dyvte.training.store import load_traces

LOOKED_AT = 8  # prompts that are encoded, to know how long they are
ADAM = 16  # bytes for each trained parameter: itself, its gradient and two moments, in float32


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
    shape = (Shape.of if config.loader is None else Shape.described)(config, config.exits)
    lines = [_model_line(config, shape, world_size)]
    for name, data in sets.items():
        if config.loader is None:
            lines += _trace_lines(name, config, shape, read_config(data), world_size)
        else:
            lines += _loader_lines(name, config, shape, len(load_samples(read_config(data))))
    if isinstance(config, TrainConfig) and shape is not None:
        samples = len(load_samples(read_config(config.data)))
        online = config.online if config.mode == "online" else None
        lines += _fit_lines(config.fit, samples, shape.layers, shape.size, online)
    return "\n".join(lines)


def told(config: TraceConfig | FitConfig | TrainConfig, ranks: Ranks) -> bool:
    """Prints the plan of a run that is asked for no more than that (``plan=true``); whether it is."""
    if config.plan and ranks.first:
        print(plan(config, ranks.world_size))
    return config.plan


def _model_line(config: ModelConfig, shape: Shape | None, world_size: int) -> str:
    if shape is None:
        return f"model: {config.model}: neither its config.json nor that of llm says what {config.loader} will load"
    shared = config.shard in SHARED and world_size > 1
    copies = f"{f'1/{world_size} of it' if shared else 'a copy'} on each of {world_size} ranks"
    size = f"{shape.layers} layers of width {shape.size}"
    if config.loader is None:
        size = f"{shape.parameters / 1e9:.3g} B parameters, {size}, {_size(shape.weight_bytes)} of weights"
    elif shape.weight_bytes:
        size += f", {_size(shape.weight_bytes)} of weights"
    return f"model: {config.model}: {size}, {copies}"


def _loader_lines(name: str, config: Any, shape: Shape | None, samples: int) -> list[str]:
    """What is known of a model whose prompts only its loader can make."""
    lines = [_units_line(name, config, samples)]
    if shape is None:
        return lines
    branches = sum(shape.layers - e for e in shape.exits) / shape.layers
    kept = 0 if "online" in name else samples * shape.sample_bytes
    cache = f", and {_size(shape.cache_bytes(config.batch_size, 1))} of cache a token of a batch that is answered"
    return [
        *lines,
        f"  prompts  {config.loader} alone knows how many tokens they have",
        f"  compute  1 + {branches:.3g} w/n dense forwards a sample, where w of n tokens are text and answer",
        f"  disk     {_size(shape.sample_bytes)} a sample, {_size(kept)} in all",
        f"  memory   the weights and a layer's rows{cache if config.answers == 'dense' else ''}",
    ]


def _trace_lines(
    name: str, config: ModelConfig | TraceSettings, shape: Shape, data: Mapping[str, Any], world_size: int
) -> list[str]:
    samples = load_samples(data)
    answer = config.max_new_tokens or data.get("max_new_tokens", 16)
    prompt_text, visual = _prompt(config, samples, data)
    text, tokens = prompt_text + answer, prompt_text + visual + answer
    each = shape.forwards(text, tokens)
    kept = 0 if "online" in name else len(samples) * shape.sample_bytes
    greedy = config.answers == "dense"
    memory = shape.device_bytes(config.batch_size, text, tokens, answer, config.shard, world_size, greedy)
    answers = f", and {len(samples)} greedy answers" if greedy else ""
    cache = (
        f", with a cache of {_size(shape.cache_bytes(config.batch_size, tokens))} while it answers" if greedy else ""
    )
    return [
        _units_line(name, config, len(samples)),
        f"  prompts  {prompt_text:.0f} text and {visual:.0f} visual tokens, answers of up to {answer}",
        f"  compute  {each:.2f} dense forwards a sample, {each * len(samples):,.0f} in all{answers}",
        f"  disk     {_size(shape.sample_bytes)} a sample, {_size(kept)} in all",
        f"  memory   about {_size(memory)} on each device{cache}",
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
