"""Decoder layers as code bases outside transformers write them: tables of rotations of their own, several outputs,
arguments of their own. The decoder is one small model that runs its layers in a loop; each style is one layer class."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import LAYERS, llama_config, masked_visual_columns
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

import dyvte

CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
VOCABULARY, WIDTH, HEADS, STEPS = 100, 32, 4, 4


class GrowingTable(nn.Module):
    """Rotations of all positions so far, made anew when a longer sequence comes."""

    def __init__(self, width):
        super().__init__()
        self.width, self.length = width, 0

    def forward(self, value, seq_len=None):
        if seq_len > self.length:
            frequency = 10000 ** (-torch.arange(0, self.width, 2) / self.width)
            angle = torch.outer(torch.arange(seq_len), frequency).repeat(1, 2)
            self.cosines, self.sines, self.length = angle.cos(), angle.sin(), seq_len
        return self.cosines[:seq_len].to(value), self.sines[:seq_len].to(value)


class TableLayer(nn.Module):
    """Rotations are looked up by ``position_ids`` in a table that is as long as keys are, and keys come in tuples."""

    def __init__(self, config, index):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rotary_emb = GrowingTable(WIDTH // HEADS)
        self.mlp, self.norm = LlamaMLP(config), LlamaRMSNorm(WIDTH)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, use_cache=False):
        shape = (*hidden_states.shape[:2], HEADS, -1)
        parts = self.qkv(self.norm(hidden_states)).chunk(3, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        past = 0 if past_key_value is None else past_key_value[0].shape[2]
        cosines, sines = self.rotary_emb(value, seq_len=past + key.shape[2])
        cosines, sines = cosines[position_ids][:, None], sines[position_ids][:, None]
        turn = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)  # noqa: E731
        query, key = (x * cosines + turn(x) * sines for x in (query, key))
        if past:
            key = torch.cat([past_key_value[0], key], 2)
            value = torch.cat([past_key_value[1], value], 2)
        scores = query @ key.transpose(2, 3) / shape[-2] ** 0.5 + attention_mask
        states = self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)) + hidden_states
        states = states + self.mlp(states)
        return (states, (key, value)) if use_cache else (states,)


class CacheLayer(LlamaDecoderLayer):
    """Returns the cache that it was given, and the model takes the last layer's for its own."""

    def forward(self, hidden_states, past_key_values=None, use_cache=False, **others):
        states = super().forward(hidden_states, use_cache=use_cache, **others, **{CACHE: past_key_values})
        return (states, past_key_values) if use_cache else (states,)


class CountingLayer(LlamaDecoderLayer):
    """Is told how many tokens every sample has, and counts the mask where it is not."""

    def forward(self, hidden_states, attention_mask=None, seqlens_in_batch=None, **others):
        if seqlens_in_batch is not None:
            assert len(seqlens_in_batch) == len(hidden_states)
            assert seqlens_in_batch.max() <= hidden_states.shape[1], "lengths of a sequence that is gone"
        return (super().forward(hidden_states, attention_mask=attention_mask, **others),)


class LoopModel(PreTrainedModel, GenerationMixin):
    """Ids or embeddings in, logits out; its own loop over the layers, which are given what their class asks for."""

    config_class = LlamaConfig

    def __init__(self, config, layer):
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.rotations, self.norm = LlamaRotaryEmbedding(config), LlamaRMSNorm(WIDTH)
        self.lm_head, self.layer = nn.Linear(WIDTH, VOCABULARY, bias=False), layer
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
                inputs_embeds=None, use_cache=None, cache_position=None, return_dict=True, **kwargs):  # fmt: skip
        cache = past_key_values if cache is None else cache
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.layer is CacheLayer and use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1])[None].expand(len(hidden), -1)
        padding = attention_mask if attention_mask is not None else torch.ones(hidden.shape[:2])
        extra = {"attention_mask": causal(padding.bool(), hidden.shape[1], hidden.dtype), "position_ids": position_ids}
        if self.layer is not TableLayer:
            extra["position_embeddings"] = self.rotations(hidden, position_ids)
        if self.layer is CountingLayer:
            extra["seqlens_in_batch"] = padding.sum(1)
        else:
            extra["use_cache"] = use_cache
        if self.layer is CacheLayer:
            extra["past_key_values"] = cache
        outputs = ()
        for layer in self.layers:
            outputs = layer(hidden, **extra)
            hidden = outputs[0]
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.norm(hidden)), past_key_values=outputs[1] if len(outputs) > 1 else None
        )


def causal(padding, queries, dtype):
    keys = padding.shape[1]
    allowed = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    allowed = allowed & padding[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def build(layer):
    torch.manual_seed(0)
    config = llama_config()
    config._attn_implementation = "eager"
    model = LoopModel(config, layer).eval()
    model.generation_config.eos_token_id = None
    return model


ROWS = [[5, 6, *[90] * 7, 8, 9, 10], [*[90] * 7, 4, 5], [11, *[90] * 7, 12, *[90] * 7, 13, 14]]
EXITS = [2, 4, 1]


def prompts(side):
    longest = max(map(len, ROWS))
    pads = [[0] * (longest - len(row)) for row in ROWS]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(ROWS, pads)])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, ids == 90


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [TableLayer, CacheLayer, CountingLayer])
@torch.no_grad()
def test_forward_and_trace(layer, side):
    """Prompts with mixed exits, and every branch of a trace, equal the definition."""
    inputs, visual = prompts(side)
    model, column = build(layer), torch.arange(visual.shape[1])
    last = torch.arange(3), torch.where(inputs["attention_mask"].bool(), column, -1).amax(1)
    dense = model(**inputs, use_cache=False).logits
    with dyvte.visual_exit(model, dyvte.NeverExit(), visual):
        assert torch.equal(model(**inputs, use_cache=False).logits, dense)
    with masked_visual_columns(model, visual, torch.tensor(EXITS)):
        expected = model(**inputs, use_cache=False).logits
    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS), visual):
        logits = model(**inputs, use_cache=False).logits
    text = inputs["attention_mask"].bool() & ~visual
    torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)
    trace = dyvte.trace_batch(build(layer), inputs, visual_mask=visual)
    q = dense[last].log_softmax(-1)
    for exit_layer in range(1, LAYERS):
        with masked_visual_columns(model, visual, torch.full((3,), exit_layer)):
            p = model(**inputs, use_cache=False).logits[last].log_softmax(-1)
        torch.testing.assert_close(trace.kl[:, exit_layer - 1], (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_that_returns_its_cache():
    """The model decodes with the cache that the last layer returned: its own, not that of a group of samples."""
    inputs, visual = prompts("left")
    model, arguments = build(CacheLayer), {"max_new_tokens": STEPS, "do_sample": False}
    with masked_visual_columns(model, visual, torch.tensor(EXITS)):
        expected = model.generate(**inputs, **arguments)
    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS), visual) as handle:
        assert model.generate(**inputs, **arguments).tolist() == expected.tolist()
    assert handle.layers.tolist() == EXITS
    assert model.generate(**inputs, **arguments).tolist() != expected.tolist(), "the exit must change something"


@torch.no_grad()
def test_keys_in_tuples_are_refused():
    """They would be those of one group of samples."""
    inputs, visual = prompts("left")
    model = build(TableLayer)
    dense = model(**inputs, use_cache=True)
    with dyvte.visual_exit(model, dyvte.NeverExit(), visual):
        assert torch.equal(model(**inputs, use_cache=True).logits, dense.logits)
    for exits in (2, EXITS):
        with dyvte.visual_exit(model, dyvte.FixedExit(exits), visual):
            with pytest.raises(ValueError, match="use_cache=False"):
                model(**inputs, use_cache=True)
