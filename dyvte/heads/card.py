"""The model card of a checkpoint of heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyvte.heads.config import ExitHeadsConfig
from dyvte.promise import Promise

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = Path(__file__).parent / "files" / "card.md"
TAGS = ["dyvte", "visual-token-exit", "custom_generate"]


def model_card(config: ExitHeadsConfig, parameters: int, together: Promise | None = None) -> str:
    """The README.md of a checkpoint: what it is for, how to use it, how it was made.

    Args:
        parameters: how many the heads have.
        together: the promise of the heads on top of a pruning, which they do not keep alone.
    """
    from huggingface_hub import ModelCard

    promise = config.promise if together is None else together
    base = config.base_model or "an unrecorded base model"
    facts = {
        "base model": f"{base} (revision {config.base_revision or 'not recorded'})",
        "weights": (config.identity or {}).get("weights", "not recorded"),
        "form": f"{config.form}, width {config.width}",
        "text state": config.text_state,
        "lookahead": config.lookahead,
        "label rule": config.label_rule,
        "threshold": config.threshold,
        "guard": "none" if config.guard is None else f"{config.guard:g} of usual samples pass",
        "dyvte": config.dyvte_version,
    }
    training = {k: v for k, v in (config.training or {}).items() if isinstance(v, (str, int, float))}
    card = ModelCard.from_template(
        card_metadata(config, promise),
        template_path=str(TEMPLATE),
        base=base,
        layers=config.num_layers,
        parameters=f"{parameters:,}",
        facts="\n".join(_table(facts)),
        promise=None if promise is None else "\n".join(promise_rows(promise)),
        training="\n".join(_table(training)) if training else None,
    )
    return card.content.rstrip() + "\n"


def card_metadata(config: ExitHeadsConfig, promise: Promise | None) -> ModelCardData:
    """What the hub reads of a card: licence, base model, tags, and as its ``model-index`` what was measured."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    base = config.base_model
    try:
        validate_repo_id(base)
    except HFValidationError:  # a folder, or not recorded
        base = None
    return ModelCardData(
        library_name="dyvte",
        license=config.license or "unknown",
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        tags=TAGS,
        model_name=f"exit heads for {Path(config.base_model or 'an unrecorded base model').name}",
        eval_results=None if promise is None else _measured(promise),
    )


def _measured(promise: Promise) -> list[EvalResult]:
    """A promise's figures on the samples of its calibration."""
    from huggingface_hub import EvalResult

    configs = [promise.data] if isinstance(promise.data, Mapping) else promise.data or []
    names = [str(one.get("path", next((key for key in one if key != "fingerprint"), "?"))) for one in configs]
    confidence = f"{100 * (1 - promise.delta):g} % confidence"
    metrics = {
        "agreement": ("answers that are the dense model's", 1 - promise.risk),
        "changed_answers_bound": (f"upper bound of changed answers, {confidence}", promise.bound),
        "left_out": ("visual-token layers left out", promise.saved),
    }
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=names[0] if names else "unknown",
            dataset_name=f"{promise.samples} held-out samples of {' and '.join(names) or 'unrecorded data'}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, (name, value) in metrics.items()
    ]


def promise_rows(promise: Promise) -> list[str]:
    """A promise in a sentence and a table, as lines of Markdown."""
    return [
        f"With {100 * (1 - promise.delta):g} % confidence at most {100 * promise.alpha:g} % of the answers differ from "
        "the dense model's, on samples like those of the calibration.",
        "",
        *_table(
            promise.setting
            | {
                "alpha": promise.alpha,
                "delta": promise.delta,
                "samples": promise.samples,
                "risk": promise.risk,
                "bound": promise.bound,
                "visual-token layers left out": promise.saved,
                "rule": promise.rule,
                "content": promise.content or "not recorded",
                "images shared with training": "not known" if promise.shared_images is None else promise.shared_images,
            }
        ),
    ]


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    return ["| | |", "|---|---|", *(f"| {key} | {row} |" for key, row in zip(values, rows))]
