"""The command: ``python -m train.reference_mllm``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from .answers import train_answers
from .model import BOS, EOS, PAD, build_model, build_processor
from .report import plot_curves, write_report
from .settings import Settings
from .vision import load_tower, train_vision


def run(settings: Settings) -> None:
    """The stages in order, on one rank or several."""
    torch.manual_seed(settings.seed)
    settings.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(settings.vision_config["patch_size"])
    model = build_model(vars(settings), len(processor.tokenizer))
    first = not dist.is_initialized() or dist.get_rank() == 0
    if settings.stage in ("vision", None):
        train_vision(model, processor, settings.vision, settings.work)
    if settings.stage in ("answers", None):
        load_tower(model, settings.work)
        train_answers(model, processor, settings.answers, settings.work)
        if first:
            save(model, processor, settings)
    if settings.stage in ("report", None) and first:
        write_report(settings.report, settings.output)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, settings: Settings) -> None:
    """Model (float16), processor and learning curves."""
    settings.output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.half().save_pretrained(settings.output)
    processor.save_pretrained(settings.output)
    plot_curves(settings.work, settings.output)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = auto_cli(
        Settings, args=arguments, as_positional=False, default_config_files=["configs/reference_mllm.yaml"]
    )
    torch.set_num_threads(1)
    if "WORLD_SIZE" not in os.environ:
        return run(settings)
    dist.init_process_group("gloo")
    try:
        run(settings)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
