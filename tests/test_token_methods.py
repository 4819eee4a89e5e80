"""Every token method against a slow definition on eager maps, in padded batches, alone and with an exit."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from models import IMAGE_ID, LAYERS, PATCHES, batch_of, tiny_llama, tiny_llava
from test_methods_folder import slow as fold_lists
from test_pruning import RAGGED, STEPS, generate, greedy, masked_columns
from transformers import LlavaForConditionalGeneration

import dyvte
from dyvte import FixedExit, reduce_tokens
from dyvte.methods import sgl
from dyvte.methods.divprune import DivPrune
from dyvte.methods.downsample import Downsample
from dyvte.methods.folder import Folder
from dyvte.methods.fopru import FoPru
from dyvte.methods.himap import HiMAP
from dyvte.methods.image_text_interaction import ImageTextInteraction
from dyvte.methods.par import PAR
from dyvte.methods.vtc_cls import VTCCLS

EXITS = [[LAYERS] * 4, [3, 5, 6, 4], [1, 4, 2, 6]]
NEVER = LAYERS + 1


@torch.no_grad()
def eager_maps(model, inputs, gone_from=None):
    """The attention of every layer, [batch, heads, s, s], with some columns gone."""
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


def importance_by_definition(inputs, inclusive, ends=None):
    """Sums over the maps of one eager pass over prompt and answer, loop by loop."""
    model, width = tiny_llava("eager"), inputs["input_ids"].shape[1]
    visual, valid = inputs["input_ids"] == IMAGE_ID, inputs["attention_mask"].bool()
    ids, _ = greedy(model, inputs, torch.full(visual.shape, NEVER))
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1),
    }
    longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)
    maps = eager_maps(model, longer)
    expected = torch.zeros(visual.shape)
    for sample in range(len(visual)):
        answer = ids[sample].tolist()
        fed = answer.index(ends) if ends in answer else STEPS - 1  # the last token is never fed
        last = max(visual[sample].nonzero().flatten().tolist())
        rows = [r for r in range(last + (not inclusive), width) if valid[sample, r]]
        rows += range(width, width + fed)
        for layer in maps:
            expected[sample] += layer[sample][:, rows, :width].sum((0, 1))
    return expected.where(visual, 0), ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("inclusive", [True, False])
def test_importance_is_the_attention_of_a_whole_answer(inclusive, attention):
    inputs = batch_of(*RAGGED)
    expected, ids = importance_by_definition(inputs, inclusive)
    found = sgl.importance(tiny_llava(attention), inputs, max_new_tokens=STEPS, inclusive=inclusive)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    end = int(ids[0, 1])  # this sample's answer ends while others go on
    model = tiny_llava(attention)
    model.generation_config.eos_token_id = end
    found = sgl.importance(model, inputs, max_new_tokens=STEPS, inclusive=inclusive)
    torch.testing.assert_close(found, importance_by_definition(inputs, inclusive, end)[0], atol=1e-5, rtol=1e-4)


def test_importance_where_layers_see_a_window():
    family = FAMILIES["mistral3_sliding"]
    inputs = family.batch([3, "image", 5], [1, "image", 9])
    found = sgl.importance(family.build(), inputs, max_new_tokens=1)
    with torch.no_grad():
        maps = family.build("eager")(**inputs, output_attentions=True, use_cache=False).attentions
    expected = sgl.aggregate(maps, [], family.visual(inputs), inputs["attention_mask"].bool())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    longer = sgl.importance(family.build(), inputs, max_new_tokens=4)
    assert bool((longer >= found - 1e-6).all()) and longer.shape == found.shape


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("layer, keep", [(0, 0.5), (2, 0.3), (4, 0.05)])
def test_sgl(layer, keep, exits):
    inputs = batch_of(*RAGGED)
    visual = inputs["input_ids"] == IMAGE_ID
    scores = sgl.importance(tiny_llava(seed=1), inputs, max_new_tokens=3)
    gone = torch.full(visual.shape, NEVER)
    for sample in range(len(visual)):
        columns = {c: float(scores[sample, c]) for c in visual[sample].nonzero().flatten().tolist()}
        for column in set(columns) - best(columns, half_up(keep, len(columns))):
            gone[sample, column] = layer
    equals_definition(sgl.SGL(layer, keep, scores), gone, exits, inputs)


def test_scores_of_another_tokenizer_go_along_by_visual_token():
    scores, visual = torch.rand(2, 5), torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    target = torch.tensor([[0, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    moved = sgl.transfer(scores, visual, target)
    expected = torch.zeros(2, 6)
    expected[0, 3], expected[0, 5], expected[1, 0], expected[1, 1] = (
        scores[0, 1],
        scores[0, 2],
        scores[1, 0],
        scores[1, 4],
    )
    assert torch.equal(moved, expected)
    with pytest.raises(ValueError, match="same tokens"):
        sgl.transfer(scores, visual, ~target)


def test_sgl_refuses_scores_of_other_prompts():
    inputs, model = batch_of(*RAGGED[:2]), tiny_llava()
    for scores, match in ((torch.rand(2, 9), "prompts of 9 tokens"), (torch.rand(3, 26), "scores of 3 samples")):
        with pytest.raises(ValueError, match=match), reduce_tokens(model, sgl.SGL(2, 0.5, scores)):
            model(**inputs)
    with pytest.raises(ValueError, match="finite"):
        sgl.SGL(2, 0.5, torch.full((1, 3), torch.nan))


@torch.no_grad()
def vision_maps(inputs):
    """The attention of every vision layer, [images, heads, tokens, tokens], the CLS token first."""
    return tiny_llava("eager").model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions


def chosen_by_image(inputs, chosen: list[set[int]]) -> torch.Tensor:
    """bool [batch, sequence] from the patches kept of each image, images in the order of the batch."""
    visual = inputs["input_ids"] == IMAGE_ID
    keep = torch.zeros_like(visual)
    for number, (row, column) in enumerate(visual.nonzero().tolist()):
        keep[row, column] = number % PATCHES in chosen[number // PATCHES]
    return keep


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_vtc_cls(keep, exits):
    inputs = batch_of(*RAGGED)
    chosen = []
    for image in vision_maps(inputs)[-2]:
        scores = {patch: float(image[:, 0, 1 + patch].mean()) for patch in range(PATCHES)}
        chosen.append(best(scores, half_up(keep, PATCHES)))
    visual, kept = inputs["input_ids"] == IMAGE_ID, chosen_by_image(inputs, chosen)
    gone = torch.where(visual & ~kept, 0, NEVER)
    for start in (0, -2):  # of two layers, one counts
        equals_definition(VTCCLS(keep, start), gone, exits, inputs)


def test_vtc_cls_sums_layers():
    torch.manual_seed(0)
    config = tiny_llava("eager").config
    config.vision_config.num_hidden_layers = 4
    model = LlavaForConditionalGeneration(config).eval()
    inputs = batch_of(*RAGGED[:2])
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        with reduce_tokens(model, VTCCLS(0.25, 1)) as handle:
            model(**inputs)
    for row in range(2):
        scores = {p: sum(float(maps[i][row, :, 0, 1 + p].mean()) for i in (1, 2)) for p in range(PATCHES)}
        columns = (inputs["input_ids"][row] == IMAGE_ID).nonzero().flatten()
        assert handle.kept(0)[row, columns].nonzero().flatten().tolist() == sorted(best(scores, 4))


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("by", ["rank", "row"])
def test_fopru(by, exits):
    inputs, side = batch_of(*RAGGED), 4
    chosen = []
    for image in vision_maps(inputs)[-2]:
        columns = image.mean(0).sum(0)[1:].tolist()
        if by == "rank":
            chosen.append(best(dict(enumerate(columns)), half_up(0.3, PATCHES)))
        else:
            rows = best({r: sum(columns[r * side : r * side + side]) for r in range(side)}, 2)  # 5 patches: two rows
            chosen.append({r * side + c for r in rows for c in range(side)})
    visual, kept = inputs["input_ids"] == IMAGE_ID, chosen_by_image(inputs, chosen)
    equals_definition(FoPru(0.3, by), torch.where(visual & ~kept, 0, NEVER), exits, inputs)


def head_of_curve(scores: dict[int, float]) -> set[int]:
    """What lies before the point of the sorted curve farthest below its chord."""
    order = sorted(scores, key=lambda column: (-scores[column], column))
    first, last, n = scores[order[0]], scores[order[-1]], len(order)
    below = [first + (last - first) * i / max(n - 1, 1) - scores[c] for i, c in enumerate(order)]
    deepest = max(range(n), key=lambda i: (below[i], -i))
    return set(order[:deepest]) if below[deepest] > 1e-9 else set(order)


@pytest.mark.parametrize("exits", EXITS)
def test_image_text_interaction(exits):
    inputs, layer = batch_of(*RAGGED), 2
    images = [dict(enumerate(image[:, 0, 1:].mean(0).tolist())) for image in vision_maps(inputs)[-2]]
    visual, valid = inputs["input_ids"] == IMAGE_ID, inputs["attention_mask"].bool()
    kept = chosen_by_image(inputs, [head_of_curve(scores) for scores in images])
    gone = torch.where(visual & ~kept, 0, NEVER)
    maps = eager_maps(tiny_llava("eager"), inputs, gone)[layer - 1].mean(1)
    for sample in range(len(visual)):
        last = max(visual[sample].nonzero().flatten().tolist())
        rows = [r for r in range(last + 1, maps.shape[1]) if valid[sample, r]]
        columns = kept[sample].nonzero().flatten().tolist()
        stay = head_of_curve({c: float(maps[sample, rows, c].sum()) for c in columns})
        for column in set(columns) - stay:
            gone[sample, column] = layer
    equals_definition(ImageTextInteraction(layer), gone, exits, inputs)


@pytest.mark.parametrize(
    "family, method, match",
    [
        ("internvl", FoPru(0.5), "merges patches"),
        ("llava_onevision", VTCCLS(0.5), "no CLS token"),
        ("llava_next", VTCCLS(0.5), "one visual|merges patches or adds tokens"),
        ("mistral3", FoPru(0.5), "recomputed outputs are off"),
        ("qwen2_vl", FoPru(0.5), "no attention with q_proj"),
        ("qwen3_vl", DivPrune(0.5), "layer 0 is outside 2"),
    ],
)
def test_towers_that_cannot_be_asked_are_refused(family, method, match):
    family = FAMILIES[family]
    model, inputs = family.build(), family.batch([3, "image", 5])
    with torch.no_grad(), pytest.raises(ValueError, match=match), reduce_tokens(model, method):
        model(**inputs)


def test_a_tower_that_did_not_run_is_refused():
    model, inputs = tiny_llava(), batch_of(*RAGGED[:1])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    visual = inputs["input_ids"] == IMAGE_ID
    with pytest.raises(ValueError, match="did not run"), reduce_tokens(model, VTCCLS(0.5), visual_mask=visual):
        model(**given)


def test_the_tower_is_left_as_it_was():
    model = tiny_llava()
    generate(model, batch_of(*RAGGED[:1]))  # transformers sets hooks of its own at the first call
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with reduce_tokens(model, VTCCLS(0.5)):
        generate(model, batch_of(*RAGGED[:1]))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@torch.no_grad()
def embeddings(inputs) -> torch.Tensor:
    """What enters the decoder."""
    found = []
    model = tiny_llava("eager")
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    model(**inputs, use_cache=False)
    hook.remove()
    return found[0]


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("keep", [0.4, 0.05])
def test_divprune(keep, exits):
    inputs = batch_of(*RAGGED)
    states, visual = embeddings(inputs), inputs["input_ids"] == IMAGE_ID
    gone = torch.full(visual.shape, NEVER)
    for sample in range(len(visual)):
        columns, kept = visual[sample].nonzero().flatten().tolist(), []
        apart = {(a, b): 1 - cosine(states[sample, a], states[sample, b]) for a in columns for b in columns if a != b}
        while len(kept) < half_up(keep, len(columns)):
            others = kept or columns
            nearest = {a: min(apart[a, b] for b in others if b != a) for a in columns if a not in kept}
            kept.append(max(nearest, key=lambda a: (nearest[a], -a)))
        gone[sample, [c for c in columns if c not in kept]] = 0
    equals_definition(DivPrune(keep), gone, exits, inputs)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("keep, threshold, share", [(0.5, 0.3, 0.5), (0.8, 0.1, 0.2), (0.3, 0.9, 1)])
def test_par(keep, threshold, share, exits):
    inputs = batch_of(*RAGGED)
    states, visual = embeddings(inputs), inputs["input_ids"] == IMAGE_ID
    gone = torch.full(visual.shape, NEVER)
    for sample in range(len(visual)):
        columns = visual[sample].nonzero().flatten().tolist()
        words = (inputs["attention_mask"][sample].bool() & ~visual[sample]).nonzero().flatten().tolist()
        scores = {c: max(cosine(states[sample, c], states[sample, w]) for w in words) for c in columns}
        left, kept = sorted(best(scores, half_up(keep, len(columns)))), set()
        while left:
            cluster, edge = set(), [left[0]]
            while edge:
                cluster.add(a := edge.pop())
                edge += [
                    b for b in left if b not in cluster and cosine(states[sample, a], states[sample, b]) >= threshold
                ]
            kept |= best({c: scores[c] for c in sorted(cluster)}, half_up(share, len(cluster)))
            left = [c for c in left if c not in cluster]
        gone[sample, [c for c in columns if c not in kept]] = 0
    equals_definition(PAR(keep, threshold, share), gone, exits, inputs)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("remove", [0.5, 0.66])
def test_folder(remove, exits):
    inputs = batch_of(*RAGGED)
    states, visual = embeddings(inputs), inputs["input_ids"] == IMAGE_ID
    gone = torch.where(visual, 0, NEVER)
    count = int(PATCHES * remove)
    for sample in range(len(visual)):
        for columns in visual[sample].nonzero().flatten().split(PATCHES):
            features = states[sample, columns][None]
            means, sizes, places = fold_lists(features, features, count)
            single = count <= (PATCHES - 1) // 2 and count >= (PATCHES - count) // 2
            gone[sample, columns[places[0]]] = NEVER
            states[sample, columns[places[0]]] = means[0] if single else means[0] * (1 + sizes[0].log()[:, None])
    equals_definition(Folder(remove), gone, exits, inputs, states)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_downsample(size, exits):
    inputs = batch_of(*RAGGED)
    states, visual, side = embeddings(inputs), inputs["input_ids"] == IMAGE_ID, 4
    gone = torch.where(visual, 0, NEVER)
    bounds = {1: [(0, 3)], 2: [(0, 1), (2, 3)], 3: [(0, 1), (1, 2), (2, 3)], 4: [(i, i) for i in range(4)]}[size]
    for sample in range(len(visual)):
        for columns in visual[sample].nonzero().flatten().split(PATCHES):
            features = states[sample, columns].clone()
            for top, bottom in bounds:
                for left, right in bounds:
                    cell = [r * side + c for r in range(top, bottom + 1) for c in range(left, right + 1)]
                    middle = (top + bottom) // 2 * side + (left + right) // 2
                    gone[sample, columns[middle]] = NEVER
                    states[sample, columns[middle]] = features[cell].mean(0)
    equals_definition(Downsample(size), gone, exits, inputs, states)


def test_methods_add_up():
    """Merging before the decoder, then two prunings inside: what each leaves is what the next one sees."""
    inputs, model = batch_of(*RAGGED), tiny_llava()
    with reduce_tokens(model, Folder(0.5) & HiMAP((2, 4), (0.25, 0.125)) & FixedExit(5)) as handle:
        generate(model, inputs)
    by_image = [[8] * 2 + [4] * 2 + [2] + [0], [16] * 2 + [8] * 2 + [4] + [0]]
    assert handle.counts.T.tolist() == [by_image[0]] * 3 + [by_image[1]]
    assert handle.layers.tolist() == [5] * 4


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: VTCCLS(1.5), "share"),
        (lambda: VTCCLS(0.5, start=1.0), "vision layer"),
        (lambda: dyvte.attach(tiny_llava(), VTCCLS(0.5, start=1)), "start must be 0 ... 0"),
        (lambda: FoPru(0.5, by="column"), "'rank' or 'row'"),
        (lambda: Folder(1), "share of visual tokens removed"),
        (lambda: PAR(threshold=2), "cosine"),
        (lambda: Downsample(0), "side of a grid"),
        (lambda: ImageTextInteraction(0), "1 or more"),
        (lambda: dyvte.attach(FAMILIES["qwen3_vl"].build(), Folder()), "layer 0 is outside 2"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_image_that_is_no_square_is_not_averaged():
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 3:14] = True
    model = tiny_llama()
    with pytest.raises(ValueError, match="no square"), reduce_tokens(model, Downsample(2), visual_mask=visual):
        model(inputs_embeds=torch.randn(1, 20, 32))
