"""What the commands are told that look at results, beside the runs of :mod:`dyvte.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dyvte.config import ModelConfig
from dyvte.ranges import Checked, Count, OpenShare, Range


@dataclass(kw_only=True)
class EvaluateConfig(ModelConfig):
    """Ask held-out questions, dense and with every policy: score, agreement, exit layers, compute and time saved.

    Args:
        data: what to ask: a YAML file such as configs/data/pope.yaml, or a mapping.
        output: folder of the results.
        heads: folder or hub id of exit heads, for learned policies.
        policies: what to compare with the dense model, each name with its settings: learned {threshold, min_layer,
            heads}, fixed-6 {layer}, random {p, seed}, oracle {traces}, vtw {traces, eta, first}, fastv-50 or prune-50
            {layer, keep}, or any of dyvte.methods.METHODS. The part of a name before the first dash says what it is;
            ``exit: {fixed: {layer: 6}}`` among the settings lets what is left leave later.
        batch_size: samples per forward pass, also where time is measured.
        max_new_tokens: longest answer; what the data asks for if not given, else 16.
        metric: how answers are scored; what the data asks for if not given, else exact_match.
        json: print the whole summary as JSON, instead of a table.
    """

    data: str | dict[str, Any]
    output: str
    heads: str | None = None
    policies: dict[str, Any] = field(default_factory=lambda: {"learned": {}})
    batch_size: Count = 8
    max_new_tokens: Count | None = None
    metric: str | None = None
    json: bool = False


@dataclass(kw_only=True)
class InspectConfig(ModelConfig):
    """Look into a model layer by layer: where its text tokens look, what every exit would change, how fast the text
    state changes. Writes numbers and one figure.

    Args:
        data: what to ask: a YAML file such as configs/data/pope.yaml, or a mapping.
        output: folder of the numbers and the figure.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer; what the data asks for if not given, else 16.
    """

    data: str | dict[str, Any]
    output: str
    batch_size: Count = 8
    max_new_tokens: Count | None = None


@dataclass(kw_only=True)
class ReportConfig:
    """Turn the results of ``dyvte evaluate`` into one self-contained HTML page and pictures.

    Args:
        directory: folder of the results.
    """

    directory: str


@dataclass(kw_only=True)
class ConvertConfig:
    """Turn gates that the original DyVTE code has trained into exit heads that decide the same.

    Args:
        weights: safetensors or torch file with ``model.visual_gates_router.{i}.w1.weight`` and ``.w2.weight``.
        base_model: hub id or folder of the model they were trained for.
        output: folder of the heads.
    """

    weights: str
    base_model: str
    output: str


@dataclass(kw_only=True)
class ServeConfig(ModelConfig):
    """Answer requests of OpenAI clients with exits: transformers' own server (/v1/chat/completions, /v1/responses),
    streaming included. A chat completion tells its exit layer and what it saved under ``dyvte``.

    Args:
        heads: folder or hub id of exit heads, or the folder of any method that ``dyvte calibrate`` has promised.
        risk: share of answers that may change, instead of the one calibrated for; from the same curve.
        host: address to listen on; by default this machine alone can ask.
        port: port to listen on.
        log: what the server writes: critical, error, warning, info, debug or trace.
    """

    heads: str
    risk: OpenShare | None = None
    host: str = "localhost"
    port: Annotated[int, Range(least=1, most=65535)] = 8000
    log: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"


@dataclass(kw_only=True)
class DemoConfig(Checked):
    """Answer held-out questions with the reference MLLM, dense and with exits: a table and a picture.

    Args:
        model: folder of the reference MLLM; the one that came with dyvte if not given.
        heads: folder of its exit heads; those that came with dyvte if not given.
        per_kind: questions of each kind, timed as one batch.
        repeats: timed runs of every batch, dense and with exits in turn.
        output: folder of the picture and the numbers.
        threads: CPU threads of this process.
    """

    model: str | None = None
    heads: str | None = None
    per_kind: Count = 32
    repeats: Count = 3
    output: str = "runs/demo"
    threads: Count = 1


@dataclass(kw_only=True)
class BenchmarkConfig(Checked):
    """Plan runs of lmms-eval, dense and for every promised risk, write the commands of those that are missing, and join
    the results of the others into one table.

    Args:
        models: by the name in the table, what ``--model dyvte`` of lmms-eval is told: base, pretrained, heads, and the
            base's own arguments.
        output: folder of the commands, the results and the table.
        risks: the shares of changed answers that are promised.
        benchmarks: names of ready benchmarks, or a mapping of others, see dyvte/integrations/benchmarks.yaml; all ready
            ones if not given.
        limit: how many questions of each benchmark; all if not given.
        compare: answer everything dense beside every risk, too, in turns: times to trust, for twice the work.
        batch_size: what lmms-eval is told; not all of its models take more than 1.
        device: what lmms-eval is told, such as cuda:1; its model's own choice if not given.
        include_path: folder of further tasks of lmms-eval.
        gen_kwargs: what lmms-eval is told about generation, instead of what the tasks say.
        launcher: what starts lmms-eval, such as accelerate launch --num_processes 8 -m lmms_eval.
    """

    models: dict[str, Any]
    output: str
    risks: list[float] = field(default_factory=lambda: [0.005, 0.01, 0.02])
    benchmarks: list[str] | dict[str, Any] | None = None
    limit: Count | None = None
    compare: bool = False
    batch_size: Count = 1
    device: str | None = None
    include_path: str | None = None
    gen_kwargs: str | None = None
    launcher: str = "python -m lmms_eval"


@dataclass(kw_only=True)
class AppConfig(ModelConfig):
    """Serve a page to ask about images: the answer with exits beside the dense one, on this machine.

    Args:
        model: folder or hub id of the MLLM; the reference one that came with dyvte if not given.
        heads: folder or hub id of its exit heads; those of the reference MLLM if no model is given.
        data: questions to begin with, a YAML file or a mapping, the first six of them; scenes if not given.
        risk: share of answers that may change, to begin with; what the heads were made for if not given.
        max_new_tokens: longest answer.
        host: address to listen on. The page is for this machine alone, unless another is given, such as 0.0.0.0; it
            asks nobody for a password.
        port: port to listen on.
        megabytes: largest file that is taken.
        megapixels: largest image that is taken.
    """

    model: str | None = None  # type: ignore[assignment]
    heads: str | None = None
    data: str | dict[str, Any] | None = None
    risk: OpenShare | None = None
    max_new_tokens: Count = 16
    host: str = "127.0.0.1"
    port: Annotated[int, Range(least=1, most=65535)] = 7860
    megabytes: Count = 10
    megapixels: Count = 40
