"""Prompts for the models of :mod:`zoo`, as their processors would make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from zoo import IMAGE, PAD
from zoo_fixes import FIXES

Piece = int | str


def vision_size(config: PreTrainedConfig, *names: str, default: int) -> int:
    """The first of these fields that the vision part of a config has."""
    vision = getattr(config, "vision_config", None)
    found = (getattr(vision, name, None) for name in names)
    value = next((v for v in found if v is not None), default)
    return value[0] if isinstance(value, (tuple, list)) else value


def pixels(model: PreTrainedModel, name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What the processor of this model would make of one image, by the names that the model takes."""
    shapes = FIXES.get(name, {}).get("pixels")
    if shapes is None:
        takes = inspect.signature(features_of(model)).parameters
        if "image_grid_thw" in takes:
            patch = vision_size(model.config, "patch_size", default=4)
            frames = vision_size(model.config, "temporal_patch_size", "patch_temporal", default=1)
            shapes = {"pixel_values": (16, 3 * frames * patch**2), "image_grid_thw": [[1, 4, 4]]}
        else:
            side = vision_size(model.config, "image_size", default=16)
            shapes = {"pixel_values": (1, 3, side, side)}
    return {
        key: torch.randn(shape, generator=generator) if isinstance(shape, tuple) else torch.tensor(shape)
        for key, shape in shapes.items()
    }


def features_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The method that encodes images, of the model or of the one that it wraps."""
    return next(m.get_image_features for m in (model, model.base_model) if hasattr(m, "get_image_features"))


@torch.no_grad()
def count_tokens(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> int:
    """How many visual tokens the model makes of an image: asked, not computed."""
    features = features_of(model)(**given)
    if not isinstance(features, (tuple, list)):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    parts = features if isinstance(features, (tuple, list)) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def inputs(model: PreTrainedModel, name: str, *prompts: list[Piece], seed: int = 0) -> dict[str, Any]:
    """A left-padded batch of prompts, each a list of pieces: a number of text tokens, or "image"."""
    fixes, takes = FIXES.get(name, {}), inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    looked: list[dict[str, torch.Tensor]] = []
    sample: list[int] = []
    for row, prompt in enumerate(prompts):
        ids = []
        for piece in prompt:
            if piece == "image":
                looked.append(pixels(model, name, generator))
                sample.append(row)
                before, after = fixes.get("around", ((), ()))
                tokens = fixes.get("tokens") or count_tokens(model, looked[-1])
                ids += [*before, *[IMAGE] * tokens, *after]
            else:
                ids += torch.randint(3, 80, (piece,), generator=generator).tolist()
        rows.append(ids)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    given = {"input_ids": ids, "attention_mask": mask}
    for types in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if types in takes:
            given[types] = (ids == IMAGE).int() if "answer_type" not in fixes else torch.zeros_like(ids)
    if "mask_as" in fixes:
        given[fixes["mask_as"]] = ids == IMAGE
    for key in looked[0] if looked else ():
        parts = [image[key] for image in looked]
        if key in fixes.get("counts on", {}):
            parts = [part + fixes["counts on"][key] * index for index, part in enumerate(parts)]
        if "per sample" in fixes:  # the images of a sample in a row, zeros after them
            rows_of = [torch.cat([p for p, s in zip(parts, sample) if s == row], 1)[0] for row in range(len(prompts))]
            given[key] = torch.nn.utils.rnn.pad_sequence(rows_of, batch_first=True)
        else:
            given[key] = torch.cat(parts, fixes.get("along", {}).get(key, 0))
    return given


def visual(given: dict[str, Any]) -> torch.Tensor:
    """bool [batch, sequence], the visual tokens."""
    return given["input_ids"] == IMAGE


def extend(name: str, given: dict[str, Any], answer: torch.Tensor) -> dict[str, Any]:
    """The inputs of a prompt and some tokens of its answer, long [batch, tokens], as one whole sequence."""
    longer = dict(given)
    for key, value in given.items():
        if value.shape == given["input_ids"].shape:
            filled = {"attention_mask": 1, "token_type_ids": FIXES.get(name, {}).get("answer_type", 0)}.get(key, 0)
            more = answer if key == "input_ids" else torch.full_like(answer, filled)
            longer[key] = torch.cat([value, more.to(value.dtype)], 1)
    return longer
