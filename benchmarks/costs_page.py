"""Writes docs/costs.md: GPU-hours, disk and memory of heads for models of three sizes. Arithmetic, nothing measured.

python benchmarks/costs_page.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from dyvte.evaluation.costs import kv_width, pass_flops
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.cost import ADAM
from dyvte.training.shape import Shape

PAGE = Path(__file__).parents[1] / "docs/costs.md"
GPU, PEAK, BANDWIDTH, MEMORY = "H100 (80 GB, SXM)", 989e12, 3.35e12, 80e9  # bf16 without sparsity; bytes a second
BUSY, STREAMED = 0.45, 0.6  # the shares of peak and of bandwidth that are assumed to be reached
UNIT = 32
TEXT, ANSWER = 45, 32  # tokens of a question in its template, and of an answer
RUNS = {"1 % of the mixture": 6_650, "configs/models: 10,000 and 5,000 held out": 15_000, "all of the mixture": 665_000}


@dataclass(frozen=True)
class Model:
    """A model to trace.

    Attributes:
        name: what it is like.
        decoder: of its decoder.
        visual: visual tokens of an image.
        tower: parameters of its vision tower.
        patches: rows of the tower for an image.
        batch: samples per pass.
        ranks: GPUs that share one copy of the weights.
    """

    name: str
    decoder: LlamaConfig
    visual: int
    tower: float
    patches: int
    batch: int
    ranks: int

    @property
    def shape(self) -> Shape:
        c = self.decoder
        heads = c.num_attention_heads + c.num_key_value_heads
        layer = c.hidden_size * (2 * heads * c.head_dim + 3 * c.intermediate_size)
        count = round(c.num_hidden_layers * layer + 2 * c.hidden_size * c.vocab_size + self.tower)
        exits = tuple(range(1, c.num_hidden_layers))
        layers = c.num_hidden_layers
        return Shape(layers, c.hidden_size, c.intermediate_size, c.vocab_size, exits, count, 2 * count, 2, kv_width(c))

    @property
    def tokens(self) -> int:
        return self.visual + TEXT + ANSWER

    @property
    def forward(self) -> float:
        """FLOPs of a dense pass of prompt and answer."""
        decoder = pass_flops(self.decoder, TEXT + ANSWER, [self.visual] * self.decoder.num_hidden_layers)
        return decoder + 2 * self.tower * self.patches

    @property
    def forwards(self) -> float:
        return self.shape.forwards(TEXT + ANSWER, self.tokens)

    def seconds(self, answers: str) -> float:
        """GPU-seconds of a sample: its trace and, for dense answers, a prompt and the steps after it."""
        traced = self.forwards * self.forward / (BUSY * PEAK)
        if answers == "dataset":
            return traced
        steps = ANSWER * self.shape.weight_bytes / (STREAMED * BANDWIDTH) / self.batch
        return traced + self.forward / (BUSY * PEAK) + steps

    @property
    def memory(self) -> float:
        """Bytes on each GPU; ranks that share the weights take the answers of the data."""
        shard = "none" if self.ranks == 1 else "zero3"
        lengths = TEXT + ANSWER, self.tokens, ANSWER
        return self.shape.device_bytes(self.batch, *lengths, shard, self.ranks, self.ranks == 1)

    @property
    def original(self) -> float:
        """GPU-seconds of a sample and step of the published training: from a random layer on, all rows twice."""
        return 1.5 * self.forward / (BUSY * PEAK)


def decoder(layers: int, size: int, inner: int, heads: int, keys: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=size,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
    )


CLIP, PATCHES = 0.304e9, 577
SMALL = Model("7B (LLaVA-1.5-7B)", decoder(32, 4096, 11008, 32, 32, 32064), 576, CLIP, PATCHES, 16, 1)
MEDIUM = Model("13B (LLaVA-1.5-13B)", decoder(40, 5120, 13824, 40, 40, 32064), 576, CLIP, PATCHES, 16, 1)
LARGE = Model("72B (Qwen2.5-VL-72B)", decoder(80, 8192, 29568, 64, 8, 152064), 1000, 0.675e9, 4000, 8, 8)
MODELS = (SMALL, MEDIUM, LARGE)


def size(count: float) -> str:
    unit, scale = next((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s)
    return f"{count / scale:,.3g} {unit}"


def span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def wall(model: Model, samples: int, gpus: int, answers: str) -> str:
    """How long so many GPUs take: units are whole, and groups of ranks that share a copy work as one."""
    if gpus < model.ranks:
        return "no room"
    groups = gpus // model.ranks
    units = math.ceil(samples / UNIT)
    each = UNIT * model.seconds(answers) / model.ranks
    return span(math.ceil(units / groups) * each)


def answers_of(model: Model) -> str:
    return "dataset" if model.ranks > 1 else "dense"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sample_rows() -> list[list[str]]:
    return [
        [
            model.name,
            f"{model.shape.parameters / 1e9:.1f} B",
            f"{model.visual:,} + {TEXT} + {ANSWER}",
            f"{model.forward / 1e12:.1f}",
            f"{model.forwards:.2f}",
            answers_of(model),
            f"{1000 * model.seconds(answers_of(model)):,.0f} ms",
            size(model.shape.sample_bytes),
            f"{size(model.memory)}" + (f" (weights over {model.ranks})" if model.ranks > 1 else ""),
        ]
        for model in MODELS
    ]


def run_rows() -> list[list[str]]:
    return [
        [
            name,
            model.name.split(" ")[0],
            f"{samples * model.seconds(answers_of(model)) / 3600:,.1f}",
            *(wall(model, samples, gpus, answers_of(model)) for gpus in (1, 8, 64)),
            size(samples * model.shape.sample_bytes),
        ]
        for name, samples in RUNS.items()
        for model in MODELS
    ]


def parameters(shape: Shape, form: str, width: int) -> int:
    config = ExitHeadsConfig(num_layers=shape.layers, hidden_size=shape.size, form=form, width=width, guard=None)
    with torch.device("meta"):
        heads = ExitHeads(config)
    return sum(weight.numel() for weight in heads.parameters())


def fit_rows() -> list[list[str]]:
    rows = []
    for model in MODELS:
        shape = model.shape
        shared, original = (parameters(shape, form, width) for form, width in (("shared", 128), ("original", 2048)))
        steps = 40 * math.ceil(0.85 * 10_000 / 128)
        read = 40 * 8_500 * shape.sample_bytes
        rows.append(
            [
                model.name.split(" ")[0],
                f"{shared / 1e6:.1f} M, {size(ADAM * shared)}",
                f"{original / 1e6:,.0f} M, {size(ADAM * original)}",
                f"{steps:,}",
                size(read),
            ]
        )
    return rows


def original_rows() -> list[list[str]]:
    samples = RUNS["1 % of the mixture"]
    labels = MEDIUM.shape.layers - 1
    ours, theirs = MEDIUM.seconds("dataset"), MEDIUM.original
    return [
        ["DyVTE as published", "1.50", "1", f"{samples * theirs / 3600:.2f}", f"{samples:,}"],
        ["a trace", f"{MEDIUM.forwards:.2f}", f"{labels}", f"{samples * ours / 3600:.2f}", f"{samples * labels:,}"],
    ]


SAMPLE = ["model", "parameters", "visual + text + answer", "TFLOP a dense pass", "dense passes a trace", "answers"]
SAMPLE += ["GPU time", "on the disk", "memory of a GPU"]


def page() -> str:
    dense = SMALL.forward / (BUSY * PEAK)
    steps = ANSWER * SMALL.shape.weight_bytes / (STREAMED * BANDWIDTH) / SMALL.batch
    cache = SMALL.shape.cache_bytes(SMALL.batch, SMALL.tokens)
    gather = LARGE.shape.weight_bytes * (LARGE.ranks - 1) / LARGE.ranks
    sharded = LARGE.batch * LARGE.seconds("dataset")
    ratio = (MEDIUM.shape.layers - 1) * MEDIUM.original / MEDIUM.seconds("dataset")
    return f"""# What heads cost

Written by `python benchmarks/costs_page.py`; the formulas are those of `plan=true`
([training/cost.py](../dyvte/training/cost.py)). **Arithmetic: nothing on this page was measured on a GPU.**

Assumed: {GPU}, {PEAK / 1e12:.0f} TFLOPS in bf16, of which {100 * BUSY:.0f} % are reached in passes over prompts, and
{BANDWIDTH / 1e12:.2f} TB/s, of which {100 * STREAMED:.0f} % are reached while decoding; {TEXT} tokens of text in a
prompt, answers of {ANSWER}. Loading the model, reading images and starting up are not counted. `plan=true` says it for
your model, data and number of GPUs.

## A sample

{table(SAMPLE, sample_rows())}

- **A dense pass** over n tokens: 2 FLOPs for each parameter of the decoder and token, attention, and the vision tower.
- **A trace** is one of these and, for every exit e, the w tokens of text and answer once more through L - e layers:
  1 + sum over e of (L - e) / L · w / n, that is 1 + (L - 1) / 2 · w / n for all exits. A stride over exits divides the
  sum. 7B: 1 + 31 / 2 · {TEXT + ANSWER} / {SMALL.tokens} = {SMALL.forwards:.2f}.
- **A greedy answer** (`answers: dense`) is a dense pass, and a step for each of its tokens that reads all weights for a
  batch. 7B: a dense pass takes {1000 * dense:.0f} ms, so trace and prompt take ({SMALL.forwards:.2f} + 1) ·
  {1000 * dense:.0f} = {1000 * dense * (SMALL.forwards + 1):.0f} ms, and the steps {ANSWER} ·
  {size(SMALL.shape.weight_bytes)} / ({STREAMED} · {BANDWIDTH / 1e12:.2f} TB/s) / {SMALL.batch} = {1000 * steps:.0f} ms.
- **Sharded models** (ZeRO-3, FSDP2) bring {size(gather)} to every GPU for a pass of {LARGE.batch} samples, which takes
  {sharded:.0f} s, but also for every token they generate: use `answers: dataset`, as counted here, or `shard: tp`.
- **On the disk**: a text state of 2 d numbers for each layer and a mean visual token of d, 2 bytes a number, and 8
  bytes of labels a layer. 7B: 2 · (32 · 2 · 4,096 + 4,096) + 8 · 32 + 4.
- **Memory**: the weights, and the widest of: the rows of one layer with all branches beside them, the logits, the cache
  of the batch that is answered with its prompts in one layer (7B: a cache of {size(cache)}). 72B has
  {size(LARGE.shape.weight_bytes)} of weights: over {LARGE.ranks} GPUs, or in 4 bits
  ({size(LARGE.shape.parameters / 2)}) on one.

## A run

GPU-hours, and time by the clock, with whole units of {UNIT} samples on each GPU. The mixture is LLaVA's mix665k.

{table(["samples", "model", "GPU-hours", "1 GPU", "8 GPUs", "64 GPUs", "disk"], run_rows())}

On 64 GPUs the small runs are a matter of loading the model. `mode: online` keeps nothing on the disk, and the latest
8,192 traces in memory ({size(8192 * SMALL.shape.sample_bytes)} at 7B).

## Training the heads

Parameters without the guard's, and what they take with gradients and moments in float32; 8,500 traces, 40 epochs,
batches of 128.

{table(["model", "shared form", "published form", "steps", "states read"], fit_rows())}

States are read from memory-mapped files, after the first epoch mostly from the page cache; one GPU or a few CPU cores
are enough for the shared form. The published form is where ZeRO-1 and ZeRO-2 help.

## Against the published recipe

LLaVA-1.5-13B, 1 % of the mixture, one epoch, given answers ([configs/paper](../configs/paper/dyvte-13b.yaml)). The
published training draws a layer for each sample and step, and from there on runs all rows twice, visual tokens hidden
from the copies: about 1.5 dense passes, for one label.

{table(["", "dense passes a sample", "labels a sample", "GPU-hours", "labels"], original_rows())}

For the same compute that is {ratio:.0f} times as many labels. The published gates learn in the same pass, each of them
from its share of one epoch; traces are kept, and heads of any form, label rule or promise are fitted from them in
minutes.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
