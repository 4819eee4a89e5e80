"""Tiny random models of every family, made from transformers' own configs, and prompts for them.

A prompt is a list of pieces: a number of text tokens, or the name of something to look at ("image", "large image",
"video"). ``Family.batch`` turns prompts into what the model's processor would give.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from models import CACHE, draw_weights

from dyvte.runtime.compat import PreTrainedConfig, call_cache

LAYERS = 5
PAD, IMAGE, VIDEO, START, END, BREAK = 0, 90, 91, 92, 93, 94
SPECIAL = [PAD, *range(90, 100)]
Piece = int | str
Pixels = dict[str, torch.Tensor]

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
ROTATION = "rope_parameters" if hasattr(tf.LlamaConfig(), "rope_parameters") else "rope_scaling"  # 5.0 renamed it
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: of the family.
        config: makes its config.
        model: the class with the language-model head.
        look: "image" | "large image" | "video" -> token ids and pixel inputs of one of them.
        collate: pixel inputs of each sample of a batch -> keyword arguments of the model.
        first: the smallest exit layer.
        looks: what it can look at.
        attentions: the attention implementations that run on a CPU.
        later_images: whether transformers' ``generate`` takes new images on a continued cache.
        extra: more inputs from the ids, such as token types.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    model: str
    look: Callable[[str, torch.Generator], tuple[list[int], Pixels]]
    collate: Callable[[list[list[Pixels]]], Pixels] = field(default=lambda samples: stack(samples))
    first: int = 1
    looks: tuple[str, ...] = ("image",)
    attentions: tuple[str, ...] = ("eager", "sdpa")
    later_images: bool = True
    extra: Callable[[torch.Tensor], Pixels] = field(default=lambda ids: {})

    @functools.cache  # noqa: B019
    def build(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
        """The model with seeded random weights, in eval mode, one for all tests; it never generates special ids."""
        config = self.config()
        config._attn_implementation = attention
        model = draw_weights(getattr(tf, self.model)(config))
        model.generation_config = tf.GenerationConfig(
            pad_token_id=PAD, eos_token_id=SPECIAL[-1], suppress_tokens=SPECIAL
        )
        return model.to(dtype)

    def batch(self, *prompts: list[Piece], side: str = "left", seed: int = 0) -> dict[str, Any]:
        """Inputs for prompts, padded on a side."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = []
        pixels: list[list[Pixels]] = []
        for prompt in prompts:
            ids, own = [], []
            for piece in prompt:
                if isinstance(piece, int):
                    ids += torch.randint(3, 80, (piece,), generator=generator).tolist()
                else:
                    tokens, looked = self.look(piece, generator)
                    ids += tokens
                    own.append(looked)
            rows.append(ids)
            pixels.append(own)
        length = max(map(len, rows))
        pads = [[PAD] * (length - len(ids)) for ids in rows]
        masks = [[0] * len(pad) + [1] * len(ids) for ids, pad in zip(rows, pads)]
        padded = [pad + ids for ids, pad in zip(rows, pads)]
        if side == "right":
            masks, padded = [mask[::-1] for mask in masks], [ids + pad for ids, pad in zip(rows, pads)]
        ids = torch.tensor(padded)
        inputs = {"input_ids": ids, "attention_mask": torch.tensor(masks)} | self.extra_inputs(ids)
        return inputs | (self.collate(pixels) if any(pixels) else {})

    @functools.cache  # noqa: B019
    def sees_later_images(self) -> bool:
        """Whether this version's ``generate`` hands the model new images on a continued cache, instead of none."""
        if not self.later_images:
            return False
        model, first = self.build("eager"), self.batch([3, "image", 5])
        scores = []
        for seed in (1, 2):
            more = self.batch([2, "image", 3], seed=seed)
            ids = torch.cat([first["input_ids"], more["input_ids"]], 1)
            ids[ids < 80] = 5  # the same text for both
            with torch.no_grad():
                cache = call_cache(model(**first, use_cache=True))
                given = more | {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
                given |= self.extra_inputs(ids)
                out = model.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            scores.append(out.logits[0])
        return not torch.equal(*scores)

    def extra_inputs(self, ids: torch.Tensor) -> Pixels:
        """Further inputs from the ids, as far as this version of the model takes them."""
        takes = inspect.signature(getattr(tf, self.model).forward).parameters
        return {name: value for name, value in self.extra(ids).items() if name in takes}

    @staticmethod
    def visual(inputs: dict[str, Any]) -> torch.Tensor:
        """bool [batch, sequence], the visual tokens of a batch."""
        return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def stack(samples: list[list[Pixels]]) -> Pixels:
    """All images of the batch along the first dimension; ``pixel_values`` of unequal lengths are padded with zeros."""
    found: dict[str, list[torch.Tensor]] = {}
    for pixels in (pixels for sample in samples for pixels in sample):
        for key, value in pixels.items():
            found.setdefault(key, []).append(value)
    return {key: cat(values) for key, values in found.items()}


def cat(values: list[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension, the second one padded with zeros."""
    width = max(value.shape[1] for value in values) if values[0].ndim > 1 else 0
    pad = [(0, 0) * (value.ndim - 2) + (0, width - value.shape[1]) for value in values]
    return torch.cat(
        [
            torch.nn.functional.pad(v, p) if v.shape[1:] != values[0].shape[1:] or width > v.shape[1] else v
            for v, p in zip(values, pad)
        ]
    )


def plain_image(tokens: int, kind: str, generator: torch.Generator, around: tuple[int, int] | None = None):
    """One square image; a large one counts as two tiles, or has as many tokens where there are no tiles."""
    tiles = 2 if kind == "large image" else 1
    ids = [IMAGE] * (tokens * tiles)
    ids = ids if around is None else [around[0], *ids, around[1]]
    return ids, {"pixel_values": torch.randn(tiles, 3, 16, 16, generator=generator)}


def llava() -> PreTrainedConfig:
    vision = tf.CLIPVisionConfig(projection_dim=16, **VISION)
    return tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=16
    )


def vipllava() -> PreTrainedConfig:
    vision = tf.CLIPVisionConfig(projection_dim=16, **VISION)
    return tf.VipLlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-2, -1],
    )


PINPOINTS = [[16, 32], [32, 16]]


def llava_next() -> PreTrainedConfig:
    vision = tf.CLIPVisionConfig(projection_dim=16, **VISION)
    return tf.LlavaNextConfig(
        vision_config=vision,
        text_config=tf.MistralConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )


def anyres(kind: str, generator: torch.Generator) -> tuple[list[int], Pixels]:
    """16 tokens of the whole, then rows of two tiles, each row followed by a newline."""
    if kind == "video":
        # Two frames of 4 x 4 patches, pooled to 2 x 2, and a newline.
        frames = torch.randn(1, 2, 3, 16, 16, generator=generator)
        return [VIDEO] * (2 * 4 + 1), {"pixel_values_videos": frames}
    high, wide = (32, 16) if kind == "large image" else (16, 32)
    tokens = 16 + 2 * 16 + high // 4
    pixels = torch.randn(1, 3, 3, 16, 16, generator=generator)
    return [IMAGE] * tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]])}


def llava_onevision() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(vision_use_head=False, **VISION)
    return tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def video_llava() -> PreTrainedConfig:
    vision = tf.CLIPVisionConfig(projection_dim=16, **VISION)
    return tf.VideoLlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
    )


def frames_or_image(kind: str, generator: torch.Generator) -> tuple[list[int], Pixels]:
    if kind == "video":
        return [VIDEO] * (2 * 17), {"pixel_values_videos": torch.randn(1, 2, 3, 16, 16, generator=generator)}
    takes = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values" if "pixel_values" in takes else "pixel_values_images"
    return [IMAGE] * 16, {name: torch.randn(1, 3, 16, 16, generator=generator)}


def internvl() -> PreTrainedConfig:
    vision = tf.InternVLVisionConfig(**VISION | {"image_size": (16, 16), "patch_size": (4, 4)})
    return tf.InternVLConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )


def aya_vision() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(vision_use_head=False, **VISION)
    text = tf.Cohere2Config(**TEXT, sliding_window=10)  # four sliding layers, one without a window
    text.layer_types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    return tf.AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, downsample_factor=2)


def gemma3() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(vision_use_head=False, **VISION)
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = tf.Gemma3TextConfig(**TEXT, sliding_window=12, layer_types=types, query_pre_attn_scalar=8)
    return tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
    )


def paligemma() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(vision_use_head=False, projection_dim=32, **VISION)
    return tf.PaliGemmaConfig(
        vision_config=vision, text_config=tf.GemmaConfig(**TEXT), image_token_index=IMAGE, projection_dim=32
    )


def paligemma2() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(vision_use_head=False, projection_dim=32, **VISION)
    text = tf.Gemma2Config(**TEXT, sliding_window=12, query_pre_attn_scalar=8)
    return tf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)


def idefics3(kind: str = "Idefics3") -> PreTrainedConfig:
    vision = getattr(tf, f"{kind}VisionConfig")(**VISION)
    text = tf.LlamaConfig(**TEXT)
    return getattr(tf, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


def per_sample(samples: list[list[Pixels]]) -> Pixels:
    """[batch, most images, 3, height, width]: missing images are zeros, which the model takes for padding."""
    counts = [sum(len(p["pixel_values"]) for p in sample) for sample in samples]
    pixels = torch.zeros(len(samples), max(counts), 3, 16, 16)
    for row, sample in enumerate(samples):
        if sample:
            pixels[row, : counts[row]] = torch.cat([p["pixel_values"] for p in sample])
    return {"pixel_values": pixels}


def mistral3() -> PreTrainedConfig:
    vision = tf.PixtralVisionConfig(**VISION | {"image_size": 32})
    text = tf.MistralConfig(**TEXT, sliding_window=None)
    return tf.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, spatial_merge_size=2)


def mistral3_sliding() -> PreTrainedConfig:
    config = mistral3()
    config.text_config.sliding_window = 10
    return config


def broken_rows(kind: str, generator: torch.Generator) -> tuple[list[int], Pixels]:
    """Rows of visual tokens, [IMG_BREAK] between them and [IMG_END] after the last."""
    high, wide = (2, 4) if kind == "large image" else (2, 2)
    ids = ([IMAGE] * wide + [BREAK]) * high
    pixels = torch.randn(1, 3, 16, 32, generator=generator)
    pixels[..., wide * 8 :] = 0
    return [*ids[:-1], END], {"pixel_values": pixels, "image_sizes": torch.tensor([[high * 8, wide * 8]])}


QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def qwen2_vl() -> PreTrainedConfig:
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **QWEN_VISION}
    return tf.Qwen2VLConfig(text_config={**TEXT, ROTATION: MROPE}, vision_config=vision, **QWEN_IDS)


def qwen2_5_vl() -> PreTrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        **QWEN_VISION,
    }
    return tf.Qwen2_5_VLConfig(text_config={**TEXT, ROTATION: MROPE}, vision_config=vision, **QWEN_IDS)


def qwen3_vision() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        **QWEN_VISION,
    }


def qwen3_vl() -> PreTrainedConfig:
    vision = qwen3_vision() | {"deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, ROTATION: MROPE | {"mrope_interleaved": True}}
    return tf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def qwen3_5() -> PreTrainedConfig:
    text = {
        **TEXT,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        ROTATION: MROPE | {"partial_rotary_factor": 1.0},
    }
    return tf.Qwen3_5Config(text_config=text, vision_config=qwen3_vision(), **QWEN_IDS)


def glm4v() -> PreTrainedConfig:
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "image_size": 16, **QWEN_VISION}
    text = {**TEXT, ROTATION: MROPE | {"partial_rotary_factor": 1.0}}
    return tf.Glm4vConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
    )


def grid(kind: str, generator: torch.Generator) -> tuple[list[int], Pixels]:
    """An image of 4 x 4 or 4 x 8 patches, four of which make a token; a video has two such frames."""
    frames, high, wide = {"image": (1, 4, 4), "large image": (1, 4, 8), "video": (2, 4, 4)}[kind]
    patches = torch.randn(frames * high * wide, 3 * 2 * 4 * 4, generator=generator)
    name, token = ("video", VIDEO) if kind == "video" else ("image", IMAGE)
    key = "pixel_values_videos" if kind == "video" else "pixel_values"
    ids = [START, *[token] * (frames * high * wide // 4), END]
    return ids, {key: patches, f"{name}_grid_thw": torch.tensor([[frames, high, wide]])}


def grid_with_timestamps(kind: str, generator: torch.Generator) -> tuple[list[int], Pixels]:
    """Like :func:`grid`; the frames of a video stand apart, each after a time in words."""
    ids, pixels = grid(kind, generator)
    if kind == "video":
        ids = [20, START, *[VIDEO] * 4, END, 21, START, *[VIDEO] * 4, END]
    return ids, pixels


def token_types(ids: torch.Tensor, name: str = "mm_token_type_ids") -> Pixels:
    return {name: (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def ovis2() -> PreTrainedConfig:
    vision = tf.models.ovis2.Ovis2VisionConfig(
        **VISION, vocab_size=40, hidden_stride=1, num_visual_indicator_tokens=5, rms_norm_eps=1e-5
    )
    text = tf.Qwen2Config(**TEXT)
    return tf.Ovis2Config(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        visual_indicator_token_ids=(95, 96, 97, 98, 99),
        vocab_size=100,
        hidden_size=32,
    )


BOTH = ("image", "large image")
ALL = ("image", "large image", "video")
FAMILIES = {
    family.name: family
    for family in (
        Family("llava", llava, "LlavaForConditionalGeneration", lambda k, g: plain_image(16, k, g), looks=BOTH),
        Family("llava_next", llava_next, "LlavaNextForConditionalGeneration", anyres, looks=BOTH),
        Family("llava_onevision", llava_onevision, "LlavaOnevisionForConditionalGeneration", anyres, looks=ALL),
        Family("vipllava", vipllava, "VipLlavaForConditionalGeneration", lambda k, g: plain_image(16, k, g)),
        Family(
            "video_llava", video_llava, "VideoLlavaForConditionalGeneration", frames_or_image, looks=("image", "video")
        ),
        Family(
            "internvl",
            internvl,
            "InternVLForConditionalGeneration",
            lambda k, g: plain_image(4, k, g, (START, END)),
            looks=BOTH,
        ),
        Family(
            "qwen2_vl",
            qwen2_vl,
            "Qwen2VLForConditionalGeneration",
            grid,
            looks=ALL,
            extra=token_types,
            later_images=False,
        ),
        Family(
            "qwen2_5_vl",
            qwen2_5_vl,
            "Qwen2_5_VLForConditionalGeneration",
            grid,
            looks=ALL,
            extra=token_types,
            later_images=False,
        ),
        Family(
            "qwen3_vl",
            qwen3_vl,
            "Qwen3VLForConditionalGeneration",
            grid_with_timestamps,
            first=2,
            looks=ALL,
            extra=token_types,
            later_images=False,
        ),
        Family(
            "gemma3",
            gemma3,
            "Gemma3ForConditionalGeneration",
            lambda k, g: plain_image(4, k, g, (START, END)),
            looks=BOTH,
            extra=lambda ids: token_types(ids, "token_type_ids"),
        ),
        Family(
            "paligemma",
            paligemma,
            "PaliGemmaForConditionalGeneration",
            lambda k, g: plain_image(16, k, g),
            extra=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        ),
        Family(
            "paligemma2",
            paligemma2,
            "PaliGemmaForConditionalGeneration",
            lambda k, g: plain_image(16, k, g),
            attentions=("eager",),
            extra=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        ),
        Family(
            "idefics3",
            idefics3,
            "Idefics3ForConditionalGeneration",
            lambda k, g: plain_image(4, k, g, (START, END)),
            per_sample,
            looks=BOTH,
        ),
        Family(
            "smolvlm",
            lambda: idefics3("SmolVLM"),
            "SmolVLMForConditionalGeneration",
            lambda k, g: plain_image(4, k, g, (START, END)),
            per_sample,
            looks=BOTH,
        ),
        Family("mistral3", mistral3, "Mistral3ForConditionalGeneration", broken_rows, looks=BOTH),
        Family("mistral3_sliding", mistral3_sliding, "Mistral3ForConditionalGeneration", broken_rows, looks=BOTH),
        Family(
            "aya_vision", aya_vision, "AyaVisionForConditionalGeneration", lambda k, g: plain_image(4, k, g), looks=BOTH
        ),
        Family(
            "glm4v", glm4v, "Glm4vForConditionalGeneration", grid, looks=BOTH, extra=token_types, later_images=False
        ),
        Family(
            "ovis2", ovis2, "Ovis2ForConditionalGeneration", lambda k, g: plain_image(16, k, g, (95, 96)), looks=BOTH
        ),
    )
}


@functools.cache
def takes_guesses(family: Family) -> bool:
    """Whether transformers decodes its dense model by prompt lookup: up to 5.0 sliding caches cannot be cropped."""
    inputs = family.batch([20])
    inputs["input_ids"][:] = 7
    try:
        family.build("eager").generate(**inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    except ValueError as error:
        if "Cannot `crop`" not in str(error):
            raise
        return False
    return True


@torch.no_grad()
def answers_alike_cached(family: Family) -> bool:
    """Whether a dense model answers alike with and without a cache."""
    inputs, model = family.batch([3, "image", 9]), family.build("eager")
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (torch.cat(model.generate(**inputs, use_cache=use, **settings).logits) for use in (True, False))
    return torch.allclose(cached, uncached, atol=1e-4)


# Up to transformers 5.0 its masks have more columns than its sliding caches, so the definition, which is a mask, says
# nothing about its decoding.
if not answers_alike_cached(FAMILIES["paligemma2"]):
    del FAMILIES["paligemma2"]


def gemma3n() -> PreTrainedConfig:
    return tf.Gemma3nTextConfig(
        **TEXT | {"intermediate_size": [48] * LAYERS},
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * LAYERS,
        num_kv_shared_layers=0,
    )


def gemma4() -> PreTrainedConfig:
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "global_head_dim": 8}
    return tf.Gemma4Config(text_config={**TEXT, **sizes}, vision_config=vision, image_token_id=IMAGE)


def mllama() -> PreTrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "num_global_layers": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    return tf.MllamaConfig(
        text_config={**TEXT, ROTATION: {"rope_type": "default", "rope_theta": 10000.0}, "cross_attention_layers": [1]},
        vision_config=vision,
        image_token_index=IMAGE,
    )


def llama4() -> PreTrainedConfig:
    vision = {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    text = {**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 48}
    return tf.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)


def llama_with_shared_keys() -> PreTrainedConfig:
    config = tf.LlamaConfig(**TEXT)
    config.kv_sharing_modes = ["own"] * (LAYERS - 1) + ["reuse"]
    return config


# name: (config, class, what the refusal says)
REFUSED = {
    "mllama": (mllama, "MllamaForConditionalGeneration", "cross attention, so there are no visual tokens"),
    "shared keys": (llama_with_shared_keys, "LlamaForCausalLM", "no keys and values of its own"),
}
