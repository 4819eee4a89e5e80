"""The token rows of one step of vLLM, prompts and decoding requests one after the other, and what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from dyvte.runtime.prompt import Prompt, TextReader
from dyvte.runtime.tokens import KeptTokens


class Rows:
    """Which rows a layer works on.

    A request carries its decision, (exit layer, tokens withdrawn), as ``exit``, also through preemption, after which
    vLLM runs prompt and answer again.

    Args:
        common: vLLM's CommonAttentionMetadata of the whole batch.
        requests: vLLM's CachedRequestState of each request, in the order of their rows.
        block_size: slots of a cache block.
        num_layers: of the decoder.

    Attributes:
        common: the batch as attention sees it, ``metadata`` what the builder makes of it once a token is gone.
        index: long [rows left], which rows of the whole batch they are.
        new: the requests whose prompts with visual tokens run for the first time.
        undecided: prompts of those that may still leave, by place among the requests.
        run: rows that layers have worked on.
    """

    def __init__(self, common: Any, requests: Sequence[Any], block_size: int, num_layers: int):
        self.batch = self.common = common
        self.requests, self.block_size, self.run, self.metadata = requests, block_size, 0, None
        self.start = common.query_start_loc_cpu.tolist()
        self.lengths = common.seq_lens_cpu_upper_bound.tolist()  # exact without speculative decoding
        self.widths = [end - begin for begin, end in pairwise(self.start)]
        self.new, self.undecided, self._reader = [], {}, None
        visual, tail = torch.zeros(2, self.start[-1], dtype=torch.bool)
        for place, (request, begin, width) in enumerate(zip(requests, self.start, self.widths)):
            whole = width == self.lengths[place]
            if not whole and width > 1:
                raise RuntimeError("exits met a part of a prompt, although chunked prefill is off")
            if not whole or not (mask := visual_tokens(request, width)).any():
                continue
            visual[begin : begin + width] = mask
            if not hasattr(request, "exit"):
                request.exit = num_layers, 0
                self.new.append(request)
                prompt = Prompt.from_masks(mask[None], torch.ones_like(mask)[None])
                # Logits of the prompt's own tokens, if asked for, are those of the whole model.
                if prompt.can_leave.item() and request.sampling_params.prompt_logprobs is None:
                    tail[begin + prompt.tail.index[0]] = True
                    self.undecided[place] = prompt
        device = common.query_start_loc.device
        self.visual, self.tail = visual.to(device), tail.to(device)
        self.owner = torch.arange(len(requests)).repeat_interleave(torch.tensor(self.widths)).to(device)
        self.index = torch.arange(self.start[-1], device=device)

    def visual_states(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mean visual token of each undecided prompt as they enter the decoder: float32 [n, d]."""
        parts = {place: hidden[self.start[place] : self.start[place + 1]] for place in self.undecided}
        return torch.cat([prompt.visual_state(parts[place][None]) for place, prompt in self.undecided.items()])

    def text_states(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The text state of each undecided prompt: float32 [n, 2 * d]."""
        if self._reader is None:
            places = torch.tensor([*self.undecided], device=self.owner.device)
            owned = (self.owner[self.index] == places[:, None]) & self.tail[self.index]
            rows = owned.any(0).nonzero()[:, 0]
            tail = KeptTokens.from_mask(owned[:, rows])
            self._reader = rows, TextReader(tail, torch.zeros_like(places), len(rows), whole=len(places) == 1)
        rows, read = self._reader
        return read((hidden[rows] + residual[rows])[None])

    def ask_on(self, may_leave: Sequence[bool]) -> None:
        """Who of the undecided is asked again."""
        self.undecided = {place: self.undecided[place] for place, may in zip(self.undecided, may_leave) if may}
        self._reader = None

    def decide(self, layer: int, leaves: Sequence[bool]) -> None:
        """Who of the undecided leaves at exit layer ``layer``."""
        for (place, prompt), does in zip(self.undecided.items(), leaves):
            if does:
                self.requests[place].exit = layer, int(prompt.visual.sum())
        if any(leaves):
            self.ask_on([not does for does in leaves])

    def withdraw(self, layer: int) -> torch.Tensor | None:
        """Takes away what leaves before decoder layer ``layer`` (from 0): which of the rows stay, None for all."""
        exits = [getattr(request, "exit", (0, 0)) for request in self.requests]
        if not any(at == layer and tokens for at, tokens in exits):
            return None
        gone = [tokens if at <= layer else 0 for at, tokens in exits]
        left, device = torch.tensor(gone, device=self.owner.device).bool(), self.owner.device
        kept = (~(self.visual & left[self.owner])[self.index]).nonzero()[:, 0]
        self.index, self._reader = self.index[kept], None
        # A layer's cache holds what the layer has seen, one token after the other in the request's own blocks.
        batch, owner = self.batch, self.owner[self.index]
        widths = [w - g if w > 1 else w for w, g in zip(self.widths, gone)]  # who decodes left before
        start = torch.tensor([0, *accumulate(widths)], dtype=batch.query_start_loc_cpu.dtype)
        lengths = torch.tensor(self.lengths, dtype=batch.seq_lens_cpu_upper_bound.dtype) - torch.tensor(gone)
        place = torch.arange(len(owner), device=device) + (lengths - start[1:]).to(device)[owner]
        blocks = batch.block_table_tensor[owner, place // self.block_size].long()
        self.common = batch.replace(
            query_start_loc=start.to(device),
            query_start_loc_cpu=start,
            seq_lens=lengths.to(device, batch.seq_lens.dtype),
            seq_lens_cpu_upper_bound=lengths.to(batch.seq_lens_cpu_upper_bound.dtype),
            num_actual_tokens=len(owner),
            max_query_len=max(widths),
            max_seq_len=int(lengths.max()),
            slot_mapping=(blocks * self.block_size + place % self.block_size).to(batch.slot_mapping.dtype),
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return kept

    def restore(self, output: torch.Tensor) -> torch.Tensor:
        """The decoder's output for all rows, zeros where they were withdrawn."""
        if self.metadata is None:
            return output
        return output.new_zeros(self.start[-1], output.shape[-1]).index_copy_(0, self.index, output)


def visual_tokens(request: Any, width: int) -> torch.Tensor:
    """Which of a request's first ``width`` tokens are visual: bool [width]."""
    mask = torch.zeros(width, dtype=torch.bool)
    for feature in request.mm_features:
        at = feature.mm_position
        if feature.modality in ("image", "video"):
            mask[at.offset : at.offset + at.length] = True if at.is_embed is None else at.is_embed
    return mask
