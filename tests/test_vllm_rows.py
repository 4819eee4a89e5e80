"""Rows of a vLLM step after exits: those, and those places in the cache, that the tokens' own order gives."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dyvte.integrations.vllm.rows import Rows

BLOCK, LAYERS = 4, 6


@dataclasses.dataclass
class Common:
    """What vLLM says of a batch, as far as rows need it."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    num_actual_tokens: int = 0
    max_query_len: int = 0
    max_seq_len: int = 0
    positions: torch.Tensor | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None
    _token_to_req_indices_cache: torch.Tensor | None = None

    replace = dataclasses.replace


def step(*requests, blocks=8):
    """A step of requests (width, length): each has blocks of its own, in no particular order."""
    widths, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*requests))
    start = torch.cat([torch.zeros(1, dtype=torch.int32), widths.cumsum(0).int()])
    order = torch.randperm(len(requests) * blocks, generator=torch.Generator().manual_seed(1)).int()
    slots = torch.zeros(int(start[-1]), dtype=torch.int64)
    return Common(start, start, lengths, lengths, order.view(len(requests), blocks), slots)


def request(*images, exit=None, prompt_logprobs=None):
    """A request with images at (offset, length, which of these are visual or None)."""
    features = [
        SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=o, length=n, is_embed=e))
        for o, n, e in images
    ]
    made = SimpleNamespace(
        req_id="0", mm_features=features, sampling_params=SimpleNamespace(prompt_logprobs=prompt_logprobs)
    )
    if exit is not None:
        made.exit = exit
    return made


def slots(common, place, positions):
    return [int(common.block_table_tensor[place, p // BLOCK]) * BLOCK + p % BLOCK for p in positions]


def test_a_mixed_step_goes_on_with_what_is_left():
    """A prompt that leaves now, one that decodes after its exit, one that decodes dense, one of text."""
    common = step((9, 9), (1, 12), (1, 7), (3, 3))
    requests = [request((2, 4, None)), request(exit=(2, 5)), request(exit=(LAYERS, 0)), request()]
    rows = Rows(common, requests, BLOCK, LAYERS)
    assert [*rows.undecided] == [0] and rows.new == requests[:1]
    assert rows.withdraw(1) is None
    assert rows.withdraw(2).tolist() == [*range(14)]  # the second request's cache is shorter from here on
    assert rows.common.seq_lens.tolist() == [9, 7, 7, 3]
    rows.decide(3, [True])
    assert requests[0].exit == (3, 4) and not rows.undecided
    kept = rows.withdraw(3)
    assert kept.tolist() == rows.index.tolist() == [0, 1, 6, 7, 8, *range(9, 14)]
    made = rows.common
    assert made.query_start_loc.tolist() == made.query_start_loc_cpu.tolist() == [0, 5, 6, 7, 10]
    assert made.seq_lens.tolist() == made.seq_lens_cpu_upper_bound.tolist() == [5, 7, 7, 3]
    assert (made.num_actual_tokens, made.max_query_len, made.max_seq_len) == (10, 5, 7)
    places = [(0, range(5)), (1, [6]), (2, [6]), (3, range(3))]
    assert made.slot_mapping.tolist() == [slot for place, at in places for slot in slots(common, place, at)]
    rows.metadata = "made"
    output = rows.restore(torch.arange(1.0, 11)[:, None])
    assert output[:, 0].tolist() == [1, 2, 0, 0, 0, 0, *range(3, 11)]


def test_a_prompt_that_was_preempted_leaves_where_it_left():
    common = step((11, 11))
    again = request((2, 4, None), exit=(3, 4))
    rows = Rows(common, [again], BLOCK, LAYERS)
    assert not rows.undecided and not rows.new
    assert rows.withdraw(3).tolist() == [0, 1, 6, 7, 8, 9, 10] and rows.common.seq_lens.tolist() == [7]


def test_text_states_are_those_of_each_prompt():
    generator = torch.Generator().manual_seed(2)
    common = step((7, 7), (1, 5), (6, 6))
    requests = [request((1, 3, None)), request(), request((0, 4, torch.tensor([True, False, True, False])))]
    rows = Rows(common, requests, BLOCK, LAYERS)
    hidden, residual = torch.randn(2, 14, 8, generator=generator)
    full = hidden + residual
    expected = [torch.cat([full[4:6].mean(0), full[6]]), torch.cat([full[11:13].mean(0), full[13]])]
    torch.testing.assert_close(rows.text_states(hidden, residual), torch.stack(expected))
    means = [hidden[1:4].mean(0), hidden[[8, 10]].mean(0)]
    torch.testing.assert_close(rows.visual_states(hidden), torch.stack(means))
    rows.decide(2, [True, False])
    kept = rows.withdraw(2)
    torch.testing.assert_close(rows.text_states(hidden[kept], residual[kept]), expected[1][None])


@pytest.mark.parametrize(
    "made",
    [request(), request((2, 3, None)), request((0, 3, None), prompt_logprobs=1)],
    ids=["text", "end", "logprobs"],
)
def test_some_prompts_are_never_asked_about(made):
    assert not Rows(step((5, 5)), [made], BLOCK, LAYERS).undecided


def test_a_part_of_a_prompt_raises():
    with pytest.raises(RuntimeError, match="part of a prompt"):
        Rows(step((3, 9)), [request((0, 2, None))], BLOCK, LAYERS)
