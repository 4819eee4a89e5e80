"""Models in the style of the LLaVA code base, which transformers has no class for.

The small model here is written in that style: one -200 per image in ``input_ids``, replaced by many embeddings inside
``forward`` and ``generate``; a LLaMA that only ever sees ``inputs_embeds``; decoder layers that return tuples.
"""

from __future__ import annotations

import pytest
import torch
from models import CACHE, llama_config, masked_visual_columns
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dyvte
from dyvte import SplicedVisualMask
from dyvte.runtime.compat import call_cache, causal_mask
from dyvte.runtime.locate import find_decoder

SENTINEL, IGNORE, TOKENS, CONTEXT, STEPS = -200, -100, 7, 90, 5


class TupleLayer(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs),)


class TupleLlamaModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(TupleLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None,
                **kwargs):  # fmt: skip
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = call_cache(kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1])[None]
        mask = causal_mask(self.config, hidden, attention_mask, cache)
        rotation = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            outputs = self.call(layer, hidden, attention_mask=mask, position_ids=position_ids, use_cache=use_cache,
                                position_embeddings=rotation, **{CACHE: cache})  # fmt: skip
            hidden = outputs[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})

    @staticmethod
    def call(layer, hidden, **others):
        return layer(hidden, **others)


class SpliceModel(LlamaForCausalLM):
    """LLaVA, VILA-1.5, Eagle-X5: the language model itself takes ids with sentinels, and images."""

    def __init__(self, config, padding_side="left"):
        super().__init__(config)
        self.model = TupleLlamaModel(config)
        self.vision = nn.Linear(4, TOKENS * config.hidden_size)
        self.padding_side, self.encoded = padding_side, 0
        self.post_init()

    def encode_images(self, images):
        self.encoded += 1
        return self.vision(images).view(len(images), TOKENS, -1)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        had = {"labels": labels is not None, "mask": attention_mask is not None, "position": position_ids is not None}
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
        features, rows = iter(self.encode_images(images)), []
        for ids, keep, own in zip(input_ids, attention_mask.bool(), labels):
            ids, own = ids[keep], own[keep]
            states, marks = [], []
            for token, label in zip(ids, own):
                if token == SENTINEL:
                    states.append(next(features))
                    marks.append(torch.full((TOKENS,), IGNORE))
                else:
                    states.append(self.model.embed_tokens(token[None]))
                    marks.append(label[None])
            rows.append((torch.cat(states), torch.cat(marks)))
        batch, longest = len(rows), max(len(marks) for _, marks in rows)
        embeds = torch.zeros(batch, longest, self.config.hidden_size)
        new_labels = torch.full((batch, longest), IGNORE)
        mask = torch.zeros(batch, longest, dtype=attention_mask.dtype)
        positions = torch.zeros(batch, longest, dtype=torch.long)
        for row, (states, marks) in enumerate(rows):
            n = len(marks)
            place = slice(longest - n, None) if self.padding_side == "left" else slice(0, n)
            embeds[row, place], new_labels[row, place] = states, marks
            mask[row, place], positions[row, place] = 1, torch.arange(n)
        return (
            None,
            positions if had["position"] else None,
            mask if had["mask"] else None,
            past_key_values,
            embeds,
            new_labels if had["labels"] else None,
        )

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
                use_cache=None, images=None, **kwargs):  # fmt: skip
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, _, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, call_cache(kwargs), labels, images
                )
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs=None, images=None, **kwargs):
        if images is None:
            return super().generate(inputs_embeds=self.model.embed_tokens(inputs), **kwargs)
        _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None), None, None, images
        )
        return super().generate(attention_mask=mask, position_ids=positions, inputs_embeds=embeds, **kwargs)


class ChatModel(nn.Module):
    """InternVL-Chat, Eagle 2.5: ids hold the visual tokens, and a language model inside gets the embeddings."""

    def __init__(self, config, direct=False):
        super().__init__()
        self.config = config
        self.language_model = LlamaForCausalLM(config)
        self.language_model.model = TupleLlamaModel(config)
        self.language_model.post_init()
        if direct:  # Eagle 2.5 calls the decoder's forward, so that its hooks stay silent
            inner = self.language_model.model
            self.language_model.forward = lambda *a, **k: self._logits(inner.forward(*a, **k))
        self.vision = nn.Linear(4, config.hidden_size)
        self.generation_config = self.language_model.generation_config

    def _logits(self, output):
        output["logits"] = self.language_model.lm_head(output.last_hidden_state)
        return output

    @torch.no_grad()
    def generate(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        embeds[input_ids == CONTEXT] = self.vision(pixel_values)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def splice_model(attention="sdpa", side="left"):
    torch.manual_seed(0)
    config = llama_config()
    config._attn_implementation = attention
    model = SpliceModel(config, side).eval()
    model.generation_config.eos_token_id = None
    return model


ROWS = [[5, 6, SENTINEL, 8, 9, 10], [SENTINEL, 4, 5], [11, SENTINEL, 12, SENTINEL, 13, 14]]


def spliced_inputs(rows=ROWS, side="left"):
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)])
    generator = torch.Generator().manual_seed(0)
    return {"attention_mask": (ids != 0).long(), "images": torch.randn(4, 4, generator=generator)}, ids


def expanded(rows=ROWS, side="left"):
    """Where the visual tokens are, written down by hand: bool [batch, longest], and what is not padding."""
    marks = [[m for token in row for m in ([True] * TOKENS if token == SENTINEL else [False])] for row in rows]
    longest = max(map(len, marks))

    def padded(row):
        pad = [False] * (longest - len(row))
        return pad + row if side == "left" else row + pad

    return torch.tensor([padded(m) for m in marks]), torch.tensor([padded([True] * len(m)) for m in marks])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward(attention, side):
    inputs, ids = spliced_inputs(side=side)
    visual, valid = expanded(side=side)
    exits = torch.tensor([2, 4, 1])
    eager, model = splice_model("eager", side), splice_model(attention, side)
    with torch.no_grad():
        with masked_visual_columns(eager, visual, exits):
            expected = eager(input_ids=ids, **inputs).logits
        with dyvte.visual_exit(model, dyvte.FixedExit(exits), SplicedVisualMask(model)) as handle:
            logits = model(input_ids=ids, **inputs).logits
    text = valid & ~visual
    torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)
    assert handle.layers.tolist() == exits.tolist() and model.encoded == 1
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "one"])
def test_generate(attention, rows, mode, side):
    inputs, ids = spliced_inputs(rows, side)
    inputs["images"] = inputs["images"][: sum(row.count(SENTINEL) for row in rows)]
    if len(rows) == 1:
        inputs.pop("attention_mask")
    visual, _ = expanded(rows, side)
    exits = torch.tensor([2, 4, 1])[: len(rows)]
    arguments = {"max_new_tokens": STEPS, "do_sample": False} | mode
    eager, model = splice_model("eager", side), splice_model(attention, side)
    with masked_visual_columns(eager, visual, exits):
        expected = eager.generate(ids, **inputs, **arguments)
    each = exits.repeat_interleave(mode.get("num_beams", 1))
    with dyvte.visual_exit(model, dyvte.FixedExit(each), SplicedVisualMask(model)) as handle:
        out = model.generate(ids, **inputs, **arguments)
    assert out.tolist() == expected.tolist() and model.encoded == 1
    assert set(handle.layers.tolist()) == set(exits.tolist())


def test_several_calls_of_one_handle():
    """Images, then text alone, then images again, and the model is as it was."""
    model = splice_model()
    inputs, ids = spliced_inputs()
    words = torch.tensor([[5, 6, 7, 8]])
    long = torch.arange(3, 3 + expanded()[0].shape[1]).repeat(len(ROWS), 1)  # as long as the images were
    with torch.no_grad():
        dense_long = model(inputs_embeds=model.model.embed_tokens(long)).logits
    arguments = {"max_new_tokens": STEPS, "do_sample": False}
    dense = model.generate(words, **arguments)
    handle = dyvte.attach(model, dyvte.FixedExit(2), SplicedVisualMask(model))
    first = model.generate(ids, **inputs, **arguments)
    assert handle.layers.tolist() == [2, 2, 2]
    assert model.generate(words, **arguments).tolist() != first.tolist()
    with torch.no_grad():
        model(input_ids=words)
        assert handle.layers.tolist() == [6]
        model(input_ids=ids, **inputs)
        with pytest.raises(ValueError, match="was not called"):
            model(inputs_embeds=model.model.embed_tokens(long))
    assert model.generate(long, max_new_tokens=1)[:, 0].tolist() == dense_long[:, -1].argmax(-1).tolist()
    assert handle.layers.tolist() == [6] * len(ROWS)
    assert model.generate(words, **arguments).tolist() == dense.tolist()
    assert model.generate(ids, **inputs, **arguments).tolist() == first.tolist()
    handle.detach()
    assert not vars(model).keys() & {"generate", "prepare_inputs_labels_for_multimodal"}
    assert model.generate(words, **arguments).tolist() == dense.tolist()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("decoder", [None, "language_model.model"])
@pytest.mark.parametrize("told", ["callable", "config"])
def test_language_model_inside(direct, decoder, told):
    def build(attention):
        torch.manual_seed(0)
        config = llama_config()
        config._attn_implementation = attention
        if told == "config":
            config.image_token_index = CONTEXT
        model = ChatModel(config, direct).eval()
        model.generation_config.eos_token_id = None
        return model

    ids = torch.tensor([[0, 3, 4, *[CONTEXT] * 6, 5, 6], [7, *[CONTEXT] * 6, 8, 9, 10, 11]])
    pixels = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids != 0).long()}
    given |= {"max_new_tokens": STEPS, "do_sample": False}
    exits, visual = torch.tensor([2, 4]), ids == CONTEXT
    eager, model = build("eager"), build("sdpa")
    with masked_visual_columns(eager, visual, exits):
        expected = eager.generate(**given)
    mask = (lambda call: call["input_ids"] == CONTEXT) if told == "callable" else None
    with dyvte.visual_exit(model, dyvte.FixedExit(exits), visual_mask=mask, decoder=decoder) as handle:
        out = model.generate(**given)
    assert out.tolist() == expected.tolist() and handle.layers.tolist() == [2, 4]


def test_the_decoder_may_be_named():
    model = ChatModel(llama_config())
    inner = model.language_model.model
    assert find_decoder(model) is inner
    assert find_decoder(model, "language_model.model") is inner and find_decoder(model, inner) is inner


class NvilaStyle(SpliceModel):
    """NVILA's ``_embed`` returns embeddings, labels and mask; it makes a mask where none is given."""

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask
        out = self.prepare_inputs_labels_for_multimodal(input_ids, None, mask, None, labels, media)
        return out[4], out[5], out[2]

    @torch.no_grad()
    def generate(self, input_ids, media, media_config=None, attention_mask=None, **kwargs):
        embeds, _, mask = self._embed(input_ids, media, media_config, None, attention_mask)
        return LlamaForCausalLM.generate(self, inputs_embeds=embeds, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("masked", [True, False])
def test_another_splice_method(masked):
    inputs, ids = spliced_inputs()
    given = {"input_ids": ids, "media": inputs["images"], "attention_mask": inputs["attention_mask"]}
    rows, exits = ROWS, [2, 4, 1]
    if not masked:  # of different lengths once the images are in
        rows, exits = [[5, SENTINEL, 8], [11, 12, 13], [SENTINEL, SENTINEL, 4]], [2, 6, 1]
        given = {"input_ids": torch.tensor(rows), "media": inputs["images"][:3]}
    models = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = llama_config()
        config._attn_implementation = attention
        models.append(NvilaStyle(config).eval())
        models[-1].generation_config.eos_token_id = None
    eager, model = models
    mask = SplicedVisualMask(model, "_embed", mask_at=2, labels_at=1)
    dense = model.generate(**given, max_new_tokens=STEPS)
    with dyvte.visual_exit(model, dyvte.NeverExit(), mask):
        assert torch.equal(model.generate(**given, max_new_tokens=STEPS), dense)
    with masked_visual_columns(eager, expanded(rows)[0], torch.tensor(exits)):
        expected = eager.generate(**given, max_new_tokens=STEPS)
    with dyvte.visual_exit(model, dyvte.FixedExit([2, 4, 1]), mask) as handle:
        assert model.generate(**given, max_new_tokens=STEPS).tolist() == expected.tolist()
    assert handle.layers.tolist() == exits


def test_however_layers_are_called(monkeypatch):
    """With mixed exits, and in a trace, a layer is called again for fewer rows."""
    calls = (
        lambda layer, hidden, **others: layer(hidden, **others),
        lambda layer, hidden, **others: layer(hidden_states=hidden, **others),
        lambda layer, hidden, attention_mask, position_ids, **others: layer(
            hidden, attention_mask, position_ids, **others
        ),
    )
    model, (inputs, ids), (visual, valid) = splice_model(), spliced_inputs(), expanded()
    mask = inputs["attention_mask"]
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, inputs["images"])[4].detach()
    given = {"inputs_embeds": embeds, "attention_mask": valid.long()}
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = LlamaDecoderLayer(model.config, index).eval()
        model.model.layers[index].load_state_dict(layer.state_dict())
    found = []
    for call in calls:
        monkeypatch.setattr(TupleLlamaModel, "call", staticmethod(lambda *a, call=call, **k: (call(*a, **k),)))
        with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit([2, 4, 1]), visual):
            logits = model(**given).logits
        trace = dyvte.trace_batch(model, given, visual_mask=visual)
        found.append((logits, trace.state, trace.kl))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
