"""The last stage: what the model has learned, and how."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from dyvte.data import batches, encode, load_samples, scenes
from dyvte.provenance import write_json

from .settings import Report

matplotlib.use("Agg")
COMMAND = "python -m train.reference_mllm --stage report"


def write_report(settings: Report, output: Path) -> None:
    """Asks the saved model held-out questions; writes report.json and the model's README.md beside it."""
    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32).eval()
    right = answer(model, AutoProcessor.from_pretrained(output), settings)
    hits = [hit for some in right.values() for hit in some]
    result = {
        "questions": len(hits),
        "scenes": "digits of the test split, never seen in training; one new scene per question",
        "accuracy": sum(hits) / len(hits),
        "by_kind": {kind: sum(some) / len(some) for kind, some in right.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": COMMAND,
    }
    write_json(output / "report.json", result)
    (output / "README.md").write_text(card(model, result))
    print(json.dumps(result, indent=2))


@torch.no_grad()
def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, settings: Report) -> dict[str, list[bool]]:
    """Greedy answers to questions about scenes of test digits, right or wrong, by kind."""
    samples = load_samples({"scenes": {"split": "test", "n": settings.questions, "seed": settings.seed}})
    right: dict[str, list[bool]] = {}
    for batch in tqdm(list(batches(samples, 50)), desc="report"):
        inputs = encode(processor, batch)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for sample, text in zip(batch, processor.batch_decode(ids, skip_special_tokens=True)):
            right.setdefault(sample.kind, []).append(text.strip() == sample.answers[0])
    return right


def card(model: LlavaForConditionalGeneration, result: dict) -> str:
    """The README of the checkpoint."""
    text, vision = model.config.text_config, model.config.vision_config
    table = "\n".join(f"| {kind} | {100 * value:.1f} % |" for kind, value in result["by_kind"].items())
    return f"""# The reference MLLM

A LLaVA in miniature ({result["parameters"] / 1e6:.1f} M parameters): CLIP tower ({vision.num_hidden_layers} layers),
two-layer projector, LLaMA decoder ({text.num_hidden_layers} layers, {text.hidden_size} wide),
{model.config.image_seq_length} visual tokens per image. It answers questions about scenes of real handwritten digits
(the scans of scikit-learn's `load_digits`).

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("checkpoints/reference-mllm", dtype="float32")
processor = AutoProcessor.from_pretrained("checkpoints/reference-mllm")
```

Greedy answers right on {result["questions"]:,} held-out questions (new scenes, digits of the test split):
**{100 * result["accuracy"]:.1f} %**.

| kind | right |
|---|---|
{table}

![Learning curves](curves.png)

Made from nothing by `make reference-mllm`, with
[configs/reference_mllm.yaml](../../configs/reference_mllm.yaml); this report by `{result["command"]}`. The learning
curves are in `vision.jsonl` and `answers.jsonl`, too.
"""


def plot_curves(work: Path, output: Path) -> None:
    """Loss and accuracy on dev scenes of both stages, as JSON lines and as a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, name in zip(axes, ("vision", "answers")):
        text = (work / f"{name}.jsonl").read_text()
        (output / f"{name}.jsonl").write_text(text)
        rows = [json.loads(line) for line in text.splitlines()]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#0072b2")
        axis.set(title=f"{name}: training loss", xlabel="step", yscale="log")
    rows = [row for row in rows if "dev_accuracy" in row]
    steps = [row["step"] for row in rows]
    for kind, colour in zip(scenes.KINDS, plt.get_cmap("tab20").colors):
        axes[2].plot(steps, [row.get(kind, math.nan) for row in rows], label=kind, color=colour, linewidth=1)
    axes[2].plot(steps, [row["dev_accuracy"] for row in rows], label="all", color="black")
    axes[2].set(title="answers right on dev digits", xlabel="step", ylim=(0, 1.02))
    axes[2].legend(fontsize=6, ncols=2)
    figure.savefig(output / "curves.png", dpi=130)
    plt.close(figure)
