"""What a model costs to trace, in closed form: forwards, and bytes on the disk and on each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from dyvte.config import ModelConfig
from dyvte.evaluation.costs import kv_width
from dyvte.loading import load_empty
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.trace import traced_exits
from dyvte.training.trace_pass import LOGITS_AT_ONCE

BITS = {"load_in_4bit": 4, "load_in_8bit": 8}
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
KEYS = ("num_key_value_heads", "head_dim")
ITEM = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes
WEIGHTS = ("*.safetensors", "*.bin")  # files of them
SHARED = ("zero3", "fsdp2", "tp")  # forms in which ranks share one copy of the weights


@dataclass(frozen=True)
class Shape:
    """A model, as far as costs depend on it.

    Attributes:
        layers, size, inner, vocabulary: of the decoder.
        exits: the exit layers that are traced.
        parameters: of the whole model.
        weight_bytes: of a whole copy.
        item_bytes: of one number in a state.
        kv: numbers that a layer keeps of a token in the cache.
    """

    layers: int
    size: int
    inner: int
    vocabulary: int
    exits: tuple[int, ...]
    parameters: int
    weight_bytes: int
    item_bytes: int
    kv: int

    @classmethod
    def of(cls, config: ModelConfig, exits: int | Sequence[int] | None) -> Shape:
        model = load_empty(config)
        spec = DecoderSpec.of(model)
        weights = list(model.parameters())
        item = next(weight.element_size() for weight in weights if weight.is_floating_point())
        bits = next((bits for name, bits in BITS.items() if (config.quantization or {}).get(name)), 8 * item)
        decoder = spec.config
        count = sum(weight.numel() for weight in weights)
        return cls(
            spec.num_layers,
            decoder.hidden_size,
            getattr(decoder, "intermediate_size", 4 * decoder.hidden_size),
            decoder.vocab_size,
            tuple(traced_exits(exits, spec)),
            count,
            count * bits // 8,
            item,
            kv_width(decoder),
        )

    @classmethod
    def described(cls, config: ModelConfig, exits: int | Sequence[int] | None) -> Shape | None:
        """Of a model of another code base, as far as its ``config.json`` and the sizes of its files tell; else None.

        Exits that the model does not allow are counted, too: these its loader alone knows.
        """
        decoder = _decoder(config)
        if decoder is None:
            return None
        layers, stored, item = decoder.num_hidden_layers, _stored_bytes(Path(config.model)), ITEM[config.dtype]
        traced = range(1, layers, exits or 1) if exits is None or isinstance(exits, int) else exits
        sizes = decoder.hidden_size, decoder.intermediate_size, decoder.vocab_size
        return cls(layers, *sizes, tuple(traced), stored // item, stored, item, kv_width(decoder))

    @property
    def sample_bytes(self) -> int:
        """What the numbers of one trace take on the disk, see :mod:`dyvte.training.units`."""
        return 2 * self.layers * 2 * self.size + 2 * self.size + (4 + 2 + 2) * self.layers + 4

    def forwards(self, text: float, tokens: float) -> float:
        """Passes of the dense model that one trace costs: its own, and the text alone after every exit.

        Args:
            text: text tokens, those of the answer included.
            tokens: all tokens.
        """
        return 1 + sum(self.layers - e for e in self.exits) / self.layers * text / tokens

    def pass_bytes(self, batch: int, text: float, tokens: float, answer: int, whole_logits: bool) -> int:
        """The widest moment of a traced batch, beside the weights.

        Args:
            answer: tokens of the answer.
            whole_logits: all logits at once, since ranks share the head.
        """
        branches = len(self.exits)
        layer = self._layer_bytes(batch * (tokens + branches * text))
        logits = (branches + 1) * batch * answer * self.vocabulary * 4
        states = batch * self.layers * 2 * self.size * 4
        return round(max(layer, logits if whole_logits else min(logits, LOGITS_AT_ONCE)) + states)

    def answer_bytes(self, batch: int, tokens: float) -> int:
        """The widest moment of greedy answers, beside the weights: the whole cache, and the prompts in one layer."""
        return round(self.cache_bytes(batch, tokens) + self._layer_bytes(batch * tokens))

    def cache_bytes(self, batch: int, tokens: float) -> int:
        """Keys and values of a batch that is answered."""
        return round(batch * tokens * self.layers * self.kv * self.item_bytes)

    def device_bytes(
        self, batch: int, text: float, tokens: float, answer: int, shard: str, ranks: int, greedy: bool
    ) -> int:
        """Weights on each device, and the widest moment beside them.

        Args:
            shard: how ``ranks`` share the model, see :class:`dyvte.config.ModelConfig`.
            greedy: the model answers before it is traced.
        """
        shared = shard in SHARED and ranks > 1
        kept = self.weight_bytes // ranks if shared else self.weight_bytes
        gathered = self.weight_bytes // self.layers if shared and shard != "tp" else 0  # a layer, while it runs
        inside = self.pass_bytes(batch, text, tokens, answer, shard in ("zero3", "tp"))
        return kept + gathered + max(inside, self.answer_bytes(batch, tokens) if greedy else 0)

    def _layer_bytes(self, rows: float) -> float:
        return rows * (2 * self.size + 3 * self.inner) * self.item_bytes


def _decoder(config: ModelConfig) -> PretrainedConfig | None:
    """What the files of a model say about its decoder of language, wherever a code base writes it."""
    for place in ("", "llm"):  # the second is VILA's
        try:
            told, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision, subfolder=place)
        except OSError:
            continue
        for found in (told, *(inner for inner in told.values() if isinstance(inner, Mapping))):
            if all(isinstance(found.get(name), int) for name in NEEDED):
                return PretrainedConfig(**{name: found[name] for name in {*NEEDED, *KEYS} & {*found}})
    return None


def _stored_bytes(folder: Path) -> int:
    """Of the weights in a folder; those of a model that is stored twice count once."""
    return next(filter(None, (sum(p.stat().st_size for p in folder.rglob(kind)) for kind in WEIGHTS)), 0)
