"""What a run is told: one dataclass per kind of run, for command lines, YAML files and scripts alike.

Only the standard library is imported here, so that a command line can explain itself at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Shard = Literal["none", "zero3", "fsdp2", "tp", "device_map"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracking = Literal["none", "tensorboard", "trackio", "wandb"]


@dataclass(kw_only=True)
class ModelConfig:
    """The MLLM of a run, and how it lies in memory.

    Args:
        model: local folder or hub id of the MLLM.
        revision: revision of the model on the hub.
        adapter: folder or hub id of a peft adapter that is put on the model.
        quantization: settings of ``transformers.BitsAndBytesConfig``, such as ``{load_in_4bit: true}``; models that are
            stored quantised (GPTQ, AWQ) need none.
        shard: how the frozen model lies over the ranks: a copy on each (none), DeepSpeed ZeRO-3, FSDP2, tensor
            parallel, or all devices of one process (device_map).
        dtype: type to load it in.
        attention: attention implementation, such as sdpa or flash_attention_2; the model's own if not given.
        device: cpu, cuda, cuda:1 ...; auto takes the rank's GPU if there is one.
        loader: ``package.module:function`` that loads models of other code bases, see docs/loaders.md.
        trust_remote_code: run code that comes with the model.
        threads: CPU threads of each process.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    quantization: dict[str, Any] | None = None
    shard: Shard = "none"
    dtype: Dtype = "auto"
    attention: str | None = None
    device: str = "auto"
    loader: str | None = None
    trust_remote_code: bool = False
    threads: int | None = None


@dataclass(kw_only=True)
class TraceSettings:
    """How samples are traced.

    Args:
        answers: dense: trace the model's own greedy answer; dataset: the given one.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer; what the data asks for if not given, else 16.
        exits: exit layers to trace, a stride or a list; all if not given.
        unit_size: samples per unit, the most that a restart repeats on a rank.
        seed: of the order of the samples.
        on_error: a sample that cannot be used stops the run, or is skipped and noted.
        max_errors: samples that may be skipped.
    """

    answers: Literal["dense", "dataset"] = "dense"
    batch_size: int = 8
    max_new_tokens: int | None = None
    exits: int | list[int] | None = None
    unit_size: int = 32
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: int = 100


@dataclass(kw_only=True)
class TraceConfig(ModelConfig, TraceSettings):
    """Run a frozen MLLM over questions once, and write down what every exit layer would do to every answer.

    Args:
        data: what to ask: a YAML file such as configs/data/gqa.yaml, or a mapping.
        output: folder of the traces.
        plan: print what would run and what it would cost, and stop.
        tracking: where throughput is logged.
    """

    data: str | dict[str, Any]
    output: str
    plan: bool = False
    tracking: Tracking = "none"


@dataclass(kw_only=True)
class FitSettings:
    """How heads are trained.

    Args:
        form: shared, or original: the published one; see :class:`dyvte.ExitHeadsConfig`.
        width: inner width of the heads.
        label_rule: what "the visual tokens can leave" means, see :func:`dyvte.training.fit.exit_labels`.
        epochs: passes over the shuffled traces.
        batch_size: traces per step, over all ranks.
        lr: learning rate of AdamW, with a short warm-up and cosine decay.
        weight_decay: of AdamW.
        dropout: of the text states.
        lookahead: how many layers before an exit layer it is decided.
        validation: share of the traces that choose the epoch; they train nothing.
        guard: share of usual samples that the guard lets pass at each layer; null: no guard. The published form has
            none.
        seed: of the initial weights, the split and the order of the traces.
        save_every: epochs between states to resume from.
        deepspeed: a DeepSpeed config (ZeRO-1 or ZeRO-2), file or mapping; without one, plain data parallelism.
    """

    form: Literal["shared", "original"] = "shared"
    width: int = 128
    label_rule: Literal["agreement", "original"] = "agreement"
    epochs: int = 40
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    lookahead: int = 0
    validation: float = 0.15
    guard: float | None = 0.99
    seed: int = 0
    save_every: int = 1
    deepspeed: str | dict[str, Any] | None = None


@dataclass(kw_only=True)
class OnlineSettings:
    """How heads learn while the model is traced, with no states on the disk.

    Args:
        buffer: the latest traces that are kept to learn from again, over all ranks.
        updates: steps after every batch of traces.
        batch_size: traces per step, over all ranks.
        passes: how often the data is traced.
        save_every: batches between states to resume from.
    """

    buffer: int = 8192
    updates: int = 16
    batch_size: int = 128
    passes: int = 1
    save_every: int = 32


@dataclass(kw_only=True)
class PromiseSettings:
    """What is promised, and on which samples.

    Args:
        alpha: the rate of changed answers to stay below; null: no promise, the threshold is 0.5.
        delta: 1 - confidence of that promise.
        shared_images: allow held-out questions about images of training.
    """

    alpha: float | None = 0.01
    delta: float = 0.1
    shared_images: bool = False


@dataclass(kw_only=True)
class FitConfig(PromiseSettings):
    """Train exit heads from traces, and choose the threshold that keeps the promise.

    Args:
        traces: trace folders to train on.
        calibration: held-out trace folders to choose the threshold on; not needed with alpha=null.
        output: folder of the heads.
        fit: how the heads are trained.
        plan: print what would run and what it would cost, and stop.
        tracking: where the loss is logged.
        threads: CPU threads of each process.
    """

    traces: str | list[str]
    output: str
    calibration: str | list[str] | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    plan: bool = False
    tracking: Tracking = "none"
    threads: int | None = None


@dataclass(kw_only=True)
class TrainConfig(ModelConfig, TraceSettings, PromiseSettings):
    """From a model and two sets of questions to exit heads that keep a promise: trace, fit, calibrate, card.

    Args:
        data: what to train on: a YAML file or a mapping.
        held_out: what to choose the threshold on: other samples, with other images.
        output: folder of the heads.
        work: folder of traces and of states to resume from; runs/NAME-OF-OUTPUT if not given.
        mode: offline: trace, then learn from the traces; online: learn while tracing, with no states on the disk.
        fit: how the heads are trained.
        online: how they are trained online.
        plan: print what would run and what it would cost, and stop.
        tracking: where throughput and loss are logged.
    """

    data: str | dict[str, Any]
    held_out: str | dict[str, Any] | None = None
    output: str
    work: str | None = None
    mode: Literal["offline", "online"] = "offline"
    fit: FitSettings = field(default_factory=FitSettings)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    plan: bool = False
    tracking: Tracking = "none"
