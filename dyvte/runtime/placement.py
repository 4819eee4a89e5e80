"""Layers whose weights are elsewhere until they run: sharded over ranks, or offloaded to the CPU or a disk.

A layer runs once for each group of samples, inside its own ``forward``, and ranks differ in their groups. So weights
must come and go with the layer as a whole: what its parts fetch by themselves they would fetch for every group, and
ranks that share weights would wait for each other for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def check_sharding(layers: Sequence[nn.Module]) -> None:
    """Raises ``ValueError`` if the weights of decoder layers come in parts, or on other ranks; says what to do."""
    for layer in layers:
        kind = type(layer).__name__
        if isinstance(layer, nn.Identity):
            raise ValueError(
                "pipeline parallelism leaves decoder layers on other ranks, which would not know what was decided on "
                "this one: use tensor parallelism, or shard the layers (FSDP2, ZeRO-3)"
            )
        if any(hasattr(p, "ds_id") for p in layer.parameters()) and not getattr(layer, "_z3_leaf", False):
            raise ValueError(
                f"ZeRO-3 gathers the parts of {kind} one by one, and ranks whose samples leave at different layers "
                f"would wait for each other: call deepspeed.utils.set_z3_leaf_modules(model, [{kind}]) before "
                "deepspeed.initialize"
            )
        if any(hasattr(module, "_fsdp_wrapped_module") for module in layer.modules()):
            raise ValueError(
                f"{kind} is wrapped by FullyShardedDataParallel, which gathers weights inside forward: shard the "
                "decoder layers with torch.distributed.fsdp.fully_shard instead"
            )
        if any(module is not layer and _fully_sharded(module) for module in layer.modules()):
            raise ValueError(
                f"parts of {kind} are sharded by themselves, and ranks whose samples leave at different layers would "
                "wait for each other: call fully_shard on the decoder layers only"
            )


def _fully_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was never imported nothing is sharded by it
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


@contextmanager
def loaded(layer: nn.Module, calls: int) -> Iterator[None]:
    """Keeps weights that accelerate has offloaded with their parts of a layer while it is called several times."""
    with ExitStack() as stack:
        if calls > 1:
            for module in layer.modules():
                if module is not layer:  # its own are there while its forward runs
                    for hook in _offloads(vars(module).get("_hf_hook")):
                        hook.pre_forward(module)
                        hook.offload = False
                        stack.callback(_offload, hook, module)
        yield


def _offload(hook: Any, module: nn.Module) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _offloads(hook: Any) -> list[Any]:
    """The hooks among those of a module that fetch its weights."""
    if hook is None:
        return []
    return [part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False) is True]
