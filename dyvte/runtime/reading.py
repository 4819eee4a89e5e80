"""What a method reads of a model beside its tokens, so that it is kept while the model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.vision import VisionReader, VisionTower


def attention_layers(spec: DecoderSpec, method: Reduction) -> tuple[int, ...]:
    """The decoder layers whose attention a method reads."""
    read = {
        layer - 1
        for part in method.parts()
        if part.reads_attention
        for layer in (part.layers if part.layers is not None else range(1, spec.num_layers))
    }
    return tuple(sorted(read - {-1}))


def tower_of(spec: DecoderSpec, method: Reduction) -> Callable[[], VisionReader] | None:
    """Begins to watch the vision tower for a method; None if it does not look there.

    Raises:
        ValueError: it does, and the model has no tower that can be read.
    """
    seen = [part.reads_vision for part in method.parts() if part.reads_vision is not None]
    return functools.partial(VisionTower(spec.model).watch, seen) if seen else None
