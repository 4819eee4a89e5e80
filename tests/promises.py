"""A record of a promise, as tests need one."""

from __future__ import annotations

from typing import Any


def promise_record(threshold: float = 0.9) -> dict[str, Any]:
    """As JSON holds it; ``threshold`` is the chosen one."""
    return {
        "alpha": 0.02,
        "delta": 0.1,
        "samples": 1000,
        "methods": ["learned"],
        "curve": {
            "settings": {"learned.threshold": [0.99, threshold, 0.5]},
            "risk": [0, 0.01, 0.2],
            "bound": [0.01, 0.02, 0.3],
            "saved": [0.1, 0.4, 0.6],
        },
        "chosen": 1,
        "base_model": "some/model",
        "identity": {"weights": "0" * 64, "processor": "1" * 16, "dtype": "float32", "attention": "sdpa"},
        "data": [{"scenes": {"split": "dev"}}],
        "content": "2" * 64,
        "shared_images": 0,
        "reliability": {"confidence": [0.1, 0.5, 0.9], "frequency": [0.1, 0.6, 0.95], "count": [3, 0, 10]},
        "rule": "Clopper-Pearson bound, fixed-sequence testing from the safest setting",
    }
