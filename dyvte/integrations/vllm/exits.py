"""Visual tokens leave vLLM's decoder, whose ``forward`` and whose layers' are overridden on the instances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from prometheus_client import Counter
from torch import nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from dyvte.integrations.vllm.rows import Rows
from dyvte.methods import LearnedExit

LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
PROMPTS = Counter("dyvte_prompts", "Prompts with visual tokens, by the layer after which these left", ["exit_layer"])
ROWS = Counter("dyvte_rows", "Token rows of decoder layers that were run, and that exits saved", ["kind"])
logger = init_logger("vllm.dyvte")


class Exits:
    """Runs a vLLM model with exits.

    Args:
        runner: a worker's model runner, after the cache was made.
        policy: decides.
        allowed: the exit layers that the model allows.

    Raises:
        ValueError: exits are not known to be right with such layers, or such attention.
    """

    def __init__(self, runner: Any, policy: LearnedExit, allowed: range):
        self.runner, self.policy, self.rows, self.common = runner, policy, None, None
        self.asked = set(allowed).intersection(policy.layers)
        self.decoder = find_decoder(runner.get_model())
        self.names = [module.layer_name for module in _attentions(self.decoder)]
        (group,) = _attention_groups(runner)
        self.build, group.build_metadata = group.build_metadata, self._build_and_keep
        self.decoder.forward = functools.partial(self._run, self.decoder.forward)
        for index, layer in enumerate(self.decoder.layers):
            layer.forward = functools.partial(self._run_layer, index, layer.forward)

    def _build_and_keep(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        self.common = common
        return self.build(common, *args, **kwargs)

    def _run(self, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = self.runner.input_batch
        if not get_forward_context().attn_metadata or batch.num_reqs == 0:  # profiling
            return forward(*args, **kwargs)
        requests = [self.runner.requests[name] for name in batch.req_ids]
        self.rows = rows = Rows(self.common, requests, batch.block_table[0].block_size, len(self.names))
        try:
            output = rows.restore(forward(*args, **kwargs))
        finally:
            self.rows = None
        if get_tp_group().rank_in_group == 0:
            self._count(rows)
        return output

    def _run_layer(
        self,
        index: int,
        forward: Callable[..., Any],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> Any:
        rows, layer = self.rows, index + self.policy.lookahead
        if rows is None:
            return forward(positions, hidden, residual)
        if index == 0:
            rows.check(hidden)
            if rows.undecided:
                admitted = self.policy.admits(rows.visual_states(hidden))
                rows.ask_on([True] * len(rows.undecided) if admitted is None else _agreed(admitted))
        elif rows.undecided and layer in self.asked:
            rows.decide(layer, _agreed(self.policy.leaves(layer, rows.text_states(hidden, residual))))
        kept = rows.withdraw(index)
        if kept is not None:
            hidden, residual = hidden[kept], residual[kept]
            rows.metadata = self.build(rows.common)
        if rows.metadata is not None:
            context, name = get_forward_context(), self.names[index]
            context.attn_metadata[name], context.slot_mapping[name] = rows.metadata, rows.common.slot_mapping
            positions = positions[..., rows.index]
        rows.run += len(hidden)
        return forward(positions, hidden, residual)

    def _count(self, rows: Rows) -> None:
        exits, total = {request.req_id: request.exit[0] for request in rows.new}, rows.start[-1] * len(self.names)
        ROWS.labels("run").inc(rows.run)
        ROWS.labels("saved").inc(total - rows.run)
        for layer in exits.values():
            PROMPTS.labels(layer).inc()
        if exits:
            logger.info("Exit layers %s of %d; %d of %d rows saved.", exits, len(self.names), total - rows.run, total)


def _agreed(verdict: torch.Tensor) -> list[bool]:
    """What the first rank says: all must take the same rows away, whatever their last bits are."""
    return get_tp_group().broadcast(verdict.int()).bool().tolist()


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns decoder layers of a known kind."""
    known = {kind.forward for kind in LAYERS}
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and {type(layer).forward for layer in layers} & known:
            return module
    raise ValueError(
        f"exits are not known to be right in {type(model).__name__}, whose decoder layers are none of "
        f"{', '.join(kind.__name__ for kind in LAYERS)}: serve another model, or this one without DYVTE_HEADS"
    )


def _attentions(decoder: nn.Module) -> list[Attention]:
    found = [module for module in decoder.modules() if isinstance(module, Attention)]
    if len(found) != len(decoder.layers) or any(module.sliding_window is not None for module in found):
        raise ValueError(
            "a window of attention would count tokens, some of which are gone: serve with --disable-sliding-window"
        )
    return found


def _attention_groups(runner: Any) -> list[Any]:
    groups = [group for part in runner.attn_groups for group in part]
    names = [group.backend.get_name() for group in groups]
    if len(groups) != 1 or names[0] not in BACKENDS or groups[0].kernel_block_size is not None:
        raise ValueError(f"exits work with one attention backend of {BACKENDS}, not {names}: --attention-backend")
    if names == ["FLASH_ATTN"]:
        logger.warning("Exits have not been tested with FLASH_ATTN: compare some answers with those of transformers.")
    return groups
