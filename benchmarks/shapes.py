"""What the benchmarks share: a LLaVA-1.5-shaped decoder of any width, prompts for it, alternating timing, a record."""

from __future__ import annotations

import ctypes
import itertools
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import dyvte

RESULTS = Path(__file__).parent / "results"


def llava_shaped_decoder(
    width: int = 256, layers: int = 32, attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The decoder of LLaVA-1.5-7B (32 layers, MLP 2.6875 times as wide, heads of 128), narrower to fit a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 2),
        max_position_embeddings=4096,
    )
    config._attn_implementation = attention
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def prompt(
    model: LlamaForCausalLM, batch: int = 1, before: int = 35, visual: int = 576, after: int = 25, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random embeddings in the order of a LLaVA prompt, and the mask of the visual ones."""
    length = before + visual + after
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, length, model.config.hidden_size, generator=generator)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, before : before + visual] = True
    inputs = {"inputs_embeds": embeds.to(model.device, model.dtype)}
    return inputs, mask.to(model.device)


def heads_that_leave_at(model: LlamaForCausalLM, layer: int, lookahead: int = 0) -> dyvte.ExitHeads:
    """Heads of full cost, guard included, whose layer embedding alone decides: from ``layer`` on, yes."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    heads = dyvte.ExitHeads(
        dyvte.ExitHeadsConfig(num_layers=layers, hidden_size=width, guard=0.99, lookahead=lookahead)
    )
    inner = heads.heads
    with torch.no_grad():
        for weight in (inner.project.weight, inner.project.bias, inner.hidden.weight, inner.hidden.bias):
            weight.zero_()
        inner.hidden.weight.fill_diagonal_(1)
        inner.layer[layer - 1 :, 0] = 10
        inner.out.weight.zero_()
        inner.out.weight[0, 0] = 1
        inner.out.bias.fill_(-5)
    return heads.to(model.device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_memory() -> bool:
    """Has glibc keep the memory it is given back, for whatever follows; False where there is no glibc.

    By its defaults it returns big blocks to the kernel at once, and every layer pays for their pages again: on a CPU,
    batches then cost more than their samples, with or without exits. PyTorch's tuning guide advises such allocators.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # of malloc.h
    return adjust is not None and bool(adjust(trim_threshold, most) and adjust(mmap_threshold, most))


def timed(run: Callable[[], Any]) -> list[float]:
    """Seconds of a run, as a single lap."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return [time.perf_counter() - began]


def timed_by_layer(model: LlamaForCausalLM, run: Callable[[], Any]) -> list[float]:
    """Seconds of a model's pass in laps: what disturbs a CPU spoils a few laps, not the run.

    One lap up to the first decoder layer, then one for every layer, with what is decided before it; the last goes on
    to the end. On a GPU a single lap, since the clock could not be read without waiting for the device.
    """
    if torch.cuda.is_available():
        return timed(run)
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    hooks = [model.register_forward_pre_hook(mark, prepend=True), model.register_forward_hook(mark)]
    hooks += [layer.register_forward_pre_hook(mark, prepend=True) for layer in model.get_decoder().layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [end - begin for begin, end in itertools.pairwise(marks)]


def alternate(runs: dict[str, Callable[[], list[float]]], repeats: int, warmup: int = 2) -> dict[str, torch.Tensor]:
    """The laps of every run [repeats, laps], in turn, so that a drifting machine hits all alike.

    The order is drawn anew for every round: a run that leaves the allocator or the caches in disorder would slow the
    next one, always the same.
    """
    laps: dict[str, list[list[float]]] = {name: [] for name in runs}
    order, draw = list(runs), random.Random(0)
    for repeat in tqdm(range(warmup + repeats), unit="round", disable=None):
        draw.shuffle(order)
        for name in order:
            took = runs[name]()
            if repeat >= warmup:
                laps[name].append(took)
    return {name: torch.tensor(values, dtype=torch.double) for name, values in laps.items()}


def seconds(laps: torch.Tensor) -> float:
    """What a run takes: the median over the rounds of each of its laps, added up."""
    return laps.quantile(0.5, 0).sum().item()


def interval(figure: Callable[[dict[str, torch.Tensor]], float], laps: dict[str, torch.Tensor]) -> list[float]:
    """Where a figure made from laps lies at 90 % confidence: bootstrap over the rounds, what the noise leaves open."""
    rounds = len(next(iter(laps.values())))
    draw = torch.Generator().manual_seed(0)
    figures = []
    for _ in range(300):
        some = torch.randint(rounds, (rounds,), generator=draw)
        figures.append(figure({name: values[some] for name, values in laps.items()}))
    return torch.tensor(figures, dtype=torch.double).quantile(torch.tensor([0.05, 0.95], dtype=torch.double)).tolist()


def record(name: str, result: dict[str, Any]) -> None:
    """Prints a result and writes it to results/NAME.json with versions and hardware."""
    from dyvte.provenance import versions, write_json  # other checkouts are timed with this file too

    result |= {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result, indent=2))
