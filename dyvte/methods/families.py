"""Ordered settings: what each method may be set to, from the safest setting to the boldest.

The order is declared before any answer is seen, so that fixed-sequence testing (:mod:`dyvte.promise`) may go along it.
Where a method can do nothing at all, that is the first setting.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dyvte.methods.learned import LearnedExit
from dyvte.methods.registry import METHODS, by_name
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.reduction import Reduction

if TYPE_CHECKING:
    from dyvte.heads import ExitHeads

LEARNED = "learned"
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
Settings = list[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """What settings depend on.

    Attributes:
        layers: decoder layers, L.
        first: how many of them must see all visual tokens, at least 1.
        last: after how many of them visual tokens may leave at the latest, but for never.
        visual: visual tokens of a prompt.
        side: of the square grid that an image's visual tokens make; None: they make none.
    """

    layers: int
    first: int
    last: int
    visual: int
    side: int | None

    @classmethod
    def of(cls, spec: DecoderSpec, visual: int, images: int = 1) -> Shape:
        """Of a model and one of its prompts.

        Args:
            visual: tokens of the prompt's images.
            images: how many these are.
        """
        side = math.isqrt(visual // images)
        square = visual == images * side * side
        return cls(spec.num_layers, spec.min_layer, spec.largest, visual, side if square else None)

    @property
    def exits(self) -> list[int]:
        """Exit layers, the latest first: L, which is never, and those that the model allows."""
        return [self.layers, *range(min(self.last, self.layers - 1), self.first - 1, -1)]

    @property
    def deepest(self) -> list[list[int]]:
        """None of the layers, the deepest, the two deepest, ... all of them, from 0."""
        return [list(range(self.layers - count, self.layers)) for count in range(self.layers + 1)]

    def grid(self) -> int:
        """The side of an image's grid.

        Raises:
            ValueError: there is none.
        """
        if self.side is None:
            raise ValueError(f"{self.visual} visual tokens of a prompt are no square grids: declare settings yourself")
        return self.side


def _shares(argument: str = "keep") -> Callable[[Shape], Settings]:
    return lambda shape: [{argument: share} for share in SHARES]


def _shares_at_layer(shape: Shape) -> Settings:
    return [{"layer": max(2, shape.first), "keep": share} for share in SHARES]


def _deepest(**fixed: Any) -> Callable[[Shape], Settings]:
    return lambda shape: [{"layers": layers} | fixed for layers in shape.deepest]


def _himap(shape: Shape) -> Settings:
    first = max(2, shape.first)
    layers = [first, max(first + 1, shape.layers // 4)]
    return [{"layers": layers, "keep": [share, round(share**3, 6)]} for share in SHARES]  # the paper's is .5, .125


def _hollow(shape: Shape) -> Settings:
    window = min(256, shape.visual // 4)  # the paper's is 256, of thousands
    return [{"layers": layers, "window": window} for layers in shape.deepest]


def _neighbours(shape: Shape) -> Settings:
    side = shape.grid()
    return [{"grid": [side, side], "window": window, "causal": True} for window in range(2 * side - 1, 0, -2)]


FAMILIES: Mapping[str, Callable[[Shape], Settings]] = MappingProxyType(
    {
        "fixed": lambda shape: [{"layer": layer} for layer in shape.exits],
        "random": lambda shape: [{"p": p} for p in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)],
        "prune": _shares_at_layer,
        "downsample": lambda shape: [{"size": size} for size in range(shape.grid(), 0, -1)],
        "fastv": _shares_at_layer,
        "himap": _himap,
        "vtc_cls": _shares(),
        "fopru": _shares(),
        "folder": lambda shape: [{"remove": round(1 - share, 6)} for share in SHARES],
        "divprune": _shares(),
        "image_text_interaction": lambda shape: [{"layer": layer} for layer in shape.exits],
        "par": lambda shape: [{"keep": share, "threshold": 0.9, "share": share} for share in SHARES],
        "hollow_attention": _hollow,
        "probe_ffn": _deepest(probe=0.1, keep=0.2),
        "neighbour_attention": _neighbours,
        "first_neurons": lambda shape: [{"ratio": ratio} for ratio in (1, 1.1, 1.25, 1.5, 2, 3, 4, 8)],
        "layer_cut": lambda shape: [{"layer": layer} for layer in range(shape.layers - 1, -1, -1)],
        "skip_computations": _deepest(part="ffn", rows="visual"),
        "aki": _deepest(),
    }
)


@dataclass(frozen=True)
class Family:
    """Methods at work together, in settings from the safest to the boldest.

    Attributes:
        methods: by name.
        settings: by ``method.argument``, all with the same arguments.

    Raises:
        ValueError: no settings, or some that say more than others or speak of another method.
    """

    methods: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        known = [name for name in (*METHODS, LEARNED) if name != "never"]
        unknown = [name for name in self.methods if name not in known]
        if unknown or not self.methods:
            raise ValueError(f"no family of settings for methods {unknown}: choose from {', '.join(known)}")
        if not self.settings or not all(isinstance(setting, Mapping) for setting in self.settings):
            raise ValueError("settings must be a list of mappings, from the safest to the boldest")
        names = set(self.settings[0])
        for setting in self.settings:
            if set(setting) != names:
                raise ValueError(f"every setting must name the same arguments, {sorted(names)}, not {sorted(setting)}")
        strangers = [name for name in names if name.partition(".")[0] not in self.methods or "." not in name]
        if strangers or {name.partition(".")[0] for name in names} != set(self.methods):
            raise ValueError(
                f"settings must be named method.argument, for all of {', '.join(self.methods)}; not {sorted(names)}"
            )

    @classmethod
    def of(
        cls,
        method: str,
        shape: Shape,
        fixed: Mapping[str, Any] | None = None,
        settings: Sequence[Mapping[str, Any]] | None = None,
    ) -> Family:
        """The family that a method declares, or another one for it.

        Args:
            method: a name; several, joined by ``&``, with settings named ``method.argument``.
            fixed: arguments that are the same in all settings, in place of the declared ones.
            settings: arguments in place of the declared ones, from the safest to the boldest.

        Raises:
            ValueError: there is no such method, or nothing is declared for it.
        """
        names = tuple(name.strip() for name in method.split("&"))
        if settings is None:
            if len(names) > 1 or names[0] not in FAMILIES:
                raise ValueError(
                    f"no settings are declared for {method!r}: give settings=[...], from the safest to the boldest, or "
                    f"choose one of {', '.join(FAMILIES)}"
                )
            settings = FAMILIES[names[0]](shape)
        settings = [dict(setting) | dict(fixed or {}) for setting in settings]
        if len(names) == 1:
            settings = [{f"{names[0]}.{name}": value for name, value in setting.items()} for setting in settings]
        return cls(names, tuple(settings))

    def columns(self, count: int) -> dict[str, list[Any]]:
        """The first settings as a curve holds them."""
        return {name: [setting[name] for setting in self.settings[:count]] for name in self.settings[0]}


def methods_of(setting: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods that a setting by ``method.argument`` is about, in its order."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in setting))


def build(
    methods: Sequence[str], setting: Mapping[str, Any], heads: ExitHeads | None = None, **options: Any
) -> Reduction:
    """The methods in one setting.

    Args:
        setting: by ``method.argument``.
        heads: for "learned".
        options: of :class:`~dyvte.LearnedExit`.

    Raises:
        ValueError: there is no such method, it takes other arguments, or heads are missing.
    """
    parts = []
    for name in methods:
        own = {key.partition(".")[2]: value for key, value in setting.items() if key.partition(".")[0] == name}
        if name == LEARNED and heads is None:
            raise ValueError("exit heads are missing: give heads, such as dyvte.ExitHeads.from_pretrained(folder)")
        parts.append(LearnedExit(heads, **own, **options) if name == LEARNED else by_name(name, **own))
    return functools.reduce(operator.and_, parts)
