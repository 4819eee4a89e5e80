"""Batches of the second stage: many questions share one image.

A question sees the image and itself but no other question, so a turn in training looks exactly like a prompt at
inference.
"""

from __future__ import annotations

import random

import torch
from transformers import LlavaProcessor

from dyvte.data import scenes

from .model import EOS, PAD, normalise

KINDS = list(scenes.KINDS)
IGNORED = -100  # a label that has no loss


class Turns:
    """Packs scenes with their questions and answers."""

    def __init__(self, processor: LlavaProcessor, image_tokens: int):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.prefix = self.tokenizer("USER: <image>").input_ids
        self.prefix = self.prefix[:-1] + self.prefix[-1:] * image_tokens

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a turn, and their labels, shifted by one already."""
        ids = self.tokenizer(question + " ASSISTANT:", add_special_tokens=False).input_ids
        answer_ids = self.tokenizer(answer, add_special_tokens=False).input_ids + [EOS]
        return ids + answer_ids, [IGNORED] * (len(ids) - 1) + answer_ids + [IGNORED]

    def pack(self, batch: scenes.Scenes, turns: int, weights: list[float], seed: int) -> dict:
        """Random questions about every scene.

        Args:
            batch: n scenes.
            turns: questions about each of them.
            weights: how often each of ``KINDS`` is asked.
            seed: of the questions.

        Returns:
            ``inputs`` of the model, ``labels``, ``turn`` (0: the image, which all see; -1: padding) and ``kind`` (of
            the question, an index; -1: none), the last three long [n, sequence].
        """
        rng = random.Random(seed)
        scenes_asked = zip(batch.digits.tolist(), batch.colours.tolist())
        rows = [self._row(digits, colours, turns, weights, rng) for digits, colours in scenes_asked]
        # Few distinct lengths: matrix kernels are compiled anew for every shape.
        length = -(-max(len(row[0]) for row in rows) // 32) * 32
        fills = (PAD, IGNORED, -1, 0, -1)
        ids, labels, turn, position, asked = (
            torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows]) for i, fill in enumerate(fills)
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = causal & ((turn[:, None] == 0) | (turn[:, None] == turn[:, :, None]))
        mask = torch.zeros(visible.shape, dtype=torch.bfloat16)
        mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[:, None]
        inputs = {
            "input_ids": ids,
            "pixel_values": normalise(batch.images, self.processor),
            "attention_mask": mask,
            "position_ids": position,
        }
        return {"inputs": inputs, "labels": labels, "turn": turn, "kind": asked}

    def _row(
        self,
        digits: list[list[int]],
        colours: list[list[int]],
        turns: int,
        weights: list[float],
        rng: random.Random,
    ) -> tuple[list[int], ...]:
        """Ids, labels, turns, positions and kinds of one scene; every question has the positions after the image."""
        image = len(self.prefix)
        ids, labels = list(self.prefix), [IGNORED] * image
        turn, position, asked = [0] * image, list(range(image)), [-1] * image
        for t in range(1, turns + 1):
            question = None
            while question is None:  # not every scene allows every kind
                kind = rng.choices(range(len(KINDS)), weights)[0]
                question = scenes.ask(KINDS[kind], digits, colours, rng)
            new_ids, new_labels = self.encode(*question)
            ids, labels = ids + new_ids, labels + new_labels
            turn, asked = turn + [t] * len(new_ids), asked + [kind] * len(new_ids)
            position += range(image, image + len(new_ids))
        return ids, labels, turn, position, asked
