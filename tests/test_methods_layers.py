"""Masks, neurons, heads and rankings of the methods that edit layers, each against a literal loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyvte.methods import aki, ima, redundancylens, yopo


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def loop_mask(visual: torch.Tensor, sees) -> torch.Tensor:
    """bool [n, s, s] from a question asked of every row and column of every sample."""
    n, s = visual.shape
    cells = [sees(sample, row, column) for sample in range(n) for row in range(s) for column in range(s)]
    return torch.tensor(cells).view(n, s, s)


@pytest.mark.parametrize("window", [0, 1, 3, 99])
def test_hollow_mask_counts_visual_tokens(window):
    visual = torch.rand(4, 12) > 0.4

    def sees(sample, row, column):
        if column > row:
            return False
        if not (visual[sample, row] and visual[sample, column]):
            return True
        return int(visual[sample, column:row].sum()) <= window

    assert torch.equal(redundancylens.hollow_mask(visual, window), loop_mask(visual, sees))


def test_hollow_mask_refuses_a_negative_window():
    with pytest.raises(ValueError, match="window"):
        redundancylens.hollow_mask(torch.ones(1, 3, dtype=torch.bool), -1)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1])
def test_probes_are_evenly_spaced_visual_tokens(share):
    visual = torch.rand(30, 25) > 0.4
    visual[0] = False
    probes = redundancylens.probes(visual, share)
    for own, mask in zip(visual, probes):
        places = own.nonzero()[:, 0].tolist()
        count = max(int(share * len(places) + 0.5), 1)
        expected = [places[i * len(places) // count] for i in range(count)] if places else []
        assert mask.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("gated", [True, False])
def test_neurons_are_those_with_the_highest_mean_activation(gated):
    hidden = torch.randn(3, 5, 8)
    gate, up = (torch.nn.Linear(8, 11).requires_grad_(False) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    act = torch.nn.functional.silu
    kept = redundancylens.neurons(hidden, gate, up if gated else None, act, 0.3, mask)
    for sample in range(3):
        scores = []
        for neuron in range(11):
            values = []
            for probe in mask[sample].nonzero()[:, 0].tolist():
                x = hidden[sample, probe]
                value = act(gate.weight[neuron] @ x + gate.bias[neuron])
                values.append(abs(float(value * (up.weight[neuron] @ x + up.bias[neuron]) if gated else value)))
            scores.append(sum(values) / len(values))
        assert kept[sample].tolist() == sorted(sorted(range(11), key=lambda i: -scores[i])[:3])  # 3.3 of 11


def test_neurons_from_weights_and_ties():
    gate = torch.ones(6, 4)
    gate[4] = 2
    kept = redundancylens.neurons(torch.ones(2, 3, 4), gate, gate, torch.relu, 0.5)
    assert kept.tolist() == [[0, 1, 4]] * 2


@pytest.mark.parametrize("last", [0, 2, 5])
def test_rank_layers_takes_the_least_harmful_layer_each_round(last):
    harm = torch.randn(5, 2)
    pair = torch.randn(5, 5)

    def evaluate(reduced):
        together = sum(float(pair[a, b]) for a, b in itertools.combinations(sorted(reduced), 2))
        return [10 - sum(float(harm[i, task]) for i in reduced) - together for task in range(2)]

    expected = [4, 3, 2, 1, 0][:last]
    while len(expected) < 5:
        best, worth = None, None
        for layer in (4, 3, 2, 1, 0):
            if layer in expected:
                continue
            change = [after - 10 for after in evaluate([*expected, layer])]
            value = sum(2 * c if c < 0 else c for c in change)
            if worth is None or value > worth:
                best, worth = layer, value
        expected.append(best)
    assert redundancylens.rank_layers(evaluate, 5, last) == expected
    assert redundancylens.rank_layers(evaluate, 5, last, count=3) == expected[:3]


def test_rank_layers_weighs_a_loss_twice_and_prefers_the_deeper_of_equal_layers():
    scores = {(): [5, 5], (0,): [8, 3.4], (1,): [5, 5], (2,): [5, 5]}  # layer 0 gains 3 and loses 1.6
    assert redundancylens.rank_layers(lambda reduced: scores[tuple(reduced)], 3, count=1) == [2]
    assert redundancylens.rank_layers(lambda reduced: scores[tuple(reduced)], 3, alpha=1, count=1) == [0]
    calls = []
    assert redundancylens.rank_layers(calls.append, 3, last=3) == [2, 1, 0] and not calls
    with pytest.raises(ValueError, match="last 4"):
        redundancylens.rank_layers(calls.append, 3, last=4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 5])
def test_neighbour_mask_sees_the_grid_around_a_token_and_all_text_before_it(window, causal):
    height, width = 2, 3
    rows = ("tvvvvvvtt", "vvvvvvttt", "ttttttttt"), ("vvvvvvtvvvvvvt", "tvvvtvvvvvvvvv")
    for prompts in rows:
        visual = torch.tensor([[token == "v" for token in prompt] for prompt in prompts])

        def sees(sample, row, column, visual=visual):
            own = visual[sample]
            if not (own[row] and own[column]):
                return column <= row
            a, b = int(own[:row].sum()), int(own[:column].sum())
            if a // 6 != b // 6 or (causal and column > row):
                return False
            (r, c), (s, d) = divmod(a % 6, width), divmod(b % 6, width)
            return max(abs(r - s), abs(c - d)) <= (window - 1) // 2

        assert torch.equal(yopo.neighbour_mask(visual, height, width, window, causal), loop_mask(visual, sees))


def test_neighbour_mask_refuses_an_image_that_is_no_grid():
    with pytest.raises(ValueError, match="grids of 2 x 3"):
        yopo.neighbour_mask(torch.ones(1, 7, dtype=torch.bool), 2, 3, 3)


def test_head_ratios_and_the_mask_of_a_majority():
    visual = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    rows = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    attention = torch.randn(2, 3, 6, 6).softmax(-1)
    ratios = yopo.head_ratios(attention, visual, rows)
    for sample, head in itertools.product(range(2), range(3)):
        image = other = 0.0
        for row, column in itertools.product(range(6), range(6)):
            if rows[sample, row]:
                value = float(attention[sample, head, row, column])
                image, other = (image + value, other) if visual[sample, column] else (image, other + value)
        torch.testing.assert_close(ratios[sample, head], torch.tensor(image / other))

    calibration = torch.zeros(100, 4, 3)
    for layer in range(4):
        calibration[:40, layer, 0] = 0.3  # 40 of 100 are not more than 40
        calibration[:41, layer, 1] = 0.3
        calibration[:, layer, 2] = 0.2  # not above the threshold
    mask = yopo.head_mask(calibration, 0.2)
    assert mask.int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 1, 0]]
    assert yopo.layer_cut(mask, 3).int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert mask[3, 1]  # the mask given is not changed


def test_cut_heads_are_weights_set_to_zero_after_softmax():
    visual = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    weights, values = torch.randn(2, 3, 5, 5).softmax(-1), torch.randn(2, 3, 5, 4)
    keep = torch.tensor([True, False, True])
    cut = weights.clone()
    cut[:, 1] = cut[:, 1].masked_fill(visual[:, None, :], 0)
    torch.testing.assert_close(weights @ yopo.cut_values(values, visual, keep), cut @ values)

    outputs = torch.randn(2, 5, 3, 4)
    expected = outputs.clone()
    for sample, row in itertools.product(range(2), range(5)):
        if visual[sample, row]:
            expected[sample, row, 1] = 0
    assert torch.equal(yopo.cut_outputs(outputs, visual, keep), expected)


def test_first_neurons_are_rounded_down():
    assert [yopo.first_neurons(11008, 2), yopo.first_neurons(7, 2), yopo.first_neurons(10, 1.5)] == [5504, 3, 6]


def test_alignment_is_the_cosine_of_two_means():
    hidden = torch.randn(3, 6, 5)
    visual = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6], dtype=torch.bool)
    text = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 0], [1] * 6], dtype=torch.bool)
    score = ima.alignment(hidden, visual, text)
    for sample in range(2):
        a = sum(hidden[sample, i] for i in range(6) if visual[sample, i])
        b = sum(hidden[sample, i] for i in range(6) if text[sample, i])
        torch.testing.assert_close(score[sample], a @ b / (a.norm() * b.norm()))
    assert score[2] == 0


@pytest.mark.parametrize(
    "interval, start, end, expected",
    [
        (2, 0, None, [2, 4, 6, 8, 10]),
        (4, 4, 12, [8]),
        (1, 8, None, [9, 10]),
        ([2, 3], 0, None, [2, 4, 6, 9]),
        ([1, 5, 2], 1, 99, [2, 3, 5, 8, 10]),
    ],
    ids=["every other", "both ends excluded", "all between", "two stages", "three stages"],
)
def test_skipped_layers_follow_the_pattern(interval, start, end, expected):
    assert ima.skipped_layers(12, interval, start, end) == expected


@pytest.mark.parametrize("interval", [0, [2, 0], [], [1] * 13])
def test_skipped_layers_refuse_intervals_that_are_none(interval):
    with pytest.raises(ValueError, match="interval"):
        ima.skipped_layers(12, interval)


def test_aki_mask_lets_the_image_see_its_question():
    visual = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    question = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)

    def sees(sample, row, column):
        unlocked = bool(visual[sample, row] and question[sample, column])
        return bool(valid[sample, column]) and (column <= row or unlocked)

    assert torch.equal(aki.mask(visual, question, valid), loop_mask(visual, sees))
    assert torch.equal(aki.mask(visual, question & False), torch.ones(7, 7).tril().bool().expand(2, 7, 7))
