"""FOLDER against a literal merge of lists of tokens, pass by pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dyvte.methods import folder


class Token:
    """The original tokens it is made of, what they add up to, and its CLS attention."""

    def __init__(self, column, feature, metric, attention=0.0):
        self.column, self.members, self.attention = column, 1, attention
        self.feature, self.metric = feature, metric


def one_pass(tokens: list[Token], remove: int, first: bool, alpha: float, in_order: bool) -> list[Token]:
    even, odd = tokens[::2], tokens[1::2]
    picks = []
    for index, token in enumerate(even):
        scores = [
            -math.inf if first and index == 0 else float(cosine_similarity(token.metric, other.metric, dim=0))
            for other in odd
        ]
        pick = max(range(len(odd)), key=lambda j: (scores[j], -j))
        picks.append((scores[pick] - 100 * alpha * token.attention, pick))
    merged = sorted(range(len(even)), key=lambda i: -picks[i][0])[:remove]  # stable: the earlier of equal ones
    groups = {id(token): [token] for token in tokens}
    for index in merged:
        groups[id(odd[picks[index][1]])].append(even[index])
    left = [t for i, t in enumerate(even) if i not in merged]
    order = [t for t in tokens if t in left or t in odd] if in_order else left + odd
    result = []
    for token in order:
        parts = groups[id(token)]
        size = sum(p.members for p in parts)
        new = Token(
            token.column,
            sum(p.members * p.feature for p in parts) / size,
            sum(p.members * p.metric for p in parts) / size,
            sum(p.attention for p in parts) / len(parts),
        )
        new.members = size
        result.append(new)
    return result


def slow(features, metric, remove, first=False, attention=None, alpha=0.0, in_order=True):
    rows = []
    for sample in range(len(features)):
        cls = attention[sample].tolist() if attention is not None else [0.0] * features.shape[1]
        tokens = [Token(i, f, m, a) for i, (f, m, a) in enumerate(zip(features[sample], metric[sample], cls))]
        rest = remove
        while rest:
            step = min(rest, (len(tokens) - 1) // 2)
            tokens, rest = one_pass(tokens, step, first, alpha, in_order), rest - step
        rows.append(tokens)
    return (
        torch.stack([torch.stack([t.feature for t in row]) for row in rows]),
        torch.tensor([[float(t.members) for t in row] for row in rows]),
        torch.tensor([[t.column for t in row] for row in rows]),
    )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tokens, remove", [(9, 2), (9, 4), (9, 5), (10, 4), (10, 7), (12, 10), (7, 0), (2, 0)])
def test_fold_merges_like_lists_of_tokens(tokens, remove, first):
    torch.manual_seed(tokens + remove)
    features, metric = torch.randn(3, tokens, 6), torch.randn(3, tokens, 4)
    for by in (None, metric):
        folded = folder.fold(features, remove, by, first)
        means, sizes, columns = slow(features, features if by is None else by, remove, first)
        torch.testing.assert_close(folded.features, means)
        assert torch.equal(folded.sizes, sizes) and torch.equal(folded.columns, columns)
        assert folded.sizes.sum(1).tolist() == [tokens] * 3
        if first:
            assert torch.equal(folded.features[:, 0], features[:, 0])


@pytest.mark.parametrize("tokens, remove", [(9, 3), (10, 4), (10, 7), (41, 30)])
def test_fold_in_tower_spares_what_the_cls_token_attends_to(tokens, remove):
    torch.manual_seed(tokens + remove)
    hidden, keys, attention = torch.randn(2, tokens, 6), torch.randn(2, tokens, 4), torch.rand(2, tokens) / 300
    folded = folder.fold_in_tower(hidden, remove, keys, attention)
    means, sizes, columns = slow(hidden, keys, remove, True, attention, alpha=5.0, in_order=False)
    torch.testing.assert_close(folded.features, means)
    assert torch.equal(folded.sizes, sizes) and torch.equal(folded.columns, columns)


# One pass of 32 tokens removes up to 15, one of 30 up to 14.
@pytest.mark.parametrize(
    "tokens, remove, scaled",
    [(32, 0, False), (32, 10, True), (32, 14, False), (32, 15, False), (32, 16, True), (30, 9, True), (30, 10, False)],
)
def test_merge_has_the_factor_for_size_where_the_reference_has_it(tokens, remove, scaled):
    torch.manual_seed(remove)
    features = torch.randn(2, tokens, 6)
    merged, sizes = folder.merge(features, remove)
    means = folder.fold(features, remove).features
    factor = torch.tensor([[1 + math.log(s) for s in row] for row in sizes.tolist()])
    torch.testing.assert_close(folder.factor(sizes), factor)
    torch.testing.assert_close(merged, means * factor[..., None] if scaled else means)


def test_equal_tokens_merge_the_earlier_first():
    folded = folder.fold(torch.ones(1, 8, 3), 2)
    assert folded.columns.tolist() == [[1, 3, 4, 5, 6, 7]]
    assert folded.sizes.tolist() == [[3, 1, 1, 1, 1, 1]]


def test_half_precision_comes_back_as_it_was():
    features = torch.randn(1, 8, 4).bfloat16()
    merged, sizes = folder.merge(features, 3)
    assert merged.dtype == torch.bfloat16 and sizes.dtype == torch.float32


@pytest.mark.parametrize("remove", [-1, 7, True, 2.0])
def test_removing_all_but_one_is_refused(remove):
    with pytest.raises(ValueError, match="remove must be 0 ... 6"):
        folder.fold(torch.randn(1, 8, 4), remove)
