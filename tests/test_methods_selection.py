"""Scores and selections of the pruning methods, each against a literal loop over samples, rows and tokens."""

from __future__ import annotations

import math

import pytest
import torch

from dyvte.methods import divprune, downsample, fopru, himap, image_text_interaction, mod, par, sgl, vtc_cls
from dyvte.methods.selection import received, rows_after, share_count, top, top_within


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).softmax(-1)


def prompts(lengths=((1, 6, 4, 0), (0, 3, 5, 3))) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual and valid masks of prompts: prefix | visual | text | padding."""
    rows = [[(0, 1)] * p + [(1, 1)] * v + [(0, 1)] * t + [(0, 0)] * e for p, v, t, e in lengths]
    masks = torch.tensor(rows, dtype=torch.bool)
    return masks[..., 0], masks[..., 1]


def best(scores: list[float], candidates: list[int], count: int) -> set[int]:
    """The highest scores, one after the other; the earliest of equal ones."""
    kept: set[int] = set()
    for _ in range(min(count, len(candidates))):
        kept.add(max((c for c in candidates if c not in kept), key=lambda c: (scores[c], -c)))
    return kept


def as_sets(mask: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


@pytest.mark.parametrize("share", [0, 0.01, 0.125, 0.3, 0.5, 1])
def test_a_share_is_rounded_half_up_and_keeps_at_least_one(share):
    totals = range(30)
    expected = [max(math.floor(share * n + 0.5), 1) if share and n else 0 for n in totals]
    assert share_count(share, torch.tensor(totals)).tolist() == expected


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "half", 8])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        share_count(share, torch.tensor(4))


def test_top_takes_the_earlier_of_equal_scores_and_never_more_than_there_are():
    scores = torch.randint(3, (6, 9)).float()
    among = torch.rand(6, 9) > 0.3
    count = torch.tensor([0, 1, 2, 3, 20, 4])
    expected = [best(s, as_sets(among)[i], c) for i, (s, c) in enumerate(zip(scores.tolist(), count.tolist()))]
    assert as_sets(top(scores, count, among)) == expected
    everything = [best(s, list(range(9)), 9) for s in scores.tolist()]
    assert as_sets(top(scores, 9)) == everything == [set(range(9))] * 6
    worthless = torch.tensor([[-torch.inf, -torch.inf, 1]])
    assert as_sets(top(worthless, 2, torch.tensor([[False, True, True]]))) == [{1, 2}]


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 1])
def test_top_within_takes_a_share_of_every_group(share):
    scores, groups = torch.randint(4, (5, 12)).float(), torch.randint(-1, 3, (5, 12))
    kept = as_sets(top_within(scores, groups, share))
    for row in range(5):
        expected = set()
        for group in range(3):
            members = [i for i in range(12) if groups[row, i] == group]
            count = int(share_count(share, torch.tensor(len(members))))
            expected |= best(scores[row].tolist(), members, count)
        assert kept[row] == expected


def test_vtc_cls_sums_all_layers_but_the_last():
    layers = [weights(2, 3, 7) for _ in range(5)]
    expected = torch.zeros(2, 7)
    for layer in layers[2:4]:
        for head in range(3):
            expected += layer[:, head] / 3
    torch.testing.assert_close(vtc_cls.scores(layers, 2), expected)
    torch.testing.assert_close(vtc_cls.scores(layers, 3), layers[3].mean(1))
    for start in (-1, 4):
        with pytest.raises(ValueError, match="start"):
            vtc_cls.scores(layers, start)


def test_himap_reads_text_rows_first_and_kept_visual_rows_later():
    visual, valid = prompts()
    attention = weights(2, 3, 11, 11)
    text, image = torch.zeros(2, 11), torch.zeros(2, 11)
    for sample in range(2):
        columns = visual[sample].nonzero()[:, 0].tolist()
        for row in range(11):
            for column in columns:
                mean = sum(attention[sample, head, row, column] for head in range(3)) / 3
                if row > columns[-1] and valid[sample, row]:
                    text[sample, column] += mean
                if row in columns:
                    image[sample, column] += mean
    torch.testing.assert_close(himap.text_to_image(attention, visual, valid), text)
    torch.testing.assert_close(himap.image_to_image(attention, visual), image)


def test_fopru_keeps_tokens_by_rank_or_by_whole_rows():
    attention = weights(2, 2, 13, 13)
    expected = torch.zeros(2, 12)
    for query in range(13):
        for head in range(2):
            expected += attention[:, head, query, 1:] / 2
    significance = fopru.scores(attention)
    torch.testing.assert_close(significance, expected)
    torch.testing.assert_close(fopru.scores(attention, cls_token=False), attention.mean(1).sum(1))
    assert as_sets(fopru.by_rank(significance, 0.3)) == [best(s, list(range(12)), 4) for s in expected.tolist()]
    for keep, rows in ((0.25, 1), (0.3, 1), (0.4, 2), (1, 3)):  # 3, 4, 5 and 12 patches, in rows of 4
        for kept, scores in zip(as_sets(fopru.by_row(significance, keep, width=4)), expected.tolist()):
            upper = best([sum(scores[r * 4 : r * 4 + 4]) for r in range(3)], [0, 1, 2], rows)
            assert kept == {r * 4 + c for r in upper for c in range(4)}
    with pytest.raises(ValueError, match="rows of 5"):
        fopru.by_row(significance, 0.5, width=5)


@pytest.mark.parametrize("inclusive", [True, False])
def test_sgl_sums_layers_heads_and_rows_of_prompt_and_answer(inclusive):
    visual, valid = prompts()
    prompt = [weights(2, 3, 11, 11) for _ in range(4)]
    steps = [[weights(2, 3, 1, 11 + t) for _ in range(4)] for t in (1, 2)]
    generated = torch.tensor([[True, True], [True, False]])
    expected = torch.zeros(2, 11)
    for sample in range(2):
        columns = visual[sample].nonzero()[:, 0].tolist()
        first = columns[-1] + (not inclusive)
        for layer in range(4):
            for head in range(3):
                for column in columns:
                    for row in range(first, 11):
                        if valid[sample, row]:
                            expected[sample, column] += prompt[layer][sample, head, row, column]
                    for step in range(2):
                        if generated[sample, step]:
                            expected[sample, column] += steps[step][layer][sample, head, 0, column]
    got = sgl.aggregate(prompt, steps, visual, valid, generated, inclusive)
    torch.testing.assert_close(got, expected)


def test_sgl_confidence_is_a_geometric_mean_and_consistency_a_product():
    p = torch.rand(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    product = torch.tensor([math.prod(row[m].tolist()) for row, m in zip(p, mask)])
    root = torch.tensor([v ** (1 / max(k, 1)) for v, k in zip(product.tolist(), (5, 2, 0))])
    torch.testing.assert_close(sgl.consistency(p, mask), product)
    torch.testing.assert_close(sgl.confidence(p, mask), root)
    torch.testing.assert_close(sgl.confidence(p[0]), root[0])
    torch.testing.assert_close(sgl.decision(root, product), (root + product) / 2)
    assert sgl.confidence(torch.tensor([0.5, 0.0])) == sgl.consistency(torch.tensor([0.5, 0.0])) == 0


def test_knee_is_the_point_farthest_below_the_chord():
    scores = torch.randn(40, 20).exp()
    among = torch.rand(40, 20) > 0.2
    expected = []
    for row, mask in zip(scores.double(), among):
        curve = sorted(row[mask].tolist(), reverse=True)
        depth = [curve[0] + (curve[-1] - curve[0]) * i / (len(curve) - 1) - value for i, value in enumerate(curve)]
        expected.append(depth.index(max(depth)) or len(curve))
    assert image_text_interaction.knee(scores, among).tolist() == expected


@pytest.mark.parametrize(
    "curve, head",
    [([1, 0.9, 0.8, 0.1, 0.05, 0], 3), ([0, 0, 1, 0, 0], 1), ([3, 2, 1, 0], 4), ([5, 5, 5], 3), ([4, 3.9, 3.5, 0], 4)],
    ids=["bend", "spike", "straight", "flat", "no tail"],
)
def test_knee_of_curves_known_by_hand(curve, head):
    assert image_text_interaction.knee(torch.tensor([curve], dtype=torch.float)).item() == head


def test_knee_without_candidates_and_with_one():
    among = torch.tensor([[False, False], [True, False]])
    assert image_text_interaction.knee(torch.ones(2, 2), among).tolist() == [0, 1]


def test_par_ranks_by_the_nearest_word_and_thins_out_clusters():
    visual, text = torch.randn(2, 9, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    cosine = torch.nn.functional.cosine_similarity
    got = par.relevance(visual, text, mask)
    for sample, words in enumerate((3, 1)):
        for token in range(9):
            near = max(cosine(visual[sample, token], text[sample, w], dim=0) for w in range(words))
            torch.testing.assert_close(got[sample, token], near)

    among = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    labels = par.clusters(visual, 0.6, among)
    for sample in range(2):
        parts = {t: {t} for t in as_sets(among)[sample]}
        for a in parts:
            for b in parts:
                if cosine(visual[sample, a], visual[sample, b], dim=0) >= 0.6:
                    union = parts[a] | parts[b]
                    for member in union:
                        parts[member] = union
        expected = [min(parts[t]) if t in parts else -1 for t in range(9)]
        assert labels[sample].tolist() == expected
    assert 1 < len(set(labels[0].tolist())) < 9
    kept = par.route(got, labels, 0.01)
    assert [len(k) for k in as_sets(kept)] == [len(set(row) - {-1}) for row in labels.tolist()]


def test_divprune_adds_the_token_farthest_from_those_it_has():
    features = torch.randn(3, 8, 5)
    features[1, 4] = features[1, 2] * 3  # the same direction
    among = torch.rand(3, 8) > 0.2
    count = torch.tensor([3, 20, 0])
    kept = as_sets(divprune.select(features, count, among))
    for sample in range(3):
        candidates = sorted(as_sets(among)[sample])
        unit = torch.nn.functional.normalize(features[sample], dim=-1)
        distance = (1 - unit @ unit.T).tolist()
        chosen: list[int] = []
        while len(chosen) < min(int(count[sample]), len(candidates)):
            rest = [c for c in candidates if c not in chosen]
            near = {c: min(distance[c][o] for o in (chosen or [x for x in candidates if x != c])) for c in rest}
            chosen.append(max(rest, key=lambda c: near[c]))
        assert kept[sample] == set(chosen)
    assert int(divprune.select(torch.ones(1, 4, 3), 3).sum()) == 3  # equal tokens: still three different ones


def test_mod_routes_within_frames_and_passes_the_others_on():
    frames = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 2, 2]])
    scores = torch.rand(2, 9)
    routed = mod.route(scores, frames, 0.5)
    for sample, expected in enumerate(({0: 2, 1: 2}, {0: 3, 2: 1})):
        kept = as_sets(frames < 0)[sample]
        for frame, count in expected.items():
            members = [i for i in range(9) if frames[sample, i] == frame]
            kept = kept | best(scores[sample].tolist(), members, count)
        assert as_sets(routed)[sample] == kept
    hidden, update, mu = torch.randn(2, 9, 4), torch.randn(2, 9, 4), torch.rand(2, 9)
    update[~routed] = torch.nan  # never read
    out = mod.combine(hidden, update, routed, mu)
    for sample in range(2):
        for token in range(9):
            added = mu[sample, token] * update[sample, token] if routed[sample, token] else torch.zeros(4)
            torch.testing.assert_close(out[sample, token], hidden[sample, token] + added)
    torch.testing.assert_close(mod.combine(hidden, update, routed)[routed], (hidden + update)[routed])


@pytest.mark.parametrize("size, shape", [((8, 12), (8, 12)), (12, (6, 12)), (5, (3, 5)), (1, (1, 1)), (99, (20, 40))])
def test_downsampling_shrinks_to_the_size_and_stays_in_range(size, shape):
    image = torch.rand(2, 3, 20, 40)
    small = downsample.resize(image, size)
    assert small.shape == (2, 3, *shape)
    assert image.min() <= small.min() and small.max() <= image.max()


def test_downsampling_by_a_whole_factor_weighs_a_triangle():
    """With antialiasing, halving a line averages around each new pixel with a triangle two new pixels wide."""
    line = torch.rand(1, 1, 1, 16)
    triangle = torch.tensor([1, 3, 3, 1]) / 8
    expected = [line[0, 0, 0, 2 * i - 1 : 2 * i + 3] @ triangle for i in range(1, 7)]
    torch.testing.assert_close(downsample.resize(line, (1, 8))[0, 0, 0, 1:7], torch.stack(expected))


@pytest.mark.parametrize("size", [0, -1, (21, 40), (20, 0)])
def test_downsampling_refuses_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="cannot downsample"):
        downsample.resize(torch.rand(1, 3, 20, 40), size)


def test_received_and_rows_after_of_prompts_without_an_image():
    attention, rows = weights(2, 2, 3, 5), torch.tensor([[True, False, True], [False, False, False]])
    expected = torch.stack([attention[0].mean(0)[[0, 2]].sum(0), torch.zeros(5)])
    torch.testing.assert_close(received(attention, rows), expected)
    visual = torch.tensor([[False, True, False, True, False], [False] * 5])
    assert rows_after(visual).int().tolist() == [[0, 0, 0, 0, 1], [1] * 5]
    assert rows_after(visual, inclusive=True).int().tolist() == [[0, 0, 0, 1, 1], [1] * 5]
