"""Which visual tokens to keep, and what layers do with them: one file per idea."""

from dyvte.methods.aki import AKI
from dyvte.methods.divprune import DivPrune
from dyvte.methods.downsample import Downsample
from dyvte.methods.eas_adapters import EASAdapters
from dyvte.methods.eas_edit import EAS
from dyvte.methods.exits import ExitPolicy, FixedExit, NeverExit, RandomExit
from dyvte.methods.fastv import FastV
from dyvte.methods.folder import Folder
from dyvte.methods.fopru import FoPru
from dyvte.methods.himap import HiMAP
from dyvte.methods.ima import SkipComputations
from dyvte.methods.image_text_interaction import ImageTextInteraction
from dyvte.methods.learned import LearnedExit
from dyvte.methods.mod import MoD
from dyvte.methods.par import PAR
from dyvte.methods.random_pruning import RandomPruning
from dyvte.methods.redundancylens import HollowAttention, ProbeFFN
from dyvte.methods.registry import METHODS, by_name
from dyvte.methods.sgl import SGL
from dyvte.methods.vtc_cls import VTCCLS
from dyvte.methods.yopo import FirstNeurons, HeadCut, LayerCut, NeighbourAttention

__all__ = [
    "AKI",
    "DivPrune",
    "Downsample",
    "EAS",
    "EASAdapters",
    "ExitPolicy",
    "FastV",
    "FirstNeurons",
    "FixedExit",
    "FoPru",
    "Folder",
    "HeadCut",
    "HiMAP",
    "HollowAttention",
    "ImageTextInteraction",
    "LayerCut",
    "LearnedExit",
    "MoD",
    "METHODS",
    "NeighbourAttention",
    "NeverExit",
    "PAR",
    "ProbeFFN",
    "RandomExit",
    "RandomPruning",
    "SGL",
    "SkipComputations",
    "VTCCLS",
    "by_name",
]
