"""Every token method against a slow definition on eager maps, in padded batches, alone and with an exit."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE_ID, LAYERS, batch_of, tiny_llava
from test_pruning import RAGGED, STEPS, generate, greedy

import dyvte
from dyvte import FixedExit, reduce_tokens
from dyvte.methods.himap import HiMAP

EXITS = [[LAYERS] * 4, [3, 5, 6, 4], [1, 4, 2, 6]]
NEVER = LAYERS + 1


@torch.no_grad()
def eager_maps(model, inputs, gone_from=None):
    """The attention of every layer, [batch, heads, s, s], with some columns gone."""
    from test_pruning import masked_columns

    gone_from = torch.full(inputs["input_ids"].shape, NEVER) if gone_from is None else gone_from
    with masked_columns(model, gone_from):
        return model(**inputs, output_attentions=True, use_cache=False).attentions


def best(scores: dict[int, float], count: int) -> set[int]:
    """The columns with the highest scores, the earlier of equal ones."""
    return set(sorted(scores, key=lambda column: (-scores[column], column))[:count])


def half_up(share: float, total: int) -> int:
    return max(int(share * total + 0.5), 1) if share and total else 0


def equals_definition(method, gone_from, exits, inputs, replaced=None):
    """Logits and answers are those of an eager model in which nothing sees a column from ``gone_from`` on.

    Args:
        gone_from: long [batch, sequence], from which layer on the method has a column gone.
        replaced: [batch, sequence, d], the states that enter the decoder; None: the model's own.
    """
    visual, exits = inputs["input_ids"] == IMAGE_ID, torch.tensor(exits)
    ends = torch.where(exits < LAYERS, exits, NEVER)[:, None]
    gone = gone_from.minimum(ends.where(visual, torch.tensor(NEVER)))
    eager = tiny_llava("eager")
    hook = None
    if replaced is not None:

        def swap(module, args, kwargs):
            states = args[0].clone()
            states[:, : replaced.shape[1]] = replaced
            return (states, *args[1:]), kwargs

        hook = eager.model.language_model.layers[0].register_forward_pre_hook(swap, with_kwargs=True)
    expected_ids, expected = greedy(eager, inputs, gone)
    if hook is not None:
        hook.remove()
    model = tiny_llava("sdpa")
    whole = method if bool((exits == LAYERS).all()) else method & FixedExit(exits.tolist())
    with reduce_tokens(model, whole) as handle:
        out = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert out.sequences[:, -STEPS:].tolist() == expected_ids.tolist()
    for step in range(STEPS):
        torch.testing.assert_close(out.logits[step], expected[step], atol=1e-5, rtol=1e-4)
    for layer in range(LAYERS):
        assert handle.counts[layer].tolist() == (visual & (gone > layer)).sum(1).tolist()
    return handle


def himap_by_definition(inputs, layers, keep):
    visual, valid = inputs["input_ids"] == IMAGE_ID, inputs["attention_mask"].bool()
    gone = torch.full(visual.shape, NEVER)
    for stage, (layer, share) in enumerate(zip(layers, keep)):
        maps = eager_maps(tiny_llava("eager"), inputs, gone)[layer - 1].mean(1)
        for sample in range(len(visual)):
            columns = [c for c in visual[sample].nonzero().flatten().tolist() if gone[sample, c] > layer]
            last = max(visual[sample].nonzero().flatten().tolist())
            rows = [r for r in range(last + 1, maps.shape[1]) if valid[sample, r]] if stage == 0 else columns
            scores = {c: sum(float(maps[sample, r, c]) for r in rows) for c in columns}
            stay = best(scores, half_up(share, int(visual[sample].sum())))
            for column in set(columns) - stay:
                gone[sample, column] = layer
    return gone


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("layers, keep", [((2, 4), (0.5, 0.125)), ((1, 5), (0.8, 0.3))])
def test_himap(layers, keep, exits):
    inputs = batch_of(*RAGGED)
    equals_definition(HiMAP(layers, keep), himap_by_definition(inputs, layers, keep), exits, inputs)


def test_himap_refuses_layers_that_do_not_ascend():
    for layers in ((2, 2), (0, 3), (4,)):
        with pytest.raises(ValueError, match="two layers"):
            HiMAP(layers)
    with pytest.raises(ValueError, match="outside 0 ... 6"):
        dyvte.attach(tiny_llava(), HiMAP())
