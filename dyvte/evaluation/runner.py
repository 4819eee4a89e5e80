"""Policies side by side on the same samples: answers, exit layers, scores, and what was saved.

:func:`evaluate` writes a folder:

    config.json      what determines the rows; a folder made with anything else is refused
    <policy>.jsonl   one row per sample; rows that are there are kept, so a run can be stopped and continued
    timing.json      prefill and decode time of every policy, measured against the dense model
    images/          pictures for the report's examples
    summary.json     everything over samples and per kind, with versions, hardware and settings
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import GREEDY, Sample, encode
from dyvte.evaluation.costs import prefill_flops
from dyvte.evaluation.metrics import AnswerMetric, build_metric
from dyvte.methods.exits import ExitPolicy, FixedExit
from dyvte.runtime.tokens import find_decoder, underlying_model, visual_token_ids
from dyvte.runtime.withdrawal import visual_exit
from dyvte.version import __version__

DENSE = "dense"
PICTURE_SIDE = 320  # pixels
VisualMask = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class PerSampleExit:
    """An exit layer for every sample, known in advance by its id: the oracle, or any schedule made offline.

    Attributes:
        layers: exit layer, 1 ... L, by sample id.
    """

    layers: Mapping[str, int]

    def of(self, samples: Sequence[Sample]) -> FixedExit:
        """The policy for one batch."""
        missing = [sample.id for sample in samples if sample.id not in self.layers]
        if missing:
            raise ValueError(f"no exit layer for {len(missing)} samples, such as {missing[0]!r}: give one for every id")
        return FixedExit([self.layers[sample.id] for sample in samples])


Policy = ExitPolicy | PerSampleExit | Callable[[nn.Module], AbstractContextManager]


def evaluate(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    metric: str = "exact_match",
    template: str | None = None,
    visual_mask: VisualMask | None = None,
    timing_batches: int = 4,
    pictures: int = 24,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the dense model and every policy over the samples, greedily, and sums up.

    Args:
        model: the MLLM, in evaluation mode.
        processor: its processor, see :func:`dyvte.data.sources.encode`.
        samples: see :mod:`dyvte.data.sources`.
        policies: by name; an exit policy, a :class:`PerSampleExit`, or, for anything else that changes the model while
            it runs, a callable that takes the model and returns a context manager (what it yields may have ``layers``).
        output_dir: see the module's text.
        batch_size: samples at once, also where time is measured.
        max_new_tokens: longest answer.
        metric: a name in :data:`dyvte.evaluation.metrics.METRICS`.
        template: chat template, where the processor has none.
        visual_mask: called with the model's inputs, gives bool [batch, sequence]; where ``input_ids`` cannot show it.
        timing_batches: batches on which time is measured; 0 measures none.
        pictures: pictures kept for examples, as many again for samples whose answer changed.
        config: anything else to keep with the results, such as the configs they come from.
        progress: whether to show a bar.

    Returns:
        The content of ``summary.json``. Times are in seconds per batch: prefill is everything up to the first new
        token, the vision tower included, of which decoder is its layers alone; decode is per further token. Shares lie
        in 0 ... 1. Bytes and floating-point operations are of a single sample's prompt in the decoder, padding left
        out, but for ``cache_bytes``, which is what the cache of a whole batch took.

    Raises:
        ValueError: no samples, bad names or sizes, or a folder that holds results of something else.
    """
    if len(samples) == 0:
        raise ValueError("there are no samples to evaluate: check the data config")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be 1 or more, not {batch_size} and {max_new_tokens}")
    bad = [name for name in policies if name == DENSE or not re.fullmatch(r"[\w.,+=@-]+", name)]
    if bad:
        raise ValueError(f"policy names {bad} do not work: use letters, digits and . , + = @ - _, and not {DENSE!r}")
    scorer = build_metric(metric)
    settings = {
        "model": _describe_model(model),
        "data": _data_fingerprint(samples),
        "samples": len(samples),
        "metric": metric,
        "max_new_tokens": max_new_tokens,
        "template": template,
    }
    run = _Run(model, processor, Path(output_dir), max_new_tokens, template, visual_mask, scorer)
    run.check(samples[0], policies)
    run.claim(settings, policies)
    all_policies = {DENSE: None, **policies}
    rows = {name: _read_rows(run.folder / f"{name}.jsonl") for name in all_policies}
    _answer_all(run, samples, all_policies, rows, batch_size, pictures, progress)
    timing = _time_all(run, samples, policies, batch_size, timing_batches, progress)
    ids = sorted(rows[DENSE], key=lambda name: rows[DENSE][name]["index"])
    summary = {
        "settings": settings
        | {
            "batch_size": batch_size,
            "model_name": getattr(underlying_model(model).config, "_name_or_path", "") or None,
        },
        "config": dict(config or {}),
        "versions": {
            "dyvte": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": hardware(model),
        "layers": run.num_layers,
        "policies": {
            name: summarise(scorer, [rows[name][i] for i in ids], [rows[DENSE][i] for i in ids], run.num_layers)
            | {"timing": timing.get(name)}
            for name in all_policies
        },
    }
    _write_json(run.folder / "summary.json", summary)
    return summary


class _Run:
    """A model with everything its calls need, and the folder its results go to."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        folder: Path,
        max_new_tokens: int,
        template: str | None,
        visual_mask: VisualMask | None,
        scorer: AnswerMetric,
    ):
        self.model, self.processor, self.folder, self.scorer = model, processor, folder, scorer
        self.max_new_tokens, self.template, self.visual_mask = max_new_tokens, template, visual_mask
        decoder = find_decoder(underlying_model(model))
        self.num_layers, self.config = len(decoder.layers), getattr(decoder, "config", model.config)
        self.visual_ids = None if visual_mask is not None else visual_token_ids(underlying_model(model))
        self.tokenizer = getattr(processor, "tokenizer", processor)
        eos = model.generation_config.eos_token_id
        self.eos = set(eos) if isinstance(eos, list) else {eos} - {None}

    def check(self, sample: Sample, policies: Mapping[str, Policy]) -> None:
        """Raises ``ValueError`` before any work if a policy does not fit the model, or the metric the data."""
        for policy in policies.values():
            with self.under(policy, [sample]):
                pass
        if sample.answers:
            self.scorer.score_sample("", sample.answers, sample.choices)

    def claim(self, settings: dict[str, Any], policies: Mapping[str, Policy]) -> None:
        """Notes what the rows will be made with, or checks it against what they were made with."""
        described = {name: describe(policy) for name, policy in policies.items()}
        path = self.folder / "config.json"
        if path.exists():
            old = json.loads(path.read_text())
            settings = json.loads(json.dumps(settings))
            differing = [key for key in settings if old["settings"].get(key) != settings[key]]
            differing += [n for n, d in described.items() if old["policies"].get(n, d) != json.loads(json.dumps(d))]
            if differing:
                raise ValueError(
                    f"{self.folder} holds results made with another {', '.join(differing)}: "
                    "choose another folder, or another name for a changed policy, or remove the old results"
                )
            described = old["policies"] | described
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, {"settings": settings, "policies": described})

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return encode(self.processor, samples, self.template).to(self.model.device, self.model.dtype)

    def token_counts(self, inputs: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Text and visual tokens of every prompt."""
        valid = inputs["attention_mask"].bool()
        if self.visual_mask is not None:
            visual = self.visual_mask(dict(inputs)).to(valid.device)
        else:
            visual = torch.isin(inputs["input_ids"], torch.tensor(self.visual_ids, device=valid.device))
        return (valid & ~visual).sum(1).tolist(), (valid & visual).sum(1).tolist()

    @contextmanager
    def under(self, policy: Policy | None, samples: Sequence[Sample]) -> Iterator[Any]:
        """The model with a policy at work; yields what tells the exit layers."""
        if policy is None:
            yield None
            return
        if isinstance(policy, PerSampleExit):
            policy = policy.of(samples)
        if isinstance(policy, ExitPolicy):
            with visual_exit(self.model, policy, self.visual_mask) as exits:
                yield exits
        else:
            with policy(self.model) as exits:
                yield exits

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], tokens: int, **options: Any) -> Any:
        return self.model.generate(**inputs, max_new_tokens=tokens, **GREEDY, **options)

    def answer(self, inputs: dict[str, Any], policy: Policy | None, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """One row for each sample of a batch."""
        with self.under(policy, samples) as exits:
            ids = self.generate(inputs, self.max_new_tokens)[:, inputs["input_ids"].shape[1] :].tolist()
        layers = getattr(exits, "layers", None)
        layers = [self.num_layers] * len(samples) if layers is None else layers.tolist()
        rows = []
        for sample, new, exit_layer, text, visual in zip(samples, ids, layers, *self.token_counts(inputs)):
            end = next((i + 1 for i, token in enumerate(new) if token in self.eos), len(new))
            places = getattr(policy, "visual_places", operator.mul)(visual, exit_layer)
            said = self.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            rows.append(
                {
                    "id": sample.id,
                    "kind": sample.kind,
                    "question": sample.question,
                    "answers": sample.answers,
                    "choices": sample.choices,
                    "answer": said,
                    "ids": new[:end],
                    "score": self.scorer.score_sample(said, sample.answers, sample.choices) if sample.answers else None,
                    "exit_layer": exit_layer,
                    "text_tokens": text,
                    "visual_tokens": visual,
                    "visual_places": places,
                    "flops": getattr(policy, "prefill_flops", prefill_flops)(self.config, text, visual, exit_layer),
                    "kv_bytes": self.kv_bytes(text, places),
                }
            )
        return rows

    def kv_bytes(self, text: int, places: int) -> int:
        """Keys and values at the end of prefill: the text in all layers, and the layers' visual tokens in sum."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        held = self.num_layers * text + places
        return 2 * held * heads * size * self.model.dtype.itemsize

    def seconds(
        self, inputs: dict[str, Any], tokens: int, policy: Policy | None, samples: list[Sample]
    ) -> dict[str, float]:
        """Generates exactly ``tokens`` tokens and takes the time.

        Returns:
            Seconds in all (``whole``), of the decoder layers over the prompt (``decoder``), per token after the first
            (``step``), and bytes of the cache (``cache``).
        """
        ticks: dict[str, float] = {}
        passes = 0

        def tick(name: str) -> None:
            _wait(self.model.device)
            ticks[name] = time.perf_counter()

        def before_first_layer(*_: Any) -> None:
            nonlocal passes
            passes += 1
            if passes <= 2:
                tick(f"pass {passes}")

        def after_last_layer(*_: Any) -> None:
            if passes == 1:
                tick("prompt done")

        layers = find_decoder(underlying_model(self.model)).layers
        hooks = []
        with self.under(policy, samples):
            # Around whatever the policy does in its own hooks on these layers.
            hooks.append(layers[0].register_forward_pre_hook(before_first_layer, prepend=True))
            hooks.append(layers[-1].register_forward_hook(after_last_layer))
            try:
                tick("start")
                out = self.generate(inputs, tokens, min_new_tokens=tokens, return_dict_in_generate=True)
                tick("end")
            finally:
                for hook in hooks:
                    hook.remove()
        cached = getattr(out.past_key_values, "layers", [])
        tensors = [t for layer in cached for t in (layer.keys, layer.values) if t is not None]
        return {
            "whole": ticks["end"] - ticks["start"],
            "decoder": ticks["prompt done"] - ticks["pass 1"],
            "step": (ticks["end"] - ticks["pass 2"]) / (tokens - 1) if tokens > 1 else 0.0,
            "cache": sum(t.numel() * t.element_size() for t in tensors),
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _answer_all(
    run: _Run,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy | None],
    rows: dict[str, dict[str, Any]],
    batch_size: int,
    pictures: int,
    progress: bool,
) -> None:
    """Adds the rows that are missing, batch by batch, to the files and to ``rows``."""
    # When every policy has every row, no sample needs to be read again.
    todo = range(len(samples)) if any(len(known) < len(samples) for known in rows.values()) else range(0)
    changed = sum(1 for name in policies for row in rows[name].values() if not row.get("agrees", True))
    files = {name: (run.folder / f"{name}.jsonl").open("a") for name in policies}
    try:
        with tqdm(total=len(samples), desc="evaluate", unit="sample", disable=not progress) as bar:
            bar.update(len(samples) - len(todo))
            for start in todo[::batch_size]:
                batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
                lacking = [name for name in policies if any(sample.id not in rows[name] for sample in batch)]
                inputs = run.encode(batch) if lacking else None
                for name in lacking:
                    for place, row in enumerate(run.answer(inputs, policies[name], batch)):
                        if row["id"] in rows[name]:
                            continue
                        row["index"] = start + place
                        dense = row if name == DENSE else rows[DENSE][row["id"]]
                        row["agrees"] = row["ids"] == dense["ids"]
                        rows[name][row["id"]] = row
                        files[name].write(json.dumps(row) + "\n")
                        changed += not row["agrees"]
                        if start + place < pictures or (not row["agrees"] and changed <= pictures):
                            _save_picture(run.folder / "images" / f"{start + place}.png", batch[place])
                    files[name].flush()
                bar.update(len(batch))
    finally:
        for file in files.values():
            file.close()


def _save_picture(path: Path, sample: Sample) -> None:
    if sample.images and not path.exists():
        path.parent.mkdir(exist_ok=True)
        picture = sample.images[0].copy()
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        picture.save(path)


def _read_rows(path: Path) -> dict[str, Any]:
    """Rows by sample id; a last line that was cut off by a crash is removed from the file."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return {row["id"]: row for row in map(json.loads, lines)}


def _time_all(
    run: _Run,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    batch_size: int,
    timing_batches: int,
    progress: bool,
) -> dict[str, Any]:
    """Times of the policies that have none yet; the dense model is measured again beside each of them."""
    path = run.folder / "timing.json"
    timing = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in policies if name not in timing]
    if timing_batches < 1 or not missing:
        return timing
    size = min(batch_size, len(samples))
    count = min(timing_batches, len(samples) // size)
    starts = [round(i * (len(samples) - size) / max(count - 1, 1)) for i in range(count)]
    groups = [[samples[i] for i in range(start, start + size)] for start in starts]
    encoded = [run.encode(group) for group in groups]
    for name in tqdm(missing, desc="time", unit="policy", disable=not progress):
        timing[name] = _time_policy(run, groups, encoded, policies[name]) | {"batch_size": size}
        _write_json(path, timing)
    return timing


def _time_policy(
    run: _Run, groups: list[list[Sample]], encoded: list[dict[str, Any]], policy: Policy
) -> dict[str, Any]:
    """Medians over batches, each measured twice: the dense model first, then the policy first."""
    tokens = run.max_new_tokens
    pair = {DENSE: None, "exit": policy}
    prefill: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
    decode: dict[str, list[float]] = {name: [] for name in pair}
    for name in pair:  # warm-up: the first calls allocate and compile
        run.seconds(encoded[0], min(2, tokens), pair[name], groups[0])
    for order in (list(pair), list(pair)[::-1]):
        for group, inputs in zip(groups, encoded):
            for name in order:
                prefill[name].append(run.seconds(inputs, 1, pair[name], group))
            for name in order if tokens > 1 else ():
                decode[name].append(run.seconds(inputs, tokens, pair[name], group)["step"])

    def medians(key: str) -> dict[str, float]:
        return {name: statistics.median(measured[key] for measured in prefill[name]) for name in pair}

    def ratio(key: str) -> float:
        return statistics.median(e[key] / d[key] for d, e in zip(prefill[DENSE], prefill["exit"]))

    return {
        "batches": len(groups),
        "prefill_seconds": medians("whole"),
        "prefill_ratio": ratio("whole"),
        "decoder_seconds": medians("decoder"),
        "decoder_ratio": ratio("decoder"),
        "decode_seconds": {name: statistics.median(decode[name]) for name in pair} if tokens > 1 else None,
        "cache_bytes": medians("cache"),
    }


def summarise(
    scorer: AnswerMetric, rows: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], num_layers: int
) -> dict[str, Any]:
    """What the rows of a policy come to, beside the dense rows of the same samples, over all and per kind."""
    by_kind: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_kind.setdefault(row["kind"], []).append(i)
    whole = _summary_of(scorer, rows, dense, num_layers)
    if len(by_kind) > 1:
        whole["by_kind"] = {
            kind: _summary_of(scorer, [rows[i] for i in index], [dense[i] for i in index], num_layers)
            for kind, index in sorted(by_kind.items())
        }
    return whole


def _summary_of(
    scorer: AnswerMetric, rows: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], num_layers: int
) -> dict[str, Any]:
    n = len(rows)
    exits = torch.tensor([row["exit_layer"] for row in rows])
    visual = torch.tensor([row["visual_tokens"] for row in rows], dtype=torch.float64)
    seen = [row.get("visual_places", row["visual_tokens"] * row["exit_layer"]) for row in rows]
    agrees = torch.tensor([row["agrees"] for row in rows], dtype=torch.float64)
    summary: dict[str, Any] = {"n": n}
    scored = [row for row in rows if row["answers"]]
    if scored:
        scorer.reset()
        scorer.update(*([row[key] for row in scored] for key in ("answer", "answers", "choices")))
        summary |= {name: _number(value) for name, value in scorer.compute().items() if name != "n"}
        scorer.reset()

    def mean(key: str, of: Sequence[Mapping[str, Any]]) -> float:
        return sum(row[key] for row in of) / n

    agreement = agrees.mean().item()
    return summary | {
        "agreement": agreement,
        "agreement_stderr": (agreement * (1 - agreement) / n) ** 0.5,
        "disagreements": int(n - agrees.sum()),
        "mean_exit_layer": exits.double().mean().item(),
        "exit_layers": torch.bincount(exits - 1, minlength=num_layers).tolist(),
        "visual_layers_removed": _number(1 - sum(seen) / (visual.sum() * num_layers)),
        "flops": mean("flops", rows),
        "flops_removed": 1 - mean("flops", rows) / mean("flops", dense),
        "kv_bytes": mean("kv_bytes", rows),
        "kv_bytes_removed": 1 - mean("kv_bytes", rows) / mean("kv_bytes", dense),
    }


def _number(value: torch.Tensor) -> float | None:
    """A float that JSON can hold: what is not defined becomes null."""
    return None if torch.isnan(value) else value.item()


def hardware(model: nn.Module) -> dict[str, Any]:
    """What the model runs on."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "system": platform.system()}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _data_fingerprint(samples: Sequence[Sample]) -> str:
    given = getattr(samples, "fingerprint", None)
    if given is not None:
        return given
    text = json.dumps([[sample.id, sample.question, sample.answers] for sample in samples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """What the answers depend on; where the model was loaded from is not part of it."""
    return {
        "class": type(underlying_model(model)).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model),
    }


def weights_fingerprint(module: nn.Module) -> str:
    """Changes with the architecture and the weights, of which it sees the first few of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        first = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {first.tolist()}".encode())
    return digest.hexdigest()[:16]


def describe(value: Any) -> Any:
    """What determines a policy's decisions, in terms of JSON: class, settings, fingerprints of modules and tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, Mapping) or isinstance(value, torch.Tensor):
        items = sorted(value.items()) if isinstance(value, Mapping) else value.tolist()
        return hashlib.sha256(json.dumps(items, default=str).encode()).hexdigest()[:16]
    if isinstance(value, nn.Module):
        return {"class": type(value).__name__, "weights": weights_fingerprint(value)}
    if isinstance(value, torch.Generator):
        return {"seed": value.initial_seed()}
    if isinstance(value, functools.partial):
        keywords = {key: describe(v) for key, v in value.keywords.items()}
        return {"call": describe(value.func), "args": describe(value.args)} | keywords
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return {"class": type(value).__name__} | {k: describe(v) for k, v in vars(value).items() if not k.startswith("_")}


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(fresh, path)
