"""EAS: the adapter against sums written out, its folding against the unfolded layer, the search against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dyvte.methods import eas

WIDTH, HIDDEN = 12, 8


@pytest.fixture(params=[False, True], ids=["skipped", "kept"])
def adapter(request) -> eas.Adapter:
    torch.manual_seed(0)
    adapter = eas.Adapter(WIDTH, HIDDEN, temperature=2, scale=0.7, kept=request.param).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


def written_out(adapter: eas.Adapter, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """One sample, token by token: x [s, width], ``prompt`` what is averaged."""

    def linear(conv, vector):  # two groups: each half of the output reads its half of the input
        half, rows = len(vector) // conv.groups, conv.out_channels // conv.groups
        out = [
            sum(conv.weight[o, i, 0] * vector[o // rows * half + i] for i in range(half)) + conv.bias[o]
            for o in range(conv.out_channels)
        ]
        return torch.stack(out)

    mean = sum(prompt) / len(prompt)
    first, second = ((adapter.expert_weights.weight @ mean + adapter.expert_weights.bias) / 2).exp()
    first, second = first / (first + second), second / (first + second)
    rows = []
    for token in x:
        if adapter.kept:
            u = linear(adapter.conv_A, token)
        else:
            pooled = sum(linear(adapter.conv_A, other) for other in prompt) / len(prompt)
            u = 0.5 * (pooled + linear(adapter.conv_C, token))
        rows.append(token + 0.7 * (first * linear(adapter.conv_B, u) + second * linear(adapter.conv_D, u)))
    return torch.stack(rows)


def test_forward_is_the_sum_written_out(adapter):
    x = torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    out = adapter(x, mask)
    for sample in range(2):
        torch.testing.assert_close(out[sample], written_out(adapter, x[sample], x[sample][mask[sample]]))
    torch.testing.assert_close(adapter(x)[1], written_out(adapter, x[1], x[1]))
    later = torch.randn(2, 3, WIDTH)
    decoded = adapter(later, context=adapter.context(x, mask))
    torch.testing.assert_close(decoded[1], written_out(adapter, later[1], x[1][mask[1]]))


def test_an_adapter_starts_as_the_identity_and_counts_no_padding(adapter):
    fresh = eas.Adapter(WIDTH, HIDDEN, kept=adapter.kept)
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(fresh(x), x)
    mask = torch.tensor([[False, False, True, True, True]] * 2)
    padded = torch.where(mask[..., None], x, 1e3)
    torch.testing.assert_close(adapter(padded, mask)[:, 2:], adapter(x[:, 2:]))
    with pytest.raises(ValueError, match="groups"):
        eas.Adapter(9, HIDDEN)


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, gain.shape) * gain


def test_a_folded_layer_equals_the_unfolded_one():
    """The layer without attention, prompt and decoded tokens, gated MLP with biases, for several samples at once."""
    torch.manual_seed(0)
    adapter = eas.Adapter(WIDTH, HIDDEN, temperature=2, scale=0.7).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    input_gain, gain = torch.rand(WIDTH) + 0.5, torch.rand(WIDTH) + 0.5
    gate, up, down = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
    x, later = torch.randn(3, 6, WIDTH), torch.randn(3, 2, WIDTH)
    context = adapter.context(rms_norm(x, input_gain))
    before = gate.weight.clone()
    (gate_weight, gate_bias), (up_weight, up_bias) = (
        adapter.fold(linear.weight, context, gain, linear.bias) for linear in (gate, up)
    )
    for hidden in (x, later):
        normed = rms_norm(hidden, input_gain)
        scaled = adapter(normed, context=context) * gain
        unfolded = hidden + down(F.silu(gate(scaled)) * up(scaled))
        folded = [
            row + down(F.silu(F.linear(n, gate_weight[i], gate_bias[i])) * F.linear(n, up_weight[i], up_bias[i]))
            for i, (row, n) in enumerate(zip(hidden, normed))
        ]
        torch.testing.assert_close(torch.stack(folded), unfolded, atol=1e-5, rtol=1e-5)
    assert torch.equal(gate.weight, before)


def test_a_projection_after_either_adapter_folds_without_a_gain(adapter):
    x, query = torch.randn(2, 5, WIDTH), nn.Linear(WIDTH, 6, bias=False)
    weight, bias = adapter.fold(query.weight, adapter.context(x))
    folded = torch.einsum("nsc,noc->nso", x, weight) + bias[:, None]
    torch.testing.assert_close(folded, query(adapter(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probability", [torch.sigmoid, eas.sharp_softmax])
def test_update_scores_is_the_bandits_step(probability):
    torch.manual_seed(0)
    scores = torch.randn(7) / 10
    sampled = torch.tensor([[0, 2, 5], [1, 2, 3], [2, 5, 6]])
    losses = [0.9, 0.2, 1.4]
    rewards = [math.exp(-loss) for loss in losses]
    p = probability(scores).tolist()
    expected = scores.tolist()
    for layers, reward in zip(sampled.tolist(), rewards):
        for layer in layers:
            expected[layer] += 2.0 * (reward - sum(rewards) / 3) * p[layer] * (1 - p[layer])
    before = scores.clone()
    torch.testing.assert_close(eas.update_scores(scores, sampled, losses, 2.0, probability), torch.tensor(expected))
    updated = eas.update_scores(scores, sampled.tolist(), torch.tensor(losses), 2.0, probability)
    torch.testing.assert_close(updated, torch.tensor(expected))
    assert torch.equal(scores, before)
    with pytest.raises(ValueError):
        eas.update_scores(scores, sampled, losses[:2], 2.0)


def test_sampled_sets_differ_and_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    sets = eas.sample_layers(torch.zeros(5), 2, sets=10, generator=generator)
    assert sorted(map(tuple, sets.tolist())) == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    scores = torch.tensor([-9.0, 9, -9, 9, -9])
    drawn = torch.cat([eas.sample_layers(scores, 2, generator=generator) for _ in range(200)])
    assert (drawn == torch.tensor([1, 3])).all(1).float().mean() > 0.95
    again = [eas.sample_layers(scores, 3, 2, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)
    for count, number in ((2, 11), (6, 1), (0, 1)):
        with pytest.raises(ValueError, match="different sets"):
            eas.sample_layers(torch.zeros(5), count, number)
    with pytest.raises(ValueError, match="only 1 of 2"):
        eas.sample_layers(torch.tensor([0.0, 0, 99]) * -1e3, 2, sets=2)


def test_skip_count_grows_to_all_layers_by_half_of_the_warm_up():
    counts = [eas.skip_count(step, warmup=24, count=4) for step in range(1, 25)]
    assert counts == [min(math.floor(8 * t / 24) + 1, 4) for t in range(1, 25)]
    assert counts[0] == 1 and counts[11] == 4 and counts[8] == 4 and counts[7] == 3


def test_chosen_layers_are_the_highest_and_the_deeper_of_equal_ones():
    assert eas.chosen_layers(torch.tensor([0.5, 0, 2, 0, 0.1]), 3) == [0, 2, 4]
    assert eas.chosen_layers(torch.zeros(4), 2) == [2, 3]


def test_the_search_finds_layers_that_cost_nothing():
    """Three of eight layers can be skipped for free; the bandit, from zero scores, ends with these."""
    generator, free, scores = torch.Generator().manual_seed(0), {1, 4, 6}, torch.zeros(8)
    for _ in range(300):
        sampled = eas.sample_layers(scores, 3, 5, generator=generator)
        losses = [0.3 * len(set(layers.tolist()) - free) for layers in sampled]
        scores = eas.update_scores(scores, sampled, losses)
    assert set(eas.chosen_layers(scores, 3)) == free
