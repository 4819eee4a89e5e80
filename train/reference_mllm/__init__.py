"""Trains the reference MLLM: a small but genuine LLaVA that answers questions about scenes of handwritten digits.

Three stages, on CPU or GPU, in one process or several, resumed where they were stopped:

1. ``vision``   the CLIP tower alone, with dense supervision (vision.py).
2. ``answers``  projector and decoder on questions, the tower frozen (answers.py; its batches: turns.py).
3. ``report``   greedy answers to held-out questions, right or wrong per kind, and the learning curves (report.py).

    python -m train.reference_mllm --config configs/reference_mllm.yaml
    torchrun --nproc_per_node 2 -m train.reference_mllm --stage answers
"""

from .model import build_model, build_processor

__all__ = ["build_model", "build_processor"]
