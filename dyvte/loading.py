"""The frozen MLLM of a run, laid over the ranks as its config says."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from dyvte.config import ModelConfig
from dyvte.heads import ExitHeads
from dyvte.ranks import Ranks
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.locate import underlying_model
from dyvte.runtime.placement import shared_by_ranks

Sharing = Literal["none", "weights", "work"]


@dataclass
class Mllm:
    """A model with all that tracing needs to know about it.

    Attributes:
        model: ready for inference.
        processor: of its images and texts.
        visual_mask, decoder: as in :func:`dyvte.attach`, for models of other code bases.
        engine: of DeepSpeed, whose hooks gather the model's weights.
    """

    model: nn.Module
    processor: Any
    visual_mask: VisualMask | None = None
    decoder: str | nn.Module | None = None
    engine: Any = None


def load_mllm(config: ModelConfig, ranks: Ranks | None = None) -> Mllm:
    """Loads the model of a config; ranks that share its weights must call this together.

    Raises:
        ValueError: settings that do not go together, a loader that is not there, or a model that cannot be loaded.
    """
    ranks = Ranks() if ranks is None else ranks
    _check(config, ranks)
    if config.threads:
        torch.set_num_threads(config.threads)
    mllm = _by_loader(config) if config.loader else _by_transformers(config, ranks)
    if config.adapter:
        from peft import PeftModel

        with loading(config.adapter, "adapter"):
            mllm.model = PeftModel.from_pretrained(mllm.model, config.adapter)
    mllm.model.eval().requires_grad_(False)
    if config.shard == "fsdp2":
        _shard_layers(mllm, ranks)
    elif config.shard == "zero3":
        _partition(mllm)
    elif config.shard == "none" and not _is_placed(mllm.model):
        mllm.model.to(ranks.device)
    return mllm


def load_heads(name: str) -> ExitHeads:
    """Exit heads from a folder or the hub.

    Raises:
        ValueError: there are none that are whole.
    """
    with loading(name, "heads"):
        return ExitHeads.from_pretrained(name)


@contextmanager
def loading(name: str, key: str) -> Iterator[None]:
    """Turns whatever libraries make of a wrong folder or hub id into a ``ValueError`` with fault and remedy.

    Args:
        name: the folder or hub id.
        key: what it was given as.
    """
    try:
        yield
    except Exception as error:  # each library on the way has kinds of its own, all of which mean: not such a thing
        if "trust_remote_code" in str(error):
            remedy = "it brings code of its own: read it, and set trust_remote_code=true to run it"
        elif Path(name).exists():
            remedy = "it must be a folder with a config, weights and all else that belongs to them, each as a whole"
        elif os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
            remedy = "there is no such folder, and the hub is switched off (HF_HUB_OFFLINE): give a folder"
        else:
            remedy = "give a folder that is there, or the id of something on the hub that can be reached"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}={name} cannot be loaded ({reason}); {remedy}") from error


def load_empty(config: ModelConfig) -> nn.Module:
    """The model of a config without its weights: everything about it but what it computes.

    Raises:
        ValueError: it cannot be found, or is not of transformers.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    with loading(config.model, "model"):
        described = AutoConfig.from_pretrained(config.model, **_source(config))
        dtype = {} if config.dtype == "auto" else {"dtype": getattr(torch, config.dtype)}
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                described, trust_remote_code=config.trust_remote_code, **dtype
            )


def needs_group(config: ModelConfig) -> bool:
    """Whether the model is laid over a process group even where it has one rank alone."""
    return config.shard in ("zero3", "fsdp2", "tp")


def sharing(model: nn.Module) -> Sharing:
    """What ranks have in common that run this model.

    Returns:
        none: nothing, each works alone. weights: each has batches of its own, but all must call the model equally
        often (FSDP2, ZeRO-3). work: all get the same batches (tensor parallel).
    """
    model = underlying_model(model)
    if shared_by_ranks(model):
        return "weights"
    return "work" if any(hasattr(weight, "full_tensor") for weight in model.parameters()) else "none"


def _check(config: ModelConfig, ranks: Ranks) -> None:
    if config.shard == "device_map" and ranks.world_size > 1:
        raise ValueError(
            f"shard=device_map gives all GPUs to one process, and there are {ranks.world_size}: start one, or use "
            "shard=fsdp2"
        )
    if config.loader and config.shard in ("tp", "device_map"):
        raise ValueError(
            f"shard={config.shard} is done by transformers while it loads, so not with a loader: use none, fsdp2 or "
            "zero3, or have the loader do it"
        )
    if config.quantization is not None and (config.loader or config.shard not in ("none", "device_map")):
        other = "a loader, which may quantise by itself" if config.loader else f"shard={config.shard}"
        raise ValueError(f"quantization does not go together with {other}: use shard=none or device_map without one")


def _by_loader(config: ModelConfig) -> Mllm:
    name, colon, attribute = str(config.loader).partition(":")
    if not colon:
        raise ValueError(f"loader must be package.module:function, not {config.loader!r}")
    try:
        load = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"there is no loader {config.loader}: {error}. Install its code base, or put it on PYTHONPATH"
        ) from error
    loaded = load(config)
    if not isinstance(loaded, tuple) or len(loaded) != 4 or not isinstance(loaded[0], nn.Module):
        raise ValueError(f"{config.loader} must return (model, processor, visual_mask, decoder)")
    return Mllm(*loaded)


def _by_transformers(config: ModelConfig, ranks: Ranks) -> Mllm:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    chosen: dict[str, Any] = {"dtype": config.dtype}
    if config.attention:
        chosen["attn_implementation"] = config.attention
    if config.quantization is not None:
        chosen["quantization_config"] = _quantization(config.quantization)
    if config.shard == "tp":
        chosen |= _tensor_parallel()
    elif config.shard == "device_map":
        chosen["device_map"] = "auto"
    elif config.shard == "none" and ranks.device.type != "cpu":
        chosen["device_map"] = {"": ranks.device}  # read into place, which quantised weights need
    with loading(config.model, "model"):
        processor = AutoProcessor.from_pretrained(config.model, **_source(config))
        model, info = AutoModelForImageTextToText.from_pretrained(
            config.model, output_loading_info=True, **_source(config), **chosen
        )
        # transformers would go on with random weights in their place.
        missing = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        if missing and not getattr(model, "is_quantized", False):
            raise ValueError(f"its weights lack {len(missing)} tensors that its config asks for, such as {missing[0]}")
    return Mllm(model, processor)


def _source(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}


def _quantization(settings: dict[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"unknown quantization settings {', '.join(unknown)}: those of transformers.BitsAndBytesConfig are "
            f"{', '.join(sorted(known))}"
        )
    return BitsAndBytesConfig(**settings)


def _tensor_parallel() -> dict[str, Any]:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:  # before 5.0
        return {"tp_plan": "auto"}
    if "tp_plan" not in inspect.signature(DistributedConfig).parameters:
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _is_placed(model: nn.Module) -> bool:
    return getattr(underlying_model(model), "hf_device_map", None) is not None


def _shard_layers(mllm: Mllm, ranks: Ranks) -> None:
    """FSDP2: the decoder layers as wholes, gathered while they run; all else is on every rank."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in DecoderSpec.of(mllm.model, mllm.decoder).layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    mllm.model.to(ranks.device)


def _partition(mllm: Mllm) -> None:
    """ZeRO-3: all weights, gathered layer by layer."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("shard=zero3 needs DeepSpeed: pip install 'dyvte[deepspeed]', or use shard=fsdp2") from error
    kinds = {type(layer) for layer in DecoderSpec.of(mllm.model, mllm.decoder).layers}
    deepspeed.utils.set_z3_leaf_modules(mllm.model, list(kinds))
    dtype = next(weight.dtype for weight in mllm.model.parameters() if weight.is_floating_point())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # else small weights stay whole
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    mllm.engine = deepspeed.initialize(model=mllm.model, config=settings)[0]
    mllm.engine.eval()
    mllm.model = mllm.engine.module
