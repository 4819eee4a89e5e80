"""What a run is told: one dataclass per kind of run, for command lines, YAML files and scripts alike.

Nothing heavy is imported here, so that a command line can explain itself at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dyvte.ranges import Checked, Count, Nonnegative, OpenShare, Positive, Range, Whole

Shard = Literal["none", "zero3", "fsdp2", "tp", "device_map"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracking = Literal["none", "tensorboard", "trackio", "wandb"]


@dataclass(kw_only=True)
class ModelConfig(Checked):
    """The MLLM of a run, and how it lies in memory.

    Args:
        model: local folder or hub id of the MLLM.
        revision: revision of the model on the hub; the main one if not given.
        adapter: folder or hub id of a peft adapter that is put on the model.
        quantization: settings of ``transformers.BitsAndBytesConfig``, such as ``{load_in_4bit: true}``; models that are
            stored quantised (GPTQ, AWQ) need none.
        shard: how the frozen model lies over the ranks: a copy on each (none), DeepSpeed ZeRO-3, FSDP2, tensor
            parallel, or all devices of one process (device_map).
        dtype: type to load it in: float32, bfloat16, float16, or the one it is stored in (auto).
        attention: attention implementation, such as sdpa or flash_attention_2; the model's own if not given.
        device: where it runs: cpu, cuda, cuda:1 ..., or the rank's GPU if there is one (auto).
        loader: the function that loads models of other code bases, as ``package.module:function``, see docs/loaders.md.
        trust_remote_code: run code that comes with the model.
        threads: CPU threads of each process; torch's choice if not given.
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
    threads: Count | None = None


@dataclass(kw_only=True)
class TraceSettings(Checked):
    """How samples are traced.

    Args:
        answers: what is traced: the model's own greedy answer (dense), or the given one (dataset).
        batch_size: samples per forward pass.
        max_new_tokens: longest answer; what the data asks for if not given, else 16.
        exits: exit layers to trace, a stride or a list; all if not given.
        unit_size: samples per unit, the most that a restart repeats on a rank.
        seed: seed of the order of the samples.
        on_error: what a sample that cannot be used does: it ends the run (stop), or is left out and noted (skip).
        max_errors: how many samples may be skipped.
    """

    answers: Literal["dense", "dataset"] = "dense"
    batch_size: Count = 8
    max_new_tokens: Count | None = None
    exits: int | list[int] | None = None
    unit_size: Count = 32
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: Whole = 100


@dataclass(kw_only=True)
class TraceConfig(ModelConfig, TraceSettings):
    """Run a frozen MLLM over questions once, and write down what every exit layer would do to every answer.

    Args:
        data: what to ask: a YAML file such as configs/data/gqa.yaml, or a mapping.
        output: folder of the traces.
        pruning: a method that drops tokens, on top of which exits are traced, such as
            ``{fastv.layer: 2, fastv.keep: 0.5}``; agreement is with the answers of the model without it.
        plan: print what would run and what it would cost, and stop.
        tracking: where throughput is logged: none, tensorboard, trackio or wandb.
    """

    data: str | dict[str, Any]
    output: str
    pruning: dict[str, Any] | None = None
    plan: bool = False
    tracking: Tracking = "none"


@dataclass(kw_only=True)
class FitSettings(Checked):
    """How heads are trained.

    Args:
        form: one head for all layers (shared) or the published one (original), see :class:`dyvte.ExitHeadsConfig`.
        width: inner width of the heads.
        label_rule: what "the visual tokens can leave" means, agreement or original, see
            :func:`dyvte.training.fit.exit_labels`.
        epochs: passes over the shuffled traces.
        batch_size: traces per step, over all ranks.
        lr: learning rate of AdamW, with a short warm-up and cosine decay.
        weight_decay: weight decay of AdamW.
        dropout: dropout of the text states.
        lookahead: how many layers before an exit layer it is decided.
        validation: share of the traces that choose the epoch; they train nothing.
        guard: share of usual samples that the guard lets pass at each layer; null: no guard. The published form has
            none.
        seed: seed of the initial weights, the split and the order of the traces.
        save_every: epochs between states to resume from.
        deepspeed: a DeepSpeed config (ZeRO-1 or ZeRO-2), file or mapping; without one, plain data parallelism.
    """

    form: Literal["shared", "original"] = "shared"
    width: Count = 128
    label_rule: Literal["agreement", "original"] = "agreement"
    epochs: Count = 40
    batch_size: Count = 128
    lr: Positive = 2e-3
    weight_decay: Nonnegative = 0.05
    dropout: Annotated[float, Range(least=0, below=1)] = 0.3
    lookahead: Whole = 0
    validation: OpenShare = 0.15
    guard: OpenShare | None = 0.99
    seed: int = 0
    save_every: Count = 1
    deepspeed: str | dict[str, Any] | None = None


@dataclass(kw_only=True)
class OnlineSettings(Checked):
    """How heads learn while the model is traced, with no states of training on the disk.

    Each trace is learned from updates * batch_size / round_size times, on average, and those that are kept at the end
    settling times more. Rounds should be as large as what all ranks trace at once, or a multiple.

    Args:
        buffer: the latest traces that are kept in memory to learn from again, over all ranks.
        round_size: samples that are traced before each turn of learning, over all ranks.
        updates: steps of each such turn.
        batch_size: traces per step, over all ranks.
        passes: how often the data is traced.
        settling: how often the traces that are kept at the end are learned from once more.
        save_every: rounds between states to resume from, and between looks at the validation loss.
    """

    buffer: Count = 8192
    round_size: Count = 64
    updates: Count = 8
    batch_size: Count = 128
    passes: Count = 1
    settling: Whole = 16
    save_every: Count = 4


@dataclass(kw_only=True)
class PromiseSettings(Checked):
    """What is promised, and on which samples.

    Args:
        alpha: the rate of changed answers to stay below; null: no promise, the threshold is 0.5.
        delta: how probable it may be that the promise does not hold: 1 - its confidence.
        shared_images: allow held-out questions about images of training.
    """

    alpha: OpenShare | None = 0.01
    delta: OpenShare = 0.1
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
        tracking: where the loss is logged: none, tensorboard, trackio or wandb.
        threads: CPU threads of each process; torch's choice if not given.
    """

    traces: str | list[str]
    output: str
    calibration: str | list[str] | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    plan: bool = False
    tracking: Tracking = "none"
    threads: Count | None = None


@dataclass(kw_only=True)
class TrainConfig(ModelConfig, TraceSettings, PromiseSettings):
    """From a model and two sets of questions to exit heads that keep a promise: trace, fit, calibrate, card.

    Args:
        data: what to train on: a YAML file or a mapping.
        held_out: what to choose the threshold on: other samples, with other images.
        output: folder of the heads.
        work: folder of traces and of states to resume from; runs/NAME-OF-OUTPUT if not given.
        mode: trace, then learn from the traces (offline), or learn while tracing, with no states on the disk (online).
        fit: how the heads are trained.
        online: how they are trained online.
        plan: print what would run and what it would cost, and stop.
        tracking: where throughput and loss are logged: none, tensorboard, trackio or wandb.
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


@dataclass(kw_only=True)
class VTWSettings(Checked):
    """How VTW (arXiv 2405.05803) chooses its exit layer.

    Args:
        eta: mean KL divergence of the next token that is allowed, in nats, or the name of a model that it was
            published for, such as llava-1.5-7b.
        first: the smallest exit layer to consider.
        samples: how many traces to average over.
        seed: which ones.
    """

    eta: float | str = "llava-1.5-7b"
    first: Count = 5
    samples: Count = 20
    seed: int = 0


@dataclass(kw_only=True)
class CalibrateConfig(PromiseSettings):
    """Choose from held-out traces: another threshold for trained heads, or the one exit layer that VTW would take.

    Args:
        traces: held-out trace folders.
        policy: what is chosen: the threshold of heads (learned), or one layer for all (vtw).
        heads: folder of the heads; not needed with policy=vtw.
        output: folder of the recalibrated heads, in place if not given; with policy=vtw, a JSON file.
        vtw: how VTW chooses.
        threads: CPU threads of this process; torch's choice if not given.
    """

    traces: str | list[str]
    policy: Literal["learned", "vtw"] = "learned"
    heads: str | None = None
    output: str | None = None
    vtw: VTWSettings = field(default_factory=VTWSettings)
    threads: Count | None = None


@dataclass(kw_only=True)
class MethodConfig(ModelConfig, PromiseSettings):
    """Choose the boldest setting of any method that keeps a promise, from held-out questions: a pass for each setting.

    Args:
        method: a name in dyvte.methods.METHODS, or several, joined by ``&``.
        data: held-out questions: a YAML file or a mapping.
        output: folder of the promise, for dyvte.load; a run that was stopped goes on there.
        fixed: arguments that are the same in all settings, in place of those that the method declares.
        settings: arguments in place of those that it declares, from the safest to the boldest; named
            ``method.argument`` where there are several methods.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer; what the data asks for if not given, else 16.
        on_error: what a sample that cannot be used does: it ends the run (stop), or is left out and noted (skip).
        max_errors: how many samples may be skipped.
    """

    method: str
    data: str | dict[str, Any]
    output: str
    fixed: dict[str, Any] | None = None
    settings: list[dict[str, Any]] | None = None
    batch_size: Count = 8
    max_new_tokens: Count | None = None
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: Whole = 100
