"""Methods by name, for configs: ``{method: himap, layers: [2, 8]}``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dyvte.methods.aki import AKI
from dyvte.methods.divprune import DivPrune
from dyvte.methods.downsample import Downsample
from dyvte.methods.eas_edit import EAS
from dyvte.methods.exits import FixedExit, NeverExit, RandomExit
from dyvte.methods.fastv import FastV
from dyvte.methods.folder import Folder
from dyvte.methods.fopru import FoPru
from dyvte.methods.himap import HiMAP
from dyvte.methods.ima import SkipComputations
from dyvte.methods.image_text_interaction import ImageTextInteraction
from dyvte.methods.par import PAR
from dyvte.methods.random_pruning import RandomPruning
from dyvte.methods.redundancylens import HollowAttention, ProbeFFN
from dyvte.methods.vtc_cls import VTCCLS
from dyvte.methods.yopo import FirstNeurons, LayerCut, NeighbourAttention
from dyvte.runtime.reduction import Reduction

# What a config can describe in full: LearnedExit needs heads, SGL the scores of a small model, HeadCut a mask.
METHODS: Mapping[str, type[Reduction]] = MappingProxyType(
    {
        "never": NeverExit,
        "fixed": FixedExit,
        "random": RandomExit,
        "prune": RandomPruning,
        "downsample": Downsample,
        "fastv": FastV,
        "himap": HiMAP,
        "vtc_cls": VTCCLS,
        "fopru": FoPru,
        "folder": Folder,
        "divprune": DivPrune,
        "image_text_interaction": ImageTextInteraction,
        "par": PAR,
        "hollow_attention": HollowAttention,
        "probe_ffn": ProbeFFN,
        "neighbour_attention": NeighbourAttention,
        "first_neurons": FirstNeurons,
        "layer_cut": LayerCut,
        "skip_computations": SkipComputations,
        "aki": AKI,
        "eas": EAS,
    }
)


def by_name(name: str, **settings: Any) -> Reduction:
    """A method from its name and settings.

    Raises:
        ValueError: there is no such method, or it takes other settings; says which there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    try:
        return METHODS[name](**settings)
    except TypeError as error:
        raise ValueError(f"wrong settings for method {name!r}: {error}") from None
