"""EAS trained: which attentions a task does not need, and adapters in their place, with the MLLM frozen.

The recipe of the public code for LLaVA. First all layers have adapters of both kinds; each step skips the attention of
some layers that are drawn by their scores, and every few steps a bandit judges several sets of layers by their loss on
the same batch. Then adapters are trained anew with the highest-scored layers skipped. States to resume from are kept in
folders of their own, ``search`` and ``train``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dyvte.data import Sample, fingerprint, read_config
from dyvte.eas_config import EASConfig, EASSettings
from dyvte.identity import model_fingerprint, processor_fingerprint
from dyvte.loading import Mllm
from dyvte.methods.eas import chosen_layers, sample_layers, skip_count, update_scores
from dyvte.methods.eas_adapters import EASAdapters, EASAdaptersConfig, random_adapters
from dyvte.methods.eas_edit import EAS
from dyvte.runtime.adaptation import check_layer
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.eas_learner import AdapterLearner, Questions
from dyvte.training.epochs import Log
from dyvte.training.learner import key
from dyvte.training.lock import one_run, run_name
from dyvte.training.parallel import Group
from dyvte.training.state import TrainingState

SEARCH, TRAIN = "search", "train"
LOG_EVERY = 10  # steps


def train_eas(
    mllm: Mllm,
    samples: Sequence[Sample],
    config: EASConfig,
    group: Group | None = None,
    log: Callable[[str], Log] = lambda stage: lambda step, figures: None,
    progress: bool = True,
) -> EASAdapters:
    """Adapters for a model and a task; a training that was stopped goes on from ``config.work``.

    Args:
        mllm: the frozen model, whole on each rank.
        samples: of ``config.data``.
        group: the ranks; by default those of the default process group. All must call this together.
        log: gives what a stage ("search", "train") reports its loss to.

    Raises:
        ValueError: settings or a model that do not fit, ranks that disagree, or a work folder of another training.
    """
    group = Group.here(next(weight.device for weight in mllm.model.parameters())) if group is None else group
    data, settings, spec = read_config(config.data), config.eas, DecoderSpec.of(mllm.model, mllm.decoder)
    mllm.model.requires_grad_(False)
    longest = config.max_new_tokens or data.get("max_new_tokens", 16)
    questions = Questions(mllm, samples, config.answers, longest, data.get("template"))
    adapters_config = _config(spec, settings)
    identity = {
        "weights": model_fingerprint(spec.model),
        "dtype": str(spec.model.dtype).removeprefix("torch."),
        "processor": processor_fingerprint(mllm.processor, data.get("template")),
    }
    record = {
        "identity": identity,
        "data": {"fingerprint": fingerprint(data), "samples": len(samples), "answers": config.answers},
        "settings": {name: value for name, value in asdict(settings).items() if name != "save_every"},
    }
    if any(other != record for other in group.gather(record)):
        raise ValueError("the ranks were given different models, questions or settings: give all of them the same")
    work = Path(config.work or Path("runs", Path(config.output).name))
    found: dict[str, Any] = {"layers": settings.layers}
    if settings.layers is None:
        with _state(work / SEARCH, record, group) as state:
            found = _search(adapters_config, questions, settings, group, state, log(SEARCH), progress)
    skipped = sorted(found["layers"])
    own = replace(adapters_config, skipped=skipped, adapted=_others(adapters_config, skipped))
    with _state(work / TRAIN, record | {"layers": skipped}, group) as state:
        adapters, loss = _train(own, questions, settings, group, state, log(TRAIN), progress)
    adapters.config.base_model = getattr(spec.model.config, "_name_or_path", None) or None
    adapters.config.identity = identity
    told = {"data": dict(data) | {"fingerprint": fingerprint(data)}, "samples": len(samples), "answers": config.answers}
    adapters.config.training = told | {"adapter": config.adapter, "loss": loss} | found | asdict(settings)
    adapters.config.training["layers"] = skipped
    return adapters.eval()


def skippable(spec: DecoderSpec) -> list[int]:
    """The layers whose attention could be skipped: not the first of a kind, from which the cache's length is read."""
    found = []
    for layer in range(spec.num_layers):
        with suppress(ValueError):
            check_layer(EAS.__name__, spec, layer, skipped=True)
            found.append(layer)
    return found


def _config(spec: DecoderSpec, settings: EASSettings) -> EASAdaptersConfig:
    """Adapters of both kinds for all layers that may have them.

    Raises:
        ValueError: so many attentions, or these, cannot be skipped.
    """
    possible = skippable(spec)
    if settings.layers is not None:
        wrong = [layer for layer in settings.layers if layer not in possible]
        if wrong or not settings.layers or len(set(settings.layers)) < len(settings.layers):
            raise ValueError(f"eas.layers must be some of {possible}, each once, not {settings.layers}")
    elif not 1 <= settings.skip <= len(possible):
        raise ValueError(
            f"eas.skip must be 1 ... {len(possible)} (layers {possible} can do without), not {settings.skip}"
        )
    elif settings.warmup >= settings.search_steps:
        raise ValueError(f"eas.warmup={settings.warmup} leaves none of {settings.search_steps} search steps to judge")
    return EASAdaptersConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.config.hidden_size,
        skipped=possible,
        adapted=[layer for layer, kind in enumerate(spec.kinds) if kind.attends] if settings.adapt else [],
        width=settings.width,
        adapted_width=settings.adapted_width,
        dropout=settings.dropout,
    )


def _others(config: EASAdaptersConfig, skipped: Sequence[int]) -> list[int]:
    return [layer for layer in config.adapted if layer not in skipped]


@contextmanager
def _state(folder: Path, record: Mapping[str, Any], group: Group) -> Iterator[TrainingState]:
    with ExitStack() as stack:
        run = run_name(group)
        with group.together():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_run(folder, run))
        yield TrainingState(folder, record, group)


def _search(
    config: EASAdaptersConfig,
    questions: Questions,
    settings: EASSettings,
    group: Group,
    state: TrainingState,
    log: Log,
    progress: bool,
) -> dict[str, Any]:
    """The layers to skip, and the scores by which they were chosen."""
    layers, count, total = config.skipped, settings.skip, settings.search_steps
    if count == len(layers):
        return {"layers": list(layers)}
    learner = AdapterLearner(
        random_adapters(config, settings.seed), questions, settings, total, lambda share: 1 - share, group
    )
    scores, saved = torch.zeros(len(layers), dtype=torch.double), state.load()
    if saved is not None:
        learner.restore(saved[0], saved[1])
        scores = torch.tensor(saved[0]["scores"], dtype=torch.double)

    def draw(count: int, what: str, sets: int = 1) -> list[list[int]]:
        generator = torch.Generator().manual_seed(key(settings.seed, what, learner.done))
        return sample_layers(scores, count, sets, generator=generator).tolist()

    def step() -> float:
        drawn = draw(skip_count(learner.done + 1, settings.warmup, count), "skip")[0]
        return learner.step([layers[place] for place in drawn])

    with _bar(SEARCH, total, learner.done, progress and group.rank == 0) as bar:
        losses: list[float] = []
        while learner.done < total:
            losses.append(step())
            if learner.done > settings.warmup and learner.done % settings.every == 0:
                sets = draw(count, "judge", min(settings.sets, math.comb(len(layers), count)))
                judged = learner.judge([[layers[place] for place in places] for places in sets])
                scores = update_scores(scores, sets, judged, settings.search_rate)
            _report(bar, losses, learner, log)
            if learner.done % settings.save_every == 0 or learner.done == total:
                state.save(learner.done, learner.progress() | {"scores": scores.tolist()}, learner.tensors())
    chosen = [layers[place] for place in chosen_layers(scores, count)]
    return {"layers": chosen, "scores": {str(layer): score for layer, score in zip(layers, scores.tolist())}}


def _train(
    config: EASAdaptersConfig,
    questions: Questions,
    settings: EASSettings,
    group: Group,
    state: TrainingState,
    log: Log,
    progress: bool,
) -> tuple[EASAdapters, float | None]:
    """New adapters, trained with fixed layers skipped, and the mean loss of the latest steps."""
    learner = AdapterLearner(
        random_adapters(config, settings.seed + 1), questions, settings, settings.steps, _cosine, group
    )
    saved, losses = state.load(), []
    if saved is not None:
        learner.restore(*saved)
        losses = saved[0]["losses"]
    with _bar(TRAIN, settings.steps, learner.done, progress and group.rank == 0) as bar:
        while learner.done < settings.steps:
            losses = [*losses, learner.step(config.skipped)][-LOG_EVERY:]
            _report(bar, losses, learner, log)
            if learner.done % settings.save_every == 0 or learner.done == settings.steps:
                state.save(learner.done, learner.progress() | {"losses": losses}, learner.tensors())
    return learner.adapters, sum(losses) / len(losses)


def _cosine(share: float, warmup: float = 0.03) -> float:
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _bar(stage: str, total: int, done: int, shown: bool) -> tqdm:
    return tqdm(total=total, initial=done, desc=stage, unit="step", disable=not shown)


def _report(bar: tqdm, losses: Sequence[float], learner: AdapterLearner, log: Log) -> None:
    bar.update()
    if learner.done % LOG_EVERY == 0 or learner.done == learner.steps:
        mean = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
        bar.set_postfix(loss=f"{mean:.4f}")
        if learner.group.rank == 0:
            log(learner.done, {"loss": mean})
