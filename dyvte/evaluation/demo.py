"""The demo: held-out questions to the shipped reference MLLM, dense and with exits; numbers and a picture."""

from __future__ import annotations

import statistics
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from dyvte.data import GREEDY, Sample, encode, load_samples, scenes
from dyvte.evaluation.costs import prefill_flops
from dyvte.heads import ExitHeads
from dyvte.methods.learned import LearnedExit
from dyvte.provenance import write_json
from dyvte.runtime import visual_exit
from dyvte.training.tracer import prompt_lengths

SEED = 100  # of the first kind's scenes


@dataclass
class Row:
    """One question kind, or all: shares in 0 ... 1; ``prefill_time`` is that with exits over the dense one."""

    kind: str
    questions: int
    dense_right: float
    exit_right: float
    agreement: float
    exit_layer: float
    flops_removed: float
    prefill_time: float


def run(model: str | Path, heads: str | Path, per_kind: int, repeats: int, output: str | Path) -> list[Row]:
    """Answers ``per_kind`` questions of each kind in one batch, times the LLM's prefill, and draws.

    Args:
        model: folder of the reference MLLM.
        heads: folder of its exit heads.
        per_kind: questions of each kind.
        repeats: timed runs.
        output: folder of ``demo.json`` and ``demo.png``.

    Returns:
        A row for each kind, and one for all.
    """
    mllm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model)
    policy = LearnedExit(ExitHeads.from_pretrained(heads))
    rows, shown, exits_by_kind = [], [], {}
    for seed, kind in enumerate(tqdm(scenes.KINDS, desc="questions"), start=SEED):
        samples = load_samples({"scenes": {"split": "test", "n": per_kind, "seed": seed, "kinds": [kind]}})[:]
        row, exits, said = _one_kind(mllm, processor, policy, kind, samples, repeats)
        rows.append(row)
        exits_by_kind[kind] = exits
        shown.append((samples[0], *said, exits[0]))
    total = sum(row.questions for row in rows)
    means = {
        name: sum(getattr(row, name) * row.questions for row in rows) / total
        for name in ("dense_right", "exit_right", "agreement", "exit_layer", "flops_removed", "prefill_time")
    }
    rows.append(Row("all", total, **means))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "demo.json", [asdict(row) for row in rows])
    _draw(shown, exits_by_kind, len(mllm.model.language_model.layers), folder / "demo.png")
    return rows


@torch.no_grad()
def _one_kind(
    mllm: Any, processor: Any, policy: LearnedExit, kind: str, samples: list[Sample], repeats: int
) -> tuple[Row, list[int], tuple[str, str]]:
    inputs = encode(processor, samples)
    length = inputs["input_ids"].shape[1]

    def answers() -> list[str]:
        ids = mllm.generate(**inputs, max_new_tokens=8, **GREEDY)[:, length:]
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    dense = answers()
    with visual_exit(mllm, policy) as handle:
        left = answers()
    layers = handle.layers.tolist()
    gold = [sample.answers[0] for sample in samples]
    full_length, text_length = prompt_lengths(mllm, inputs)
    text, visual = text_length.tolist(), (full_length - text_length).tolist()
    config = mllm.config.get_text_config()
    spent = sum(prefill_flops(config, t, v, e) for t, v, e in zip(text, visual, layers))
    full = sum(prefill_flops(config, t, v, config.num_hidden_layers) for t, v in zip(text, visual))

    # The vision tower runs once: what is timed is the language model on the prompts.
    features = mllm.get_image_features(inputs["pixel_values"], return_dict=True)
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

    def prefill() -> float:
        began = time.perf_counter()
        mllm(**prompts, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    ratios = []
    for repeat in range(repeats + 1):
        plain = prefill()
        with visual_exit(mllm, policy):
            short = prefill()
        if repeat > 0:  # the first is a warm-up
            ratios.append(short / plain)
    n = len(samples)
    row = Row(
        kind=kind,
        questions=n,
        dense_right=sum(a == g for a, g in zip(dense, gold)) / n,
        exit_right=sum(a == g for a, g in zip(left, gold)) / n,
        agreement=sum(a == b for a, b in zip(dense, left)) / n,
        exit_layer=statistics.mean(layers),
        flops_removed=1 - spent / full,
        prefill_time=statistics.median(ratios),
    )
    return row, layers, (dense[0], left[0])


def _draw(
    shown: list[tuple[Sample, str, str, int]], exits_by_kind: dict[str, list[int]], num_layers: int, path: Path
) -> None:
    """One scene of each kind with question, answers and exit layer, and where each kind leaves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 6
    lines = -(-len(shown) // columns)
    figure = plt.figure(figsize=(13, 2.7 * lines + 3.4), layout="constrained")
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[1] * lines + [1.15])
    for i, (sample, dense, left, layer) in enumerate(shown):
        axis = figure.add_subplot(grid[divmod(i, columns)])
        axis.imshow(sample.images[0], interpolation="nearest")
        axis.axis("off")
        same = dense == left
        question = textwrap.fill(sample.question, 26)
        axis.set_title(f"{question}\n{left}" + ("" if same else f"  (dense: {dense})"), fontsize=9)
        where = "never left" if layer == num_layers else f"left after layer {layer} of {num_layers}"
        axis.text(0.5, -0.04, where, transform=axis.transAxes, ha="center", va="top", fontsize=8.5,
                  color="#333333" if same else "#b00020")  # fmt: skip
    axis = figure.add_subplot(grid[lines, :])
    table = torch.stack([torch.bincount(torch.tensor(e), minlength=num_layers + 1)[1:] for e in exits_by_kind.values()])
    picture = axis.imshow(table / table.sum(1, keepdim=True), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axis.set_yticks(range(len(exits_by_kind)), list(exits_by_kind), fontsize=8)
    axis.set_xticks(range(num_layers), [*map(str, range(1, num_layers)), "never"])
    axis.set_xlabel("exit layer (layers that see the image)")
    axis.set_title("Where the visual tokens leave, share of each kind", fontsize=10)
    for (y, x), count in [((y, x), int(table[y, x])) for y in range(len(table)) for x in range(num_layers)]:
        if count:
            dark = count > 0.6 * table[y].sum()
            axis.text(x, y, str(count), ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    figure.colorbar(picture, ax=axis, fraction=0.02, pad=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)
