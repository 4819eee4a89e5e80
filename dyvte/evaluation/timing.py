"""Time that a policy saves, measured beside the dense model on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from dyvte.data import Sample
from dyvte.evaluation.policies import DENSE, Policy
from dyvte.evaluation.store import ResultFolder
from dyvte.evaluation.subject import Subject
from dyvte.runtime.compat import call_cache


def time_policies(
    subject: Subject,
    folder: ResultFolder,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    batch_size: int,
    batches: int,
    progress: bool,
) -> dict[str, Any]:
    """Times of the policies that have none yet; the dense model is measured again beside each of them.

    Args:
        folder: where the times measured so far lie, and the others go.
        batches: on how many batches, spread over the samples; 0 measures none.

    Returns:
        All times by policy, see :func:`time_policy`.
    """
    timing = folder.read_timing()
    missing = [name for name in policies if name not in timing]
    if batches < 1 or not missing:
        return timing
    size = min(batch_size, len(samples))
    count = min(batches, len(samples) // size)
    starts = [round(i * (len(samples) - size) / max(count - 1, 1)) for i in range(count)]
    groups = [[samples[i] for i in range(start, start + size)] for start in starts]
    encoded = [subject.encode(group) for group in groups]
    for name in tqdm(missing, desc="time", unit="policy", disable=not progress):
        timing[name] = time_policy(subject, groups, encoded, policies[name]) | {"batch_size": size}
        folder.write_timing(timing)
    return timing


def time_policy(
    subject: Subject, groups: list[list[Sample]], encoded: list[dict[str, Any]], policy: Policy
) -> dict[str, Any]:
    """Medians over batches, each measured twice: the dense model first, then the policy first.

    Args:
        groups: batches of samples.
        encoded: the model's inputs for each of them.
    """
    tokens = subject.max_new_tokens
    pair = {DENSE: None, "exit": policy}
    prefill: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
    decode: dict[str, list[float]] = {name: [] for name in pair}
    for name in pair:  # warm-up: the first calls allocate and compile
        measure(subject, encoded[0], min(2, tokens), pair[name], groups[0])
    for order in (list(pair), list(pair)[::-1]):
        for group, inputs in zip(groups, encoded):
            for name in order:
                prefill[name].append(measure(subject, inputs, 1, pair[name], group))
            for name in order if tokens > 1 else ():
                decode[name].append(measure(subject, inputs, tokens, pair[name], group)["step"])

    def medians(key: str) -> dict[str, float]:
        return {name: statistics.median(measured[key] for measured in prefill[name]) for name in pair}

    def ratio(key: str) -> float:
        return statistics.median(e[key] / d[key] for d, e in zip(prefill[DENSE], prefill["exit"]))

    return {
        "batches": len(groups),
        "prefill_seconds": medians("whole"),
        "prefill_ratio": ratio("whole"),
        "decoder_seconds": medians("decoder"),
        "decoder_ratio": ratio("decoder"),
        "decode_seconds": {name: statistics.median(decode[name]) for name in pair} if tokens > 1 else None,
        "cache_bytes": medians("cache"),
    }


def measure(
    subject: Subject, inputs: dict[str, Any], tokens: int, policy: Policy | None, samples: list[Sample]
) -> dict[str, float]:
    """Generates exactly ``tokens`` tokens and takes the time.

    Returns:
        Seconds in all (``whole``), of the decoder layers over the prompt (``decoder``), per token after the first
        (``step``), and bytes of the cache (``cache``).
    """
    ticks: dict[str, float] = {}
    passes = 0

    def tick(name: str) -> None:
        if subject.model.device.type == "cuda":
            torch.cuda.synchronize(subject.model.device)
        ticks[name] = time.perf_counter()

    def before_first_layer(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes <= 2:
            tick(f"pass {passes}")

    def after_last_layer(*_: Any) -> None:
        if passes == 1:
            tick("prompt done")

    hooks = []
    with subject.under(policy, samples):
        # Around whatever the policy does in its own hooks on these layers.
        hooks.append(subject.layers[0].register_forward_pre_hook(before_first_layer, prepend=True))
        hooks.append(subject.layers[-1].register_forward_hook(after_last_layer))
        try:
            tick("start")
            out = subject.generate(inputs, tokens, min_new_tokens=tokens, return_dict_in_generate=True)
            tick("end")
        finally:
            for hook in hooks:
                hook.remove()
    cached = getattr(call_cache(out), "layers", [])
    tensors = [t for layer in cached for t in (layer.keys, layer.values) if t is not None]
    return {
        "whole": ticks["end"] - ticks["start"],
        "decoder": ticks["prompt done"] - ticks["pass 1"],
        "step": (ticks["end"] - ticks["pass 2"]) / (tokens - 1) if tokens > 1 else 0.0,
        "cache": sum(t.numel() * t.element_size() for t in tensors),
    }
