"""What an exit saves, in closed form: floating-point operations of a prompt's pass through the decoder.

Counted as ``torch.utils.flop_counter`` counts: two per multiply-add of matrix products and attention (full squares, no
causal halving); norms, rotations and activations are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.runtime.compat import PreTrainedConfig


def layer_flops(config: PreTrainedConfig, tokens: int) -> int:
    """One decoder layer (attention with grouped queries, gated MLP) over ``tokens`` tokens of one sample."""
    size, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    projections = 2 * size * heads * head_dim + size * kv_width(config)
    attention = 2 * tokens * heads * head_dim
    return 2 * tokens * (projections + attention + 3 * size * inner)


def pass_flops(config: PreTrainedConfig, text: int, counts: Sequence[int]) -> int:
    """The prompt's pass of one sample through all decoder layers and, for the last token, the output head.

    Args:
        config: of the decoder (``model.config.get_text_config()``).
        text: text tokens of the prompt.
        counts: the visual tokens that each layer works on, see :class:`dyvte.runtime.PromptRecord`.
    """
    return sum(layer_flops(config, text + count) for count in counts) + 2 * config.hidden_size * config.vocab_size


def attention_flops(config: PreTrainedConfig, tokens: int) -> int:
    """What it takes to read one row of a layer's attention: its scores, from queries and keys that the layer made.

    Args:
        config: of the decoder.
        tokens: that the layer works on.
    """
    return 2 * _head_dim(config) * config.num_attention_heads * tokens


def kv_width(config: PreTrainedConfig) -> int:
    """Numbers that a layer keeps of a token in the cache: its key and its value."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * _head_dim(config)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def prefill_flops(config: PreTrainedConfig, text: int, visual: int, exit_layer: int) -> int:
    """:func:`pass_flops` with an exit.

    Args:
        config: of the decoder (``model.config.get_text_config()``).
        text: text tokens of the prompt.
        visual: its visual tokens.
        exit_layer: how many layers see the visual tokens, 1 ... L.

    Raises:
        ValueError: an exit layer outside 1 ... L.
    """
    layers = config.num_hidden_layers
    if not 1 <= exit_layer <= layers:
        raise ValueError(f"exit layer {exit_layer} is outside 1 ... {layers}")
    return pass_flops(config, text, [visual] * exit_layer + [0] * (layers - exit_layer))
