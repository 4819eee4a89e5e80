"""One rank of a sharded model: runs the jobs and writes down what came out. Started by test_sharded.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import tiny_llava
from sharded_jobs import JOBS

import dyvte

Sharded = tuple[Any, Callable[[], bool], dict[str, Any]]  # the model, whether it is sharded now, what else was seen


class Gathers:
    """Counts gathers of weights, and their bytes."""

    def __init__(self):
        self.calls = self.bytes = 0
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):
                setattr(dist, name, functools.partial(self._gather, getattr(dist, name)))

    def _gather(self, gather: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = args[0] if args else kwargs["output_tensor"]
        self.calls += 1
        self.bytes += output.numel() * output.element_size()
        return gather(*args, **kwargs)

    def take(self) -> dict[str, int]:
        found = {"gathers": self.calls, "bytes": self.bytes}
        self.calls = self.bytes = 0
        return found


def refusal(attempt: Callable[[], Any]) -> str:
    """What a ``ValueError`` says; empty if there is none."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def fsdp(folder: Path) -> Sharded:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, in_parts, wrapped = tiny_llava(), tiny_llava(), tiny_llava()
    layers = model.get_decoder().layers
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(in_parts.get_decoder().layers[1].mlp)
    wrapped.get_decoder().layers[1] = FullyShardedDataParallel(
        wrapped.get_decoder().layers[1], device_id=torch.device("cpu")
    )
    heads = dyvte.ExitHeads.from_pretrained(folder / "heads")
    fully_shard(heads)
    seen = {
        "parts": refusal(lambda: dyvte.attach(in_parts, dyvte.FixedExit(2))),
        "wrapped": refusal(lambda: dyvte.attach(wrapped, dyvte.FixedExit(2))),
        "heads": refusal(lambda: dyvte.attach(model, dyvte.LearnedExit(heads))),
    }
    return model, lambda: all(isinstance(p, dist.tensor.DTensor) for p in layers.parameters()), seen


def zero3(folder: Path) -> Sharded:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else small weights stay on every rank
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    in_parts, model = tiny_llava(), tiny_llava()
    deepspeed.initialize(model=in_parts, config=settings)
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.get_decoder().layers[0])])
    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.eval()

    alive = HfDeepSpeedConfig(settings)  # as the scripts of transformers keep one, for generate()
    heads = dyvte.ExitHeads.from_pretrained(folder / "heads")
    with deepspeed.zero.Init(config_dict_or_path=settings):
        partitioned = dyvte.ExitHeads(heads.config)
    seen = {
        "parts": refusal(lambda: dyvte.attach(in_parts, dyvte.FixedExit(2))),
        "heads": refusal(lambda: dyvte.attach(engine, dyvte.LearnedExit(partitioned))),
        "loaded": heads.state_dict(),
        "alive": is_deepspeed_zero3_enabled(),
        "model bytes": sum(p.ds_numel * p.element_size() for p in model.parameters()),
    }
    del alive
    return engine, lambda: all(p.numel() == 0 for p in model.parameters()), seen


def tensor_parallel(folder: Path) -> Sharded:
    model = type(tiny_llava()).from_pretrained(folder / "model", tp_plan="auto").eval()
    model.generation_config.eos_token_id = None
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    return model, lambda: weight.to_local().shape[0] < weight.shape[0], {}


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    gathers = Gathers()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, sharded, seen = {"fsdp": fsdp, "zero3": zero3, "tensor_parallel": tensor_parallel}[kind](folder)
    jobs: dict[str, dict[str, Any]] = {}
    for name, job in JOBS.items():
        gathers.take()
        result = job(model, 0 if kind == "tensor_parallel" else rank)  # one batch for all ranks of a tensor
        jobs[name] = {"result": result, "sharded": sharded()} | gathers.take()
    torch.save({"jobs": jobs, "seen": seen}, folder / f"{kind}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
