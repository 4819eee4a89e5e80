"""Visual tokens leave vLLM's decoder, whose ``forward`` and whose layers' are overridden on the instances."""

from __future__ import annotations

import functools
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
PROMPTS = Counter("dyvte_prompts", "Prompts with visual tokens, by the layer after which these left", ["exit_layer"])
ROWS = Counter("dyvte_rows", "Token rows of decoder layers that were run, and that exits saved", ["kind"])
logger = init_logger("vllm.dyvte")


class Exits:
    """Runs the model of a worker's runner, whose cache was made, with exits.

    Args:
        allowed: the exit layers that the model allows.

    Raises:
        ValueError: exits are not known to be right with such layers, or such attention.
    """

    def __init__(self, runner: Any, policy: LearnedExit, allowed: range):
        self.runner, self.policy, self.rows, self.common = runner, policy, None, None
        self.asked = set(allowed).intersection(policy.layers)
        decoder, group = find_decoder(runner.get_model()), find_attention(runner)
        self.names = [module.layer_name for module in decoder.modules() if isinstance(module, Attention)]
        self.build, group.build_metadata = group.build_metadata, self._build
        decoder.forward = functools.partial(self._run, decoder.forward)
        for index, layer in enumerate(decoder.layers):
            layer.forward = functools.partial(self._run_layer, index, layer.forward)

    def _build(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        self.common = common
        return self.build(common, *args, **kwargs)

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
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
            exits, total = {one.req_id: one.exit[0] for one in rows.new}, rows.start[-1] * len(self.names)
            ROWS.labels("run").inc(rows.run)
            ROWS.labels("saved").inc(total - rows.run)
            for layer in exits.values():
                PROMPTS.labels(layer).inc()
            if exits:
                saved = total - rows.run
                logger.info("Exit layers %s of %d; %d of %d rows saved.", exits, len(self.names), saved, total)
        return output

    def _run_layer(self, index: int, forward: Any, positions: Any, hidden: Any, residual: Any) -> Any:
        rows, layer = self.rows, index + self.policy.lookahead
        if rows is None:
            return forward(positions, hidden, residual)
        if index == 0 and len(hidden) != len(rows.index):
            raise RuntimeError(
                f"the decoder got {len(hidden)} rows for {len(rows.index)} tokens: exits know no padding"
            )
        if index == 0 and rows.undecided:
            admitted = self.policy.admits(rows.visual_states(hidden))
            rows.ask_on([True] * len(rows.undecided) if admitted is None else _agreed(admitted))
        elif rows.undecided and layer in self.asked:
            rows.decide(layer, _agreed(self.policy.leaves(layer, rows.text_states(hidden, residual))))
        kept = rows.withdraw(index)
        if kept is not None:
            hidden, residual, rows.metadata = hidden[kept], residual[kept], self.build(rows.common)
        if rows.metadata is not None:
            context, name = get_forward_context(), self.names[index]
            context.attn_metadata[name], context.slot_mapping[name] = rows.metadata, rows.common.slot_mapping
            positions = positions[..., rows.index]
        rows.run += len(hidden)
        return forward(positions, hidden, residual)


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


def find_attention(runner: Any) -> Any:
    """The one group of layers that share a cache, and a builder of what their attention is told."""
    groups = [group for part in runner.attn_groups for group in part]
    windows = getattr(groups[0].kv_cache_spec, "sliding_window", None)
    names = [group.backend.get_name() for group in groups]
    if len(groups) != 1 or windows or groups[0].kernel_block_size or names[0] not in ("CPU_ATTN", "FLASH_ATTN"):
        raise ValueError(
            f"exits need attention over all tokens by CPU_ATTN or FLASH_ATTN alone, not {names} with window {windows}: "
            "serve with --attention-backend FLASH_ATTN, --disable-sliding-window, or without DYVTE_HEADS"
        )
    if names == ["FLASH_ATTN"]:
        logger.warning("Exits have not been tested with FLASH_ATTN: compare some answers with those of transformers.")
    return groups[0]
