"""The stages of a run, each from a typed config: trace, fit, and all from a model to heads that keep a promise.

``dyvte trace|fit|train`` are these functions; train/train.py spells the last one out.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dyvte.config import FitConfig, PromiseSettings, TraceConfig, TraceSettings, TrainConfig
from dyvte.data import Sample, fingerprint, load_samples, read_config
from dyvte.heads import ExitHeads
from dyvte.loading import Mllm, load_mllm
from dyvte.ranks import Ranks
from dyvte.tracking import Tracker
from dyvte.training.calibrate import calibrate, check_enough
from dyvte.training.fit import fit_heads, quality
from dyvte.training.held_out import check_held_out
from dyvte.training.online import train_online
from dyvte.training.store import TraceSet, load_traces
from dyvte.training.write import write_traces

TRAIN, HELD_OUT, FIT = "train", "held-out", "fit"  # what the work folder of a run holds
DEFAULT_NEW_TOKENS = 16


def trace(config: TraceConfig, ranks: Ranks) -> Path:
    """Traces one data set; the folder of its traces."""
    samples = load_samples(read_config(config.data))  # what is wrong with it is said before a model is loaded
    with Tracker(config.tracking, Path(config.output), vars(config), ranks) as tracker:
        mllm = load_mllm(config, ranks)
        return trace_data(mllm, config.data, config.output, config, ranks, tracker, samples, config.pruning)


def fit(config: FitConfig, ranks: Ranks) -> ExitHeads:
    """Heads from traces, with a threshold that keeps the promise, written with their card."""
    if config.threads:
        torch.set_num_threads(config.threads)
    check_promise(config, config.calibration)
    traces = load_traces(*listed(config.traces))
    held_out = None if config.alpha is None else load_traces(*listed(config.calibration))
    with Tracker(config.tracking, Path(config.output), vars(config), ranks) as tracker:
        check_split(traces, held_out, config)
        states = Path("runs", Path(config.output).name, FIT)
        heads = fit_heads(traces, config.fit, ranks.first, states, ranks.device, tracker.epochs("fit"))
        return finish(heads, held_out, config, config.output, ranks, tracker)


def train(config: TrainConfig, ranks: Ranks) -> ExitHeads:
    """From a model and two sets of questions to heads that keep a promise; an interrupted run goes on."""
    check_promise(config, config.held_out)
    work = work_folder(config)
    data = {TRAIN: config.data} | ({} if config.held_out is None else {HELD_OUT: config.held_out})
    samples = {name: load_samples(read_config(source)) for name, source in data.items()}
    if config.alpha is not None:
        check_enough(len(samples[HELD_OUT]), config.alpha, config.delta)
    with Tracker(config.tracking, work, vars(config), ranks) as tracker:
        mllm = load_mllm(config, ranks)
        if config.mode == "online":
            heads = learn_online(mllm, samples[TRAIN], samples.get(HELD_OUT), config, ranks, tracker)
            return write_heads(heads, config.output, ranks, tracker)
        for name, source in data.items():
            trace_data(mllm, source, work / name, config, ranks, tracker, samples[name])
        release(mllm)
        traces = load_traces(work / TRAIN)
        held_out = None if config.held_out is None else load_traces(work / HELD_OUT)
        check_split(traces, held_out, config)
        heads = fit_heads(traces, config.fit, ranks.first, work / FIT, ranks.device, tracker.epochs("fit"))
        return finish(heads, held_out, config, config.output, ranks, tracker)


def learn_online(
    mllm: Mllm,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] | None,
    config: TrainConfig,
    ranks: Ranks,
    tracker: Tracker,
) -> ExitHeads:
    """Heads that learn while the model is traced, with no states of training on the disk; calibrated already."""
    data = read_config(config.data)
    promised = None if config.held_out is None else described(read_config(config.held_out))
    return train_online(
        mllm.model,
        mllm.processor,
        samples,
        held_out,
        work_folder(config),
        config.fit,
        config.online,
        config,
        config,
        max_new_tokens=config.max_new_tokens or data.get("max_new_tokens", DEFAULT_NEW_TOKENS),
        template=data.get("template"),
        visual_mask=mllm.visual_mask,
        decoder=mllm.decoder,
        provenance=described(data),
        held_out_provenance=promised,
        ranks=ranks,
        progress=ranks.first,
        device=ranks.device,
        log=tracker.epochs("online"),
    )


def described(data: Mapping[str, Any]) -> dict[str, Any]:
    """A data config as traces and heads remember it."""
    return dict(data) | {"fingerprint": fingerprint(data)}


def work_folder(config: TrainConfig) -> Path:
    """Where a run keeps its traces, and states to resume from."""
    return Path(config.work or Path("runs", Path(config.output).name))


def trace_data(
    mllm: Mllm,
    data: str | Mapping[str, Any],
    folder: str | Path,
    settings: TraceSettings,
    ranks: Ranks,
    tracker: Tracker | None = None,
    samples: Sequence[Sample] | None = None,
    pruning: Mapping[str, Any] | None = None,
) -> Path:
    """Traces a data set with a model into a folder; ranks share the work.

    Args:
        data: a data config, or the YAML file of one.
        samples: of that data, where they are loaded already.
        pruning: see :func:`dyvte.training.write.write_traces`.
    """
    data = read_config(data)
    samples = load_samples(data) if samples is None else samples
    report = None if tracker is None else tracker.progress(f"trace {Path(folder).name}")
    return write_traces(
        mllm.model,
        mllm.processor,
        samples,
        folder,
        visual_mask=mllm.visual_mask,
        decoder=mllm.decoder,
        answers=settings.answers,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens or data.get("max_new_tokens", DEFAULT_NEW_TOKENS),
        template=data.get("template"),
        exits=settings.exits,
        provenance=described(data),
        pruning=pruning,
        unit_size=settings.unit_size,
        seed=settings.seed,
        on_error=settings.on_error,
        max_errors=settings.max_errors,
        ranks=ranks,
        report=report,
    )


def release(mllm: Mllm) -> None:
    """Makes room for what comes after the model, wherever the caller still holds it."""
    mllm.model, mllm.engine, mllm.visual_mask, mllm.decoder = None, None, None, None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_promise(settings: PromiseSettings, held_out: Any) -> None:
    """Raises ``ValueError`` if a promise is asked for that no held-out samples could prove."""
    if settings.alpha is not None and held_out is None:
        raise ValueError(
            "a promise needs held-out samples: name some (held_out=DATA for train, calibration=TRACES for fit), or set "
            "alpha=null for heads without one"
        )


def check_split(traces: TraceSet, held_out: TraceSet | None, settings: PromiseSettings) -> None:
    """Raises ``ValueError`` if the held-out traces are too few, or of samples that are trained on."""
    if held_out is None or settings.alpha is None:
        return
    check_enough(len(held_out), settings.alpha, settings.delta)
    if traces.content is not None and held_out.content is not None:
        check_held_out(traces.content.sketch(), held_out.content, settings.shared_images)


def finish(
    heads: ExitHeads,
    held_out: TraceSet | None,
    settings: PromiseSettings,
    output: str | Path,
    ranks: Ranks,
    tracker: Tracker | None = None,
) -> ExitHeads:
    """Calibrates heads on held-out traces, and writes them with their card; the first rank does."""
    if ranks.first and held_out is not None and settings.alpha is not None:
        calibrate(heads, held_out, settings.alpha, settings.delta, settings.shared_images)
        heads.config.training |= {f"calibration_{k}": v for k, v in quality(heads, held_out)["mean"].items()}
    return write_heads(heads, output, ranks, tracker)


def write_heads(heads: ExitHeads, output: str | Path, ranks: Ranks, tracker: Tracker | None = None) -> ExitHeads:
    """Writes the first rank's heads with their card; all ranks get what was written."""
    if ranks.first:
        heads.save_pretrained(output)
        if tracker is not None:
            tracker.log(figures(heads))
    ranks.wait()
    return heads if ranks.first else ExitHeads.from_pretrained(output)


def figures(heads: ExitHeads) -> dict[str, float]:
    """What is worth showing of new heads."""
    found = {f"fit/{k}": v for k, v in (heads.config.training or {}).items() if isinstance(v, float)}
    if (promise := heads.config.promise) is not None:
        found |= {f"promise/{name}": getattr(promise, name) for name in ("alpha", "delta", "risk", "bound", "saved")}
    return found | {"promise/threshold": heads.config.threshold}


def listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
