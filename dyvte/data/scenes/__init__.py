"""Scenes of real handwritten digits, and questions about them.

The reference task: nine scanned digits (scikit-learn's ``load_digits``, 1,797 scans of 8x8 pixels), each in one of
six colours, placed with jitter on a 3x3 grid. The question kinds need vision to different degrees, from not at all
(arithmetic in the prompt) to one spot, a relation, or the whole scene, so that the layer at which visual tokens stop
mattering differs per sample. The scans are split once and for all: no digit of one split is ever seen in another.
"""

from dyvte.data.scenes.drawing import CANVAS, CELL, COLOURS, GRID, SPLITS, STYLES, Scenes, draw, scans
from dyvte.data.scenes.questions import KINDS, ask, vocabulary
from dyvte.data.scenes.source import SceneSamples, samples

__all__ = [
    "CANVAS",
    "CELL",
    "COLOURS",
    "GRID",
    "KINDS",
    "SPLITS",
    "STYLES",
    "SceneSamples",
    "Scenes",
    "ask",
    "draw",
    "samples",
    "scans",
    "vocabulary",
]
