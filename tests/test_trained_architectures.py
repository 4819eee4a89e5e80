"""Systems that save by how they were built and trained: small models in their styles, and an exit exact on each.

Projectors and token groupers are written from the papers' descriptions, with random weights: what an exit has to bear
is the shape of what they hand to the decoder (few tokens, another number for every sample, rows, frames, a prefix).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import masked_visual_columns
from torch import nn

import dyvte
from dyvte.methods import AKI

WIDTH, LAYERS, STEPS, SIDE = 32, 4, 3, 8
SIZES = {
    "vocab_size": 100,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT = SIZES | {"initializer_range": 0.2}  # far from uniform attention, so that a wrong mask shows
EXITS = [2, 1, 3]


def llama(attention):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, attn_implementation=attention))


def mistral(attention):
    return tf.MistralForCausalLM(tf.MistralConfig(**TEXT, sliding_window=None, attn_implementation=attention))


def phi3(attention):
    return tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, attn_implementation=attention))


def opt(attention):
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=100,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.2,
            attn_implementation=attention,
        )
    )


class TokenPacker(nn.Module):
    """Every low-resolution query attends to its own s x s region of features of several levels."""

    def __init__(self, width: int = 16, levels: int = 2, s: int = 2):
        super().__init__()
        self.s, self.query, self.out = s, nn.Linear(width, width), nn.Linear(width, WIDTH)
        self.key, self.value = nn.Linear(width * levels, width), nn.Linear(width * levels, width)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        low = F.interpolate(levels[-1], scale_factor=1 / self.s, mode="bilinear")
        query = self.query(low.flatten(2).transpose(1, 2))[:, :, None]
        regions = F.unfold(torch.cat(levels, 1), self.s, stride=self.s)  # [n, channels * s * s, regions]
        regions = regions.unflatten(1, (-1, self.s**2)).permute(0, 3, 2, 1)
        weights = (query @ self.key(regions).transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        return self.out((query + weights @ self.value(regions))[:, :, 0])


class SemanticTokens(nn.Module):
    """VisToG: learned tokens gather the patches that are assigned to them, one for each patch."""

    def __init__(self, width: int = 16, tokens: int = 6):
        super().__init__()
        self.tokens, self.out = nn.Parameter(torch.randn(tokens, width)), nn.Linear(width, WIDTH)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        assigned = F.one_hot((patches @ self.tokens.T).argmax(-1), len(self.tokens)).to(patches)
        total = assigned.transpose(1, 2) @ patches
        return self.out(self.tokens + total / assigned.sum(1).clamp(min=1)[..., None])


def clusters(patches: torch.Tensor, threshold: float) -> torch.Tensor:
    """SeTok: centres are patches in dense places far from denser ones; as many tokens as there are centres."""
    distance = torch.cdist(patches, patches)
    density = (-distance.topk(4, largest=False).values.square().mean(1) / 40).exp()
    denser = density[None] > density[:, None]
    apart = distance.masked_fill(~denser, torch.inf).amin(1)
    score = density * apart.where(apart.isfinite(), distance.amax())
    centres = (score > threshold * score.max()).nonzero().flatten()
    belongs = F.one_hot(distance[:, centres].argmin(1), len(centres)).to(patches)
    return belongs.T @ patches / belongs.sum(0)[:, None]


def features(seed: int = 0, samples: int = 3) -> torch.Tensor:
    """[samples, 16, 8, 8], what a vision tower makes of images."""
    return torch.randn(samples, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def words(model, *lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    return [table[torch.randint(3, 90, (length,), generator=generator)] for length in lengths]


def assemble(samples: list[list[tuple[torch.Tensor, bool]]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pieces (embeddings, whether visual) of each sample -> inputs padded on the left, and the visual mask."""
    length = max(sum(len(piece) for piece, _ in sample) for sample in samples)
    embeds = torch.zeros(len(samples), length, WIDTH)
    valid, visual = (torch.zeros(len(samples), length, dtype=torch.bool) for _ in range(2))
    for row, sample in enumerate(samples):
        place = length - sum(len(piece) for piece, _ in sample)
        valid[row, place:] = True
        for piece, looked in sample:
            embeds[row, place : place + len(piece)] = piece
            visual[row, place : place + len(piece)] = looked
            place += len(piece)
    return {"inputs_embeds": embeds, "attention_mask": valid.long()}, visual


def token_packer(model):
    tokens = TokenPacker()([features(0), features(1)])
    return [
        [(b, False), (v, True), (a, False)] for b, v, a in zip(words(model, 3, 1, 2), tokens, words(model, 4, 6, 5))
    ]


def vistog(model):
    tokens = SemanticTokens()(features().flatten(2).transpose(1, 2))
    return [
        [(b, False), (v, True), (a, False)] for b, v, a in zip(words(model, 3, 1, 2), tokens, words(model, 4, 6, 5))
    ]


def setok(model):
    project = nn.Linear(16, WIDTH)
    tokens = [project(clusters(image.flatten(1).T, t)) for image, t in zip(features(), (0.37, 0.42, 0.4))]
    assert len({len(own) for own in tokens}) == 3  # another number of tokens for every image
    return [
        [(b, False), (v, True), (a, False)] for b, v, a in zip(words(model, 3, 1, 2), tokens, words(model, 4, 6, 5))
    ]


def solo(model):
    """Raw patches through one linear layer; each row of patches ends in a word of its own."""
    project = nn.Linear(3 * 4 * 4, WIDTH)
    pixels = torch.randn(3, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    patches = project(F.unfold(pixels, 4, stride=4).transpose(1, 2))  # 4 rows of 3
    start, end, stop = words(model, 1, 1, 1, seed=5)
    samples = []
    for rows, after, image in zip((4, 2, 3), words(model, 4, 6, 5), patches):
        pieces = [(start, False)]
        for row in image.split(3)[:rows]:
            pieces += [(row, True), (stop, False)]
        samples.append([*pieces, (end, False), (after, False)])
    return samples


def video_llm(model):
    """VideoLLM-online: a frame is a CLS token and a few pooled ones, frames stand between separators and talk."""
    project = nn.Linear(16, WIDTH)
    samples = []
    for row, frames in enumerate((3, 1, 2)):
        pieces = [(words(model, 2, seed=row)[0], False)]
        for frame in features(row, frames):
            pooled = F.adaptive_avg_pool2d(frame, 2).flatten(1).T
            tokens = project(torch.cat([frame.mean((1, 2))[None], pooled]))
            pieces += [(tokens, True), (words(model, 1, seed=9)[0], False)]
        samples.append([*pieces, (words(model, 4, seed=row + 20)[0], False)])
    return samples


def depalm(model):
    """A few queries read the image; what they bring is a prefix before all text."""
    queries, attend = torch.randn(5, 16), nn.MultiheadAttention(16, 2, batch_first=True)
    patches = features().flatten(2).transpose(1, 2)
    tokens = nn.Linear(16, WIDTH)(attend(queries.expand(3, -1, -1), patches, patches)[0])
    return [[(v, True), (a, False)] for v, a in zip(tokens, words(model, 4, 7, 5))]


STYLES = {
    "TokenPacker": (llama, token_packer),
    "VisToG": (llama, vistog),
    "SeTok": (llama, setok),
    "SOLO": (mistral, solo),
    "VideoLLM-MoD's host": (llama, video_llm),
    "DePALM": (opt, depalm),
}


def build(make, attention):
    torch.manual_seed(0)
    model = make(attention).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def by_definition(model, inputs, visual, exits, also=None):
    """Logits of the prompt and greedy tokens, without a cache; ``also`` changes the mask that is given to the model."""
    embeds, mask, chosen, first = inputs["inputs_embeds"], inputs["attention_mask"], [], None
    with masked_visual_columns(model, visual, torch.tensor(exits)):
        for _ in range(STEPS):
            position = (mask.cumsum(1) - 1).clamp(min=0)
            given = mask if also is None else also(mask)
            logits = model(inputs_embeds=embeds, attention_mask=given, position_ids=position, use_cache=False).logits
            first = logits if first is None else first
            chosen.append(logits[:, -1].argmax(-1))
            embeds = torch.cat([embeds, model.get_input_embeddings()(chosen[-1])[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return first, torch.stack(chosen, 1)


@torch.no_grad()
def exact(make, style, method, exits, also=None):
    torch.manual_seed(1)
    inputs, visual = assemble(style(build(make, "eager")))
    expected, answers = by_definition(build(make, "eager"), inputs, visual, exits, also)
    model = build(make, "sdpa")
    with dyvte.reduce_tokens(model, method, visual_mask=visual) as handle:
        position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=position).logits
        generated = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    text = inputs["attention_mask"].bool() & ~visual
    torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)
    assert generated.tolist() == answers.tolist()
    assert handle.layers.tolist() == exits
    counts = visual.sum(1)
    for layer in range(LAYERS):
        assert handle.counts[layer].tolist() == [int(n) * (layer < e) for n, e in zip(counts, exits)]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("exits", [EXITS, [LAYERS] * 3])
def test_an_exit_is_exact(name, exits):
    exact(*STYLES[name], dyvte.FixedExit(exits), exits)


def test_aki_with_an_exit():
    """Phi-3 with modality-mutual attention: as an edit it composes with exits."""

    def unlocked(mask):
        """The 4-D mask that AKI hands to Phi-3: visual rows also see the question after them, no answer."""
        torch.manual_seed(1)
        inputs, visual = assemble(token_packer(build(phi3, "eager")))
        prompt, length = visual.shape[1], mask.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(mask), 1, 1)
        for row, own in enumerate(visual):
            last = int(own.nonzero().max())
            seen[row, :prompt][own] |= (torch.arange(length) > last) & (torch.arange(length) < prompt)
        seen &= mask.bool()[:, None]
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    exact(phi3, token_packer, AKI() & dyvte.FixedExit(EXITS), EXITS, unlocked)


def test_a_mask_of_aki_handed_to_the_decoder_is_refused():
    """It shows what sees what, but not what is padding: the edit takes its place."""
    model = build(phi3, "sdpa")
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 2:8] = True
    with pytest.raises(ValueError, match="pass one"), dyvte.visual_exit(model, dyvte.FixedExit(2), visual_mask=visual):
        model(inputs_embeds=torch.randn(1, 12, WIDTH), attention_mask=torch.zeros(1, 1, 12, 12))


def test_lion_is_refused():
    """LION's Flan-T5 is an encoder-decoder: its decoder holds no visual tokens."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = vision | {"vocab_size": 50, "encoder_hidden_size": 16}
    config = tf.InstructBlipConfig(
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        qformer_config=qformer,
        text_config=tf.T5Config(
            vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=90,
    )
    model = tf.InstructBlipForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        dyvte.attach(model, dyvte.FixedExit(1))
