"""Trains the reference MLLM: a small but genuine LLaVA that answers questions about scenes of handwritten digits.

Three stages, each resumable, on CPU or GPU, with one process or several (``torchrun``):

1. ``vision``   the CLIP tower alone, with dense supervision: every patch names its digit, colour, row and column.
2. ``answers``  projector and decoder on questions, the tower frozen. Many questions share one image: each sees the
                image and itself but no other question, so a turn in training looks exactly like a prompt at inference.
3. ``report``   greedy answers to held-out questions about scenes of test digits, per kind.

    python train/reference_mllm.py --config configs/reference_mllm.yaml
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dyvte.data import scenes
from dyvte.provenance import atomic_path

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(patch: int) -> LlavaProcessor:
    """Word-level tokenizer and image processor; scenes are drawn at the tower's size, so nothing is resized."""
    words = SPECIAL + ["USER:", "ASSISTANT:"] + scenes.vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("?", " ?"), normalizers.Replace(".", " .")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": scenes.CANVAS}, crop_size={"height": scenes.CANVAS, "width": scenes.CANVAS}
    )
    return LlavaProcessor(
        image_processor,
        fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(settings: dict, vocab_size: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(image_size=scenes.CANVAS, **settings["vision_config"])
    text = LlamaConfig(
        vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **settings["text_config"]
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(scenes.CANVAS // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = "eager"  # the fastest for short sequences under autocast on CPU
    return LlavaForConditionalGeneration(config)


def normalise(images: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> pixel values [n, 3, H, W], as the image processor makes them."""
    image = processor.image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    return ((images.float() * image.rescale_factor - mean) / std).permute(0, 3, 1, 2)


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for everything else; warm-up, then cosine to a tenth."""

    def __init__(self, module: nn.Module, stage: dict):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and "embed" not in n and "head" not in n]
        outer = [p for n, p in named if not any(p is q for q in inner)]
        self.parts = [
            torch.optim.Muon(inner, lr=stage["lr"], weight_decay=stage["weight_decay"], adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=stage["lr"], betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.parameters = inner + outer
        self.lr, self.steps, self.warmup = stage["lr"], stage["steps"], stage["warmup"]

    def step(self, step: int) -> None:
        if dist.is_initialized():
            flat = torch.cat([p.grad.flatten() for p in self.parameters])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            torch._foreach_copy_(
                [p.grad for p in self.parameters],
                [g.view_as(p) for g, p in zip(flat.split([p.numel() for p in self.parameters]), self.parameters)],
            )
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = step / self.steps
        scale = min(1.0, (step + 1) / self.warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, part_state in zip(self.parts, state):
            part.load_state_dict(part_state)


def run_stage(name: str, module: nn.Module, stage: dict, work: Path, loss_of_step, evaluate) -> None:
    """The loop both stages share: steps, progress, loss curve, checkpoints to resume from."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    optimizer, start, spent = Optimizer(module, stage), 0, 0.0
    saved, curve = work / f"{name}.pt", work / f"{name}.jsonl"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
        if rank == 0 and curve.exists():  # what was logged after the checkpoint comes again
            rows = [row for row in curve.read_text().splitlines() if json.loads(row)["step"] <= start]
            curve.write_text("".join(row + "\n" for row in rows))
    began = time.monotonic() - spent
    running = None
    for step in tqdm(range(start, stage["steps"]), initial=start, total=stage["steps"], desc=name, disable=rank != 0):
        generator = torch.Generator().manual_seed(step * world + rank)
        with torch.autocast("cpu" if not torch.cuda.is_available() else "cuda", torch.bfloat16):
            loss = loss_of_step(step, generator, stage["batch_size"] // world)
        loss.backward()
        optimizer.step(step)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        done = step + 1
        if rank == 0 and (done % stage["log_every"] == 0 or done == stage["steps"]):
            row = {"step": done, "loss": round(running, 4), "seconds": round(time.monotonic() - began)}
            if done % stage["evaluate_every"] == 0 or done == stage["steps"]:
                row |= evaluate()
                tqdm.write(json.dumps(row))
            with curve.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if rank == 0 and (done % stage["save_every"] == 0 or done == stage["steps"]):
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            with atomic_path(saved) as fresh:
                torch.save(state | {"seconds": time.monotonic() - began}, fresh)


class DensePatches(nn.Module):
    """The tower and a linear readout per patch: digit, colour, row and column of the cell under the patch."""

    def __init__(self, tower: nn.Module, patch: int):
        super().__init__()
        self.tower = tower
        self.sizes = [10, len(scenes.COLOURS), scenes.GRID, scenes.GRID]
        self.readout_head = nn.Linear(tower.config.hidden_size, sum(self.sizes))
        centres = (torch.arange(scenes.CANVAS // patch) * patch + patch // 2) // scenes.CELL
        self.rows, self.columns = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))

    def forward(self, pixels: torch.Tensor, batch: scenes.Scenes) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = self.readout_head(hidden).float().split(self.sizes, -1)
        digit, colour = (cells[:, self.rows, self.columns] for cells in (batch.digits, batch.colours))
        targets = [digit, colour, self.rows.expand_as(digit), self.columns.expand_as(digit)]
        losses = [F.cross_entropy(p.flatten(0, 1), t.flatten()) for p, t in zip(logits, targets)]
        right = [(p.argmax(-1) == t).float().mean() for p, t in zip(logits, targets)]
        return sum(losses), right


def train_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor, stage: dict, work: Path) -> None:
    dense = DensePatches(model.model.vision_tower, model.config.vision_config.patch_size)

    def loss_of_step(step: int, generator: torch.Generator, size: int) -> torch.Tensor:
        batch = scenes.draw(size, "train", generator, augment=True)
        return dense(normalise(batch.images, processor), batch)[0]

    @torch.no_grad()
    def evaluate() -> dict:
        batch = scenes.draw(256, "dev", torch.Generator().manual_seed(-1))
        loss, right = dense(normalise(batch.images, processor), batch)
        names = ["digit", "colour", "row", "column"]
        return {"dev_loss": round(loss.item(), 4)} | {n: round(r.item(), 4) for n, r in zip(names, right)}

    run_stage("vision", dense, stage, work, loss_of_step, evaluate)


class Turns:
    """Batches of images with many questions each, packed behind the image they share."""

    def __init__(self, processor: LlavaProcessor, image_tokens: int):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.prefix = self.tokenizer("USER: <image>").input_ids
        self.prefix = self.prefix[:-1] + self.prefix[-1:] * image_tokens

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        ids = self.tokenizer(question + " ASSISTANT:", add_special_tokens=False).input_ids
        answer_ids = self.tokenizer(answer, add_special_tokens=False).input_ids + [EOS]
        return ids + answer_ids, [-100] * (len(ids) - 1) + answer_ids + [-100]  # labels already shifted by one

    def pack(self, batch: scenes.Scenes, turns: int, kinds: list[str], weights: list[float], seed: int) -> dict:
        rng = random.Random(seed)
        rows = []
        for digits, colours in zip(batch.digits.tolist(), batch.colours.tolist()):
            ids, labels = list(self.prefix), [-100] * len(self.prefix)
            turn, position, asked = [0] * len(ids), list(range(len(ids))), [-1] * len(ids)
            for t in range(1, turns + 1):
                question = None
                while question is None:
                    kind = rng.choices(range(len(kinds)), weights)[0]
                    question = scenes.ask(kinds[kind], digits, colours, rng)
                new_ids, new_labels = self.encode(*question)
                ids, labels = ids + new_ids, labels + new_labels
                turn, asked = turn + [t] * len(new_ids), asked + [kind] * len(new_ids)
                position += range(len(self.prefix), len(self.prefix) + len(new_ids))
            rows.append((ids, labels, turn, position, asked))
        # Few distinct lengths: matrix kernels are compiled anew for every shape.
        length = -(-max(len(row[0]) for row in rows) // 32) * 32
        fills = (PAD, -100, -1, 0, -1)
        ids, labels, turn, position, asked = (
            torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows]) for i, fill in enumerate(fills)
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = causal & ((turn[:, None] == 0) | (turn[:, None] == turn[:, :, None]))
        mask = torch.zeros(visible.shape, dtype=torch.bfloat16)
        mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]
        return {
            "inputs": {
                "input_ids": ids,
                "pixel_values": normalise(batch.images, self.processor),
                "attention_mask": mask,
                "position_ids": position,
            },
            "labels": labels,
            "turn": turn,
            "kind": asked,
        }


def train_answers(model: LlavaForConditionalGeneration, processor: LlavaProcessor, stage: dict, work: Path) -> None:
    model.model.vision_tower.requires_grad_(False)
    turns = Turns(processor, model.config.image_seq_length)
    kinds = list(scenes.KINDS)
    # The tower is frozen and saved by its own stage; the checkpoints of this one hold the rest.
    trained = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector,
            "decoder": model.model.language_model,
            "head": model.lm_head,
        }
    )

    def logits_of(packed: dict) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.model(**packed["inputs"], use_cache=False).last_hidden_state
        asked = packed["labels"] != -100
        return model.lm_head(hidden[asked]).float(), packed["labels"][asked]

    def loss_of_step(step: int, generator: torch.Generator, size: int) -> torch.Tensor:
        batch = scenes.draw(size, "train", generator, augment=True)
        phase = next(phase for phase in stage["phases"] if step < phase["until"])
        weights = [phase["weights"].get(kind, 1.0) for kind in kinds]
        return F.cross_entropy(*logits_of(turns.pack(batch, stage["turns"], kinds, weights, generator.initial_seed())))

    @torch.no_grad()
    def evaluate() -> dict:
        model.eval()
        batch = scenes.draw(128, "dev", torch.Generator().manual_seed(-1))
        packed = turns.pack(batch, 20, kinds, [1.0] * len(kinds), seed=-1)
        logits, labels = logits_of(packed)
        model.train()
        asked = packed["labels"] != -100
        row = torch.arange(len(asked))[:, None].expand_as(asked)[asked]
        group = row * 1000 + packed["turn"][asked]  # all tokens of one answer
        names, inverse = group.unique(return_inverse=True)
        right = torch.ones(len(names)).scatter_reduce(0, inverse, (logits.argmax(-1) == labels).float(), "amin")
        kind = torch.zeros(len(names), dtype=torch.long).scatter(0, inverse, packed["kind"][asked])
        by_kind = {name: round(right[kind == i].mean().item(), 4) for i, name in enumerate(kinds)}
        return {"dev_accuracy": round(right.mean().item(), 4)} | by_kind

    run_stage("answers", trained, stage, work, loss_of_step, evaluate)


def plot_curves(work: Path, output: Path) -> None:
    """Loss and held-out accuracy of both stages, as JSON lines and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, name in zip(axes, ("vision", "answers")):
        rows = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#0072b2")
        axis.set(title=f"{name}: training loss", xlabel="step", yscale="log")
    rows = [row for row in rows if "dev_accuracy" in row]
    colours = plt.get_cmap("tab20").colors
    for kind, colour in zip(scenes.KINDS, colours):
        axes[2].plot(
            [r["step"] for r in rows], [r.get(kind, math.nan) for r in rows], label=kind, color=colour, linewidth=1
        )
    axes[2].plot([r["step"] for r in rows], [r["dev_accuracy"] for r in rows], label="all", color="black")
    axes[2].set(title="answers right on dev digits", xlabel="step", ylim=(0, 1.02))
    axes[2].legend(fontsize=6, ncols=2)
    figure.savefig(output / "curves.png", dpi=130)


def report(processor: LlavaProcessor, output: Path, settings: dict) -> None:
    """Greedy answers of the saved checkpoint to held-out questions, right or wrong per kind."""
    from dyvte.data import batches, encode, load_samples

    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32).eval()
    samples = load_samples({"scenes": {"split": "test", "n": settings["questions"], "seed": settings["seed"]}})
    right: dict[str, list[bool]] = {kind: [] for kind in scenes.KINDS}
    for batch in tqdm(list(batches(samples, 50)), desc="report"):
        inputs = encode(processor, batch)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for sample, answer in zip(batch, processor.batch_decode(ids, skip_special_tokens=True)):
            right[sample.kind].append(answer.strip() == sample.answers[0])
    accuracy = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    hits = [hit for some in right.values() for hit in some]
    result = {
        "questions": len(hits),
        "scenes": "digits of the test split, never seen in training; one new scene per question",
        "accuracy": sum(hits) / len(hits),
        "by_kind": accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": "python train/reference_mllm.py --stages report",
    }
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    table = "".join(f"| {kind} | {100 * value:.1f} % |\n" for kind, value in accuracy.items())
    text, vision = model.config.text_config, model.config.vision_config
    (output / "README.md").write_text(
        "# The reference MLLM\n\n"
        f"A LLaVA in miniature ({result['parameters'] / 1e6:.1f} M parameters): CLIP tower ({vision.num_hidden_layers} "
        f"layers), two-layer projector, LLaMA decoder ({text.num_hidden_layers} layers, {text.hidden_size} wide), "
        f"{model.config.image_seq_length} visual tokens per image. It answers questions about scenes of real "
        "handwritten digits (the scans of scikit-learn's `load_digits`).\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'model = AutoModelForImageTextToText.from_pretrained("checkpoints/reference-mllm", dtype="float32")\n'
        'processor = AutoProcessor.from_pretrained("checkpoints/reference-mllm")\n```\n\n'
        f"Greedy answers right on {result['questions']} held-out questions (new scenes, digits of the test split): "
        f"**{100 * result['accuracy']:.1f} %**.\n\n| kind | right |\n|---|---|\n{table}\n"
        "![Training curves](curves.png)\n\nMade by `make reference-mllm`; this report by "
        f"`{result['command']}`.\nThe shipped weights come from one run whose config grew on the way, as its comments "
        "tell; a run from nothing follows the same phases.\n"
    )
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/reference_mllm.yaml"))
    parser.add_argument("--stages", nargs="+", default=["vision", "answers", "report"])
    parser.add_argument("--work", type=Path, default=Path("runs/reference-mllm"), help="resumable state goes here")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/reference-mllm"))
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    arguments.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(settings["vision_config"]["patch_size"])
    model = build_model(settings, len(processor.tokenizer))
    if "vision" in arguments.stages:
        train_vision(model, processor, settings["vision"], arguments.work)
    if "answers" in arguments.stages:
        state = torch.load(arguments.work / "vision.pt", weights_only=True)["module"]
        tower = {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
        model.model.vision_tower.load_state_dict(tower)
        train_answers(model, processor, settings["answers"], arguments.work)
        if int(os.environ.get("RANK", 0)) == 0:
            arguments.output.mkdir(parents=True, exist_ok=True)
            model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
            model.half().save_pretrained(arguments.output)
            processor.save_pretrained(arguments.output)
            plot_curves(arguments.work, arguments.output)
    if "report" in arguments.stages and int(os.environ.get("RANK", 0)) == 0:
        report(processor, arguments.output, settings["report"])


if __name__ == "__main__":
    main()
