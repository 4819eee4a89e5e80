"""What commands work on: the MLLM with its processor, exit heads, samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dyvte.config import ModelConfig
from dyvte.data import load_samples, read_config
from dyvte.data.samples import Source
from dyvte.heads import ExitHeads


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def load_data(data: str | Mapping[str, Any]) -> tuple[dict[str, Any], Source]:
    """A data config and its samples.

    Raises:
        ValueError: it is wrong, or there are none.
    """
    config = read_config(data)
    return config, load_samples(config)


def load_model(config: ModelConfig) -> tuple[Any, Any]:
    """The MLLM, ready for inference, and its processor.

    Raises:
        ValueError: there is no such device, or no such model that is whole.
    """
    device = chosen_device(config.device)
    set_threads(config.threads)
    chosen = {"attn_implementation": config.attention} if config.attention else {}
    source = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    with loading(config.model, "model"):
        processor = AutoProcessor.from_pretrained(config.model, **source)
        model, info = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=config.dtype, output_loading_info=True, **source, **chosen
        )
        missing = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        if missing:
            raise ValueError(f"its weights lack {len(missing)} tensors that its config asks for, such as {missing[0]}")
        return model.eval().to(device), processor


def chosen_device(device: str) -> torch.device:
    """The device that a config names.

    Raises:
        ValueError: there is none.
    """
    if device == "auto":
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:1 ... or auto, not {device!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs: choose another, "
            "device=cpu, or a build of torch for this machine's GPUs"
        )
    return chosen


@contextmanager
def loading(name: str, key: str) -> Iterator[None]:
    """Turns whatever transformers makes of a wrong folder or hub id into fault and remedy.

    Args:
        name: the folder or hub id.
        key: what it was given as.
    """
    try:
        yield
    except Exception as error:  # each library on the way has kinds of its own, all of which mean: not such a model
        if Path(name).exists():
            remedy = "it must hold the config, the weights and the processor, each as a whole"
        elif os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
            remedy = "there is no such folder, and the hub is switched off (HF_HUB_OFFLINE): give a folder"
        else:
            remedy = "give a folder that is there, or the id of a model on the hub that can be reached"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}={name} cannot be loaded ({reason}); {remedy}") from error


def load_heads(name: str) -> ExitHeads:
    """Exit heads from a folder or the hub.

    Raises:
        ValueError: there are none that are whole.
    """
    with loading(name, "heads"):
        return ExitHeads.from_pretrained(name)
