"""Data sets as they lie on people's disks, in miniature, and a processor that can spell out every prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def picture(shade: int = 0, size: tuple[int, int] = (24, 18)) -> Image.Image:
    image = Image.new("RGB", size, (shade, 10, 20))
    image.putdata([(shade, x * 7 % 256, x * 13 % 256) for x in range(size[0] * size[1])])
    return image


def said(*texts: str | None, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation in LLaVA's form: human and gpt in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ([] if system is None else [{"from": "system", "value": system}]) + turns


def messages(conversation: list[dict[str, Any]], parts: bool = False) -> list[dict[str, Any]]:
    """The same conversation with roles; with ``parts``, pictures and texts are apart."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        {"role": roles[turn["from"]], "content": _parts(turn["value"]) if parts else turn["value"]}
        for turn in conversation
    ]


def _parts(text: str) -> list[dict[str, Any]]:
    first, *rest = text.split("<image>")
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image", "text": None}, {"type": "text", "text": piece}]
    return parts


def save_picture(folder: Path, name: str, shade: int = 0) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture(shade).save(folder / name)


def llava(folder: Path, rows: list[Any]) -> dict[str, Any]:
    """Writes a mixture with all the pictures it names that are not there yet; returns its config."""
    names = [name for row in rows for name in as_list(row.get("image"))]
    for shade, name in enumerate(dict.fromkeys(names)):
        if not (folder / "images" / name).exists():
            save_picture(folder / "images", name, shade)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mix.json").write_text(json.dumps(rows))
    return {"path": str(folder / "mix.json"), "images": str(folder / "images"), "format": "llava"}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def spelling_processor() -> LlavaProcessor:
    """A LLaVA processor whose tokens are bytes, so that decoding gives back every letter of a prompt."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        pixels,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
