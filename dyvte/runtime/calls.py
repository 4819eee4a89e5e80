"""The calls under way on a model: their arguments, what none of them may ask for, and the prompt that they bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dyvte.runtime.cache import check_cache
from dyvte.runtime.compat import call_cache
from dyvte.runtime.decoder import DecoderSpec, visual_token_ids
from dyvte.runtime.prompt import Prompt

VisualMask = torch.Tensor | Callable[[dict[str, Any]], torch.Tensor]
IMAGES = ("pixel_values", "mm_encoder_outputs", "image", "video", "media")  # how arguments that bring images begin
PROMPTS = ("inputs", "input_ids", "inputs_embeds")


class Frame(NamedTuple):
    """One call of ``generate``, of the model or of its decoder."""

    kind: str
    given: dict[str, Any]


class Calls:
    """The calls under way, outermost first. One thread at a time is inside.

    Args:
        spec: the model.
        visual_mask: see :func:`dyvte.attach`.
    """

    def __init__(self, spec: DecoderSpec, visual_mask: VisualMask | None):
        if visual_mask is not None and not isinstance(visual_mask, torch.Tensor) and not callable(visual_mask):
            raise TypeError(
                "visual_mask must be a bool tensor [batch, sequence] or a callable that returns one, not "
                f"{type(visual_mask).__name__}"
            )
        if isinstance(visual_mask, torch.Tensor) and (visual_mask.dtype != torch.bool or visual_mask.ndim != 2):
            raise ValueError(
                "visual_mask must be bool [batch, sequence], True at visual tokens, not "
                f"{visual_mask.dtype} {list(visual_mask.shape)}"
            )
        self.spec, self.visual_mask = spec, visual_mask
        self.visual_ids = None if visual_mask is not None else visual_token_ids(spec.model)
        self.frames: list[Frame] = []

    # What is asked for.

    @property
    def of_model(self) -> list[dict[str, Any]]:
        """Arguments of the model and of its decoder, as far as they were called, since the last ``generate``."""
        inner: list[dict[str, Any]] = []
        for frame in self.frames:
            inner = [] if frame.kind == "generate" else [*inner, frame.given]
        return inner

    @property
    def of_generate(self) -> dict[str, Any]:
        """Arguments of the innermost ``generate``; empty without one."""
        return next((frame.given for frame in reversed(self.frames) if frame.kind == "generate"), {})

    @property
    def merged(self) -> dict[str, Any]:
        """The arguments of all of them by name, those of inner calls first."""
        call: dict[str, Any] = {}
        for given in (*self.of_model, self.of_generate):
            call = given | {name: value for name, value in call.items() if value is not None}
        return call

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask [batch, sequence] that a call was given."""
        given = (call.get("attention_mask") for call in self.of_model)
        return next((mask for mask in given if isinstance(mask, torch.Tensor) and mask.ndim == 2), None)

    def refuse(self, given: Mapping[str, Any], defaults: Any) -> None:
        """Raises ``ValueError`` for what no call may ask for; ``defaults`` holds what is not given."""

        def value(name: str) -> Any:
            return given[name] if given.get(name) is not None else getattr(defaults, name, None)

        if given.get("labels") is not None:
            raise ValueError(
                "labels do not work with visual exit: the prediction of the first text token comes from a visual token "
                "that is gone. Compute the loss from the logits of the text tokens, or detach the exit for training"
            )
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if value(name):
                raise ValueError(
                    f"{name}=True does not work with visual exit: samples and layers hold different tokens. Leave it "
                    "out, or detach the exit to look into the dense model"
                )
        cache = call_cache(given)
        if cache is not None:
            check_cache(cache)
        if self.spec.decoder.training and getattr(self.spec.decoder, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs layers a second time, when the tokens have gone: call model.eval() or "
                "turn checkpointing off"
            )

    def refuse_generate(self, given: Mapping[str, Any], defaults: Any) -> None:
        """Raises ``ValueError`` for ways to generate in which a prompt is not seen as a whole."""
        for name, remedy in (
            ("prefill_chunk_size", "the exit is decided on the whole prompt: leave prefill_chunk_size unset"),
            ("cache_implementation", "only dynamic caches can hold fewer tokens: leave cache_implementation unset"),
        ):
            value = given.get(name, getattr(defaults, name, None))
            if value is not None and value != "dynamic":
                raise ValueError(f"{name}={value!r} does not work with visual exit: {remedy}")

    def refuse_batch(self, given: Mapping[str, Any], check_rows: Callable[[int], None], times: int = 1) -> None:
        """Raises ``ValueError`` for what does not fit the batch of a call, whose samples become ``times`` rows each."""
        tokens, mask, cache = prompt_tokens(given), given.get("attention_mask"), call_cache(given)
        if isinstance(mask, torch.Tensor):
            past = cache.get_seq_length() if cache is not None else 0
            if mask.ndim != 2 or (past == 0 and tokens is not None and mask.shape[1] != tokens.shape[1]):
                raise ValueError(
                    f"an attention_mask {list(mask.shape)} does not say which tokens are padding: pass one "
                    "[batch, sequence]"
                )
        if tokens is not None:
            check_rows(len(tokens) * times)

    # What prompt they bring.

    def prompt(self, hidden: torch.Tensor, mask: Any, past: int) -> tuple[Prompt, torch.Tensor] | None:
        """The new prompt that enters the decoder, and what is not padding before it: bool [batch, past].

        None where there is nothing new to decide on: while decoding, in turns of text.

        Args:
            hidden: the embeddings [batch, sequence, d].
            mask: as the first layer got it.
            past: columns in the cache.
        """
        if past > 0 and not self._brings_images():
            return None
        batch, length = hidden.shape[:2]
        visual, copies = self._visual(batch, length, hidden.device)
        if past > 0 and not bool(visual.any()):
            return None
        limit = self.spec.longest
        if limit is not None and past + length > limit:
            raise ValueError(
                f"a prompt of {past + length} tokens is too long: beyond {limit}, {type(self.spec.decoder).__name__} "
                "scales queries by the row that they stand in, and rows shift once visual tokens are gone. Shorten it, "
                "or use the model without the exit"
            )
        valid = self._valid(batch, past + length, mask, hidden.device)
        answer, ids = self._beyond_prompt(past, length, visual), self._ids(batch, length)
        return Prompt.from_masks(visual, valid[:, past:], answer, ids, copies), valid[:, :past]

    def _brings_images(self) -> bool:
        """Whether a later call has new images: placeholder ids alone may be generated, or guessed by a lookup."""
        if self.visual_mask is not None and not callable(self.visual_mask):
            return False
        given = (item for call in self.of_model for item in call.items())
        return any(value is not None for name, value in given if name.startswith(IMAGES))

    def _visual(self, batch: int, length: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """bool [batch, length], and how many rows belong to one sample."""
        prompts = prompt_tokens(self.of_generate)
        if self.visual_mask is not None:
            mask = self.visual_mask(self.merged) if callable(self.visual_mask) else self.visual_mask
            if mask is self.visual_mask and prompts is not None and mask.shape[1] == prompts.shape[1] < length:
                mask = nn.functional.pad(mask, (0, length - mask.shape[1]))  # guesses, or answers uncached
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape[-1] != length:
                shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"visual_mask must be bool [{batch}, {length}] like the prompt, not {shape}")
        else:
            ids = (call.get("input_ids") for call in (*self.of_model, self.of_generate))
            ids = next((i for i in ids if isinstance(i, torch.Tensor) and i.shape[-1] == length), None)
            if ids is None:
                raise ValueError(
                    "the prompt came as inputs_embeds, which do not show where the visual tokens are: pass visual_mask "
                    "(bool [batch, sequence], True at visual tokens) to visual_exit"
                )
            mask = torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))
        rows = {batch} if prompts is None else {batch, len(prompts)}  # beams and num_return_sequences multiply prompts
        if mask.ndim != 2 or len(mask) not in rows or batch % len(mask):
            raise ValueError(f"visual_mask {list(mask.shape)} does not fit a batch of {batch}: one row per sample")
        copies = 1 if prompts is None else max(batch // len(prompts), 1)
        return mask.repeat_interleave(batch // len(mask), 0).to(device), copies

    def _valid(self, batch: int, length: int, mask: Any, device: torch.device) -> torch.Tensor:
        """bool [batch, length], past tokens included: what is not padding."""
        given = [call.get("attention_mask") for call in self.of_model]
        for found in (*given, mask):
            if isinstance(found, torch.Tensor) and found.ndim == 2 and found.shape[-1] == length:
                return found.bool().to(device).expand(batch, -1)
        first = given[0] if given else None
        if not given and isinstance(mask, torch.Tensor) and mask.ndim == 4 and self.spec.kinds[0].span is None:
            last = mask[:, 0, -1]  # the last query sees all that is not padding
            return (last if last.dtype == torch.bool else last == 0).to(device).expand(batch, -1)
        if isinstance(first, torch.Tensor):
            raise ValueError(
                f"an attention_mask {list(first.shape)} does not say which of the {length} tokens are padding: "
                "pass one [batch, sequence]"
            )
        return torch.ones(batch, length, dtype=torch.bool, device=device)

    def _beyond_prompt(self, past: int, length: int, visual: torch.Tensor) -> torch.Tensor | None:
        """bool [batch, length], what ``generate`` added to its prompt: guesses of an assistant, answers uncached.

        They go with the text but have no say in the decision, which is that of the prompt alone.
        """
        ids = self.of_model[0].get("input_ids") if self.of_model else None
        prompt = prompt_tokens(self.of_generate)
        if prompt is None or not isinstance(ids, torch.Tensor) or ids.shape[1] != length:
            return None
        if prompt.shape[1] >= past + length:
            return None
        return (torch.arange(length, device=visual.device) >= prompt.shape[1] - past).expand_as(visual)

    def _ids(self, batch: int, length: int) -> torch.Tensor | None:
        found = (call.get("input_ids") for call in self.of_model)
        return next((i for i in found if isinstance(i, torch.Tensor) and i.shape == (batch, length)), None)


def prompt_tokens(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Ids or embeddings of the prompts that a call was given, one row per sample."""
    tokens = (given.get(name) for name in PROMPTS)
    return next((t for t in tokens if isinstance(t, torch.Tensor)), None)
