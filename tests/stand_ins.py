"""Packages that stand in for code bases outside transformers: their interfaces, around the small models of
test_sentinel_models.py. Nothing here is theirs."""

from __future__ import annotations

import sys
import types

import numpy as np
import torch
from models import CACHE, llama_config
from test_sentinel_models import CONTEXT, SENTINEL, TOKENS, ChatModel, SpliceModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "be",
    "brief",
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "this",
    "that",
    "red",
    "no",
]
MEDIA = 60


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    vocabulary |= {f"w{place}": place for place in range(len(WORDS), 100)}
    for word, place in (("<img>", 61), ("</img>", 62), ("<IMG_CONTEXT>", CONTEXT)):
        del vocabulary[f"w{place}"]
        vocabulary[word] = place
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = ["<img>", "</img>", "<IMG_CONTEXT>"]
    chat = "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}ASSISTANT:"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=special, chat_template=chat, **names
    )


class Conversation:
    roles, sep = ("USER", "ASSISTANT"), "</s>"

    def __init__(self):
        self.system, self.messages = "be brief", []

    def copy(self):
        return type(self)()

    def append_message(self, role, message):
        self.messages.append((role, message))

    def get_prompt(self):
        turns = [f"{role}: {message}" if message else f"{role}:" for role, message in self.messages]
        return " ".join([self.system, *turns])


class MessageConversation(Conversation):
    """InternVL's name for the system prompt."""

    def __init__(self):
        self.system_message, self.messages = "be brief", []

    system = property(lambda self: self.system_message)


def tokenizer_image_token(prompt, own, image_token_index=SENTINEL, return_tensors=None):
    first, *rest = [own(chunk).input_ids for chunk in prompt.split("<image>")]
    return first + [one for chunk in rest for one in [image_token_index, *chunk[1:]]]


def process_images(images, image_processor, model_cfg):
    """Mean colours, and a one: what the models here have for an image."""
    return torch.stack([image_processor(image) for image in images])


def colours(image):
    pixels = torch.tensor(np.array(image)).float().flatten(0, 1) / 128 - 1
    return torch.cat([pixels.mean(0), torch.ones(1)])


def prepare(model, attention="eager"):
    torch.manual_seed(0)
    model = model.eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def config(attention):
    made = llama_config()
    made._attn_implementation = attention
    return made


class Llava(SpliceModel):
    """Its arguments, and no others."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, images=None, image_sizes=None, return_dict=None):  # fmt: skip
        self.padding_side = getattr(self.config, "tokenizer_padding_side", "right")
        assert image_sizes is None or len(image_sizes) == len(images)
        return super().forward(input_ids, attention_mask, position_ids, inputs_embeds, labels, use_cache, images,
                               **{CACHE: past_key_values})  # fmt: skip

    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        self.padding_side = getattr(self.config, "tokenizer_padding_side", "right")
        return super().generate(inputs, images, **kwargs)


class Vila(nn.Module):
    """VILA-1.5: the language model is a part, and has no images."""

    def __init__(self, made):
        super().__init__()
        self.config, self.llm, self.vision = made, LlamaForCausalLM(made), nn.Linear(4, TOKENS * made.hidden_size)
        self.dtype, self.generation_config = torch.float32, None

    device = property(lambda self: self.vision.weight.device)
    model = property(lambda self: self.llm.model)
    encode_images = SpliceModel.encode_images
    encoded = 0
    padding_side = property(lambda self: getattr(self.llm.config, "tokenizer_padding_side", "right"))
    prepare_inputs_labels_for_multimodal = SpliceModel.prepare_inputs_labels_for_multimodal

    def get_output_embeddings(self):
        return self.llm.lm_head

    def forward(self, input_ids=None, images=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None):  # fmt: skip
        if inputs_embeds is None:
            _, position_ids, attention_mask, _, inputs_embeds, _ = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images
            )
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
                        use_cache=use_cache)  # fmt: skip

    @torch.no_grad()
    def generate(self, input_ids=None, images=None, attention_mask=None, **kwargs):
        spliced = self.prepare_inputs_labels_for_multimodal(input_ids, None, attention_mask, None, None, images)
        return self.llm.generate(inputs_embeds=spliced[4], attention_mask=spliced[2], **kwargs)


class Nvila(Vila):
    """NVILA: media by name; ids are read from the first column on, whatever the mask says of it."""

    prepare_inputs_labels_for_multimodal = property()

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        assert attention_mask.dtype == torch.bool and media_config["image"] == {}
        labels = torch.full_like(input_ids, -100) if labels is None else labels
        features, rows = iter(self.vision(torch.stack(media["image"])).view(-1, TOKENS, self.config.hidden_size)), []
        for ids, keep, own in zip(input_ids, attention_mask, labels):
            own, states, marks = own[keep], [], []
            for place in range(len(own)):
                image = ids[place] == MEDIA
                states.append(next(features) if image else self.llm.model.embed_tokens(ids[place])[None])
                marks += [-100] * TOKENS if image else [own[place]]
            rows.append((torch.cat(states), torch.tensor(marks)))
        longest = max(len(marks) for _, marks in rows)
        pads = [longest - len(marks) for _, marks in rows]
        embeds = torch.stack([nn.functional.pad(states, (0, 0, pad, 0)) for (states, _), pad in zip(rows, pads)])
        marks = torch.stack([nn.functional.pad(marks, (pad, 0), value=-100) for (_, marks), pad in zip(rows, pads)])
        return embeds, marks, torch.arange(longest) >= torch.tensor(pads)[:, None]

    def forward(self, input_ids=None, media=None, media_config=None, attention_mask=None, position_ids=None,
                inputs_embeds=None, labels=None, **kwargs):  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds, _, attention_mask = self._embed(input_ids, media, media_config, labels, attention_mask)
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids=None, media=None, media_config=None, attention_mask=None, **kwargs):
        embeds, _, mask = self._embed(input_ids, media, media_config, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


class InternVLChatModel(ChatModel):
    """InternVL-Chat: ids hold the visual tokens; ``forward`` must be told which tiles belong to images."""

    num_image_token, template, system_message, img_context_token_id = TOKENS, "internvl", "be brief", None
    dtype = torch.float32
    device = property(lambda self: self.mlp1.weight.device)

    def __init__(self, made):
        super().__init__(made)
        made.force_image_size, made.dynamic_image_size, made.use_thumbnail = 8, True, False
        made.min_dynamic_patch, made.max_dynamic_patch = 1, 2
        self.vision, self.mlp1 = None, nn.Linear(4, TOKENS * made.hidden_size)

    @classmethod
    def from_pretrained(cls, path, dtype="auto"):
        model = prepare(cls(config("eager")))
        model.generation_config.suppress_tokens = [CONTEXT]  # random weights answer with anything
        return model

    def extract_feature(self, pixel_values):
        return self.mlp1(pixel_values).view(-1, self.config.hidden_size)

    def get_output_embeddings(self):
        return self.language_model.lm_head

    def embeds(self, input_ids, pixel_values):
        assert self.img_context_token_id == CONTEXT
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        embeds[input_ids == self.img_context_token_id] = self.extract_feature(pixel_values)
        return embeds

    def forward(self, pixel_values, input_ids=None, attention_mask=None, position_ids=None, image_flags=None,
                past_key_values=None, labels=None, use_cache=None, return_dict=None):  # fmt: skip
        assert image_flags.squeeze(-1).tolist() == [1] * len(pixel_values) and return_dict
        return self.language_model(inputs_embeds=self.embeds(input_ids, pixel_values), attention_mask=attention_mask,
                                   position_ids=position_ids, use_cache=use_cache)  # fmt: skip

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        embeds = self.embeds(input_ids, pixel_values)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def install(monkeypatch, name: str, attention: str = "eager") -> None:
    """Puts the stand-in of a code base where its package would be."""
    package = {"llava": "llava", "eagle": "eagle", "vila": "llava", "nvila": "llava", "internvl_chat": "internvl"}[name]
    made = {"llava": Llava, "eagle": Llava, "vila": Vila, "nvila": Nvila}.get(name)

    def build(path, model_base, model_name, device_map="auto", device="cuda", **kwargs):
        assert model_base is None and device_map == device == "cpu" and package in model_name.lower()
        settings = config(kwargs.get("attn_implementation", attention))
        return tokenizer(), prepare(made(settings)), colours, 2048

    def build_vila(path, model_name, model_base, device_map="auto", device="cuda"):
        assert model_base is None and device_map == device == "cpu"
        model = made(config(attention))
        model.generation_config = model.llm.generation_config
        prepare(model).generation_config = None
        return tokenizer(), model, colours, 2048

    def dynamic_preprocess(image, min_num, max_num, image_size, use_thumbnail):
        wide = min(max_num, max(min_num, image.width // image.height))
        return [image.crop((i * image.height, 0, (i + 1) * image.height, image.height)) for i in range(wide)]

    splice = tokenizer_image_token
    if name == "nvila":

        def splice(prompt, own):
            return tokenizer_image_token(prompt, own, MEDIA)

    builder = build_vila if "vila" in name else build
    templates = dict.fromkeys(["llava_v1", "vicuna_v1", "llama_3", "v1"], Conversation())
    messages = MessageConversation()
    contents = {
        "model.builder": {"load_pretrained_model": builder},
        "mm_utils": {
            "get_model_name_from_path": lambda path: path.split("/")[-1],
            "process_images": process_images,
            "tokenizer_image_token": splice,
        },
        "conversation": {"conv_templates": templates},
        "model.internvl_chat": {"InternVLChatModel": InternVLChatModel},
        "train.dataset": {
            "build_transform": lambda is_train, input_size: colours,
            "dynamic_preprocess": dynamic_preprocess,
        },
    }
    if name == "internvl_chat":
        contents["conversation"] = {
            "conv_templates": {"internvl": messages},
            "get_conv_template": lambda n: messages.copy(),
        }
    for module in ("", "model", "train", *contents):
        path = f"{package}.{module}".rstrip(".")
        made_module = types.ModuleType(path)
        made_module.__path__ = []
        vars(made_module).update(contents.get(module, {}))
        monkeypatch.setitem(sys.modules, path, made_module)
