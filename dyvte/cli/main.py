"""The ``dyvte`` program: trace -> train -> evaluate, and a demo. Each command reads a YAML file and key=value pairs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dyvte.version import __version__


@dataclass(frozen=True)
class Key:
    """One key of a config: its default and what it means. ``...`` as default: the user has to give it."""

    default: Any
    help: str


MODEL_KEYS = {
    "model": Key(..., "the MLLM: a local folder or a hub id"),
    "revision": Key(None, "revision of the model on the hub"),
    "dtype": Key("auto", "type to load it in: auto, float32, bfloat16, float16"),
    "attention": Key(None, "attention implementation: sdpa, eager, flash_attention_2; default: the model's"),
    "device": Key("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one"),
    "threads": Key(None, "CPU threads of this process"),
}

COMMANDS: dict[str, tuple[str, dict[str, Key]]] = {
    "trace": (
        "Run a frozen MLLM over questions once, and write down what every exit layer would do to every answer.\n"
        "Interrupted runs go on where they stopped. Several processes share the work:\n"
        "  torchrun --nproc_per_node 8 train/trace.py configs/trace.yaml\n"
        "Example:\n"
        "  dyvte trace configs/trace.yaml data.scenes.n=500 output=runs/traces/small",
        MODEL_KEYS
        | {
            "data": Key(..., "what to ask: a mapping or a YAML file such as configs/data/gqa.yaml"),
            "output": Key(..., "folder of the traces"),
            "answers": Key("dense", "dense: trace the model's own greedy answer; dataset: the given one"),
            "batch_size": Key(8, "samples per forward pass"),
            "max_new_tokens": Key(None, "longest answer; default: what the data asks for, else 16"),
            "exits": Key(None, "exit layers to trace: a stride, or a list; default: all"),
            "unit_size": Key(32, "samples per unit, the most that a restart repeats; 32 at most"),
            "seed": Key(0, "of the order of the samples"),
            "on_error": Key("stop", "a sample that cannot be used: stop, or skip it and note why"),
            "max_errors": Key(100, "samples that may be skipped"),
        },
    ),
    "train": (
        "Train exit heads from traces (seconds on a CPU; the MLLM is not needed) and choose the threshold that keeps\n"
        "P(answer changes) <= alpha with confidence 1 - delta on traces that trained nothing.\n"
        "Example:\n"
        "  dyvte train configs/train.yaml alpha=0.02 output=runs/heads",
        {
            "traces": Key(..., "trace folder(s) to train on"),
            "calibration": Key(None, "held-out trace folder(s) to choose the threshold on; not needed with alpha=null"),
            "output": Key(..., "folder of the heads"),
            "alpha": Key(0.01, "the rate of changed answers to stay below; null: no promise, the threshold is 0.5"),
            "delta": Key(0.1, "1 - confidence of that promise"),
            "shared_images": Key(False, "allow held-out questions about images of training"),
            "fit": Key(
                {}, "training settings: form, width, label_rule, epochs, batch_size, lr, weight_decay, seed ..."
            ),
            "threads": Key(None, "CPU threads of this process"),
        },
    ),
    "calibrate": (
        "Choose from held-out traces: another threshold for trained heads, or the one exit layer that VTW\n"
        "(arXiv 2405.05803) would take.\n"
        "Examples:\n"
        "  dyvte calibrate heads=checkpoints/reference-heads traces=runs/traces/calibration alpha=0.005\n"
        "  dyvte calibrate policy=vtw traces=runs/traces/calibration vtw.eta=0.003 output=runs/vtw.json",
        {
            "policy": Key("learned", "learned: the threshold of heads; vtw: one layer for all"),
            "heads": Key(None, "learned: folder of the heads"),
            "traces": Key(..., "held-out trace folder(s)"),
            "output": Key(None, "folder of the recalibrated heads, default: in place; vtw: a JSON file"),
            "alpha": Key(0.01, "learned: the rate of changed answers to stay below"),
            "delta": Key(0.1, "learned: 1 - confidence of that promise"),
            "shared_images": Key(False, "learned: allow held-out questions about images of training"),
            "vtw": Key({}, "vtw: eta (nats, or a name such as llava-1.5-7b), first, samples, seed"),
            "threads": Key(None, "CPU threads of this process"),
        },
    ),
    "evaluate": (
        "Ask held-out questions, dense and with every policy: score, agreement, exit layers, compute and time saved.\n"
        "Example:\n"
        "  dyvte evaluate configs/evaluate.yaml 'policies={learned: {}, fixed-6: {layer: 6}}' output=runs/eval/mine",
        MODEL_KEYS
        | {
            "heads": Key(None, "folder or hub id of exit heads, for learned policies"),
            "data": Key(..., "what to ask: a mapping or a YAML file such as configs/data/gqa.yaml"),
            "output": Key(..., "folder of the results"),
            "policies": Key(
                {"learned": {}},
                "what to compare with the dense model: learned {threshold, min_layer, heads}, fixed-6 {layer}, "
                "random {p, seed}, oracle {traces}, vtw {traces, eta, first}, fastv-50, prune-50 {layer, keep}, or any "
                "of dyvte.methods.METHODS; exit: {fixed: {layer: 6}} lets what is left leave later",
            ),
            "batch_size": Key(8, "samples per forward pass"),
            "max_new_tokens": Key(None, "longest answer; default: what the data asks for, else 16"),
            "metric": Key(None, "how answers are scored; default: what the data asks for, else exact_match"),
        },
    ),
    "inspect": (
        "Look into a model layer by layer: where its text tokens look, what every exit would change, how fast the\n"
        "text state changes. Writes numbers and one figure.\n"
        "Example:\n"
        "  dyvte inspect model=checkpoints/reference-mllm dtype=float32 output=runs/inspect \\\n"
        "      'data={scenes: {split: test, n: 120}}'",
        MODEL_KEYS
        | {
            "data": Key(..., "what to ask: a mapping or a YAML file such as configs/data/gqa.yaml"),
            "output": Key(..., "folder of the numbers and the figure"),
            "batch_size": Key(8, "samples per forward pass"),
            "max_new_tokens": Key(None, "longest answer; default: what the data asks for, else 16"),
        },
    ),
    "report": (
        "Turn the results of evaluate into one self-contained HTML page and pictures.\n"
        "Example:\n"
        "  dyvte report runs/evaluation",
        {"directory": Key(..., "folder of results")},
    ),
    "convert": (
        "Turn gates trained by the original DyVTE code into exit heads that decide the same.\n"
        "Example:\n"
        "  dyvte convert weights=gates.bin base_model=llava-hf/llava-1.5-7b-hf output=runs/original-heads",
        {
            "weights": Key(
                ..., "safetensors or torch file with model.visual_gates_router.{i}.w1.weight and .w2.weight"
            ),
            "base_model": Key(..., "hub id or path of the model they were trained for"),
            "output": Key(..., "folder of the heads"),
        },
    ),
    "demo": (
        "Answer held-out questions with the shipped reference MLLM, dense and with exits; print a table and\n"
        "draw a picture.",
        {
            "model": Key("checkpoints/reference-mllm", "the MLLM"),
            "heads": Key("checkpoints/reference-heads", "its exit heads"),
            "per_kind": Key(32, "questions of each kind; timed as one batch"),
            "repeats": Key(5, "timed runs of every batch, dense and with exits in turn"),
            "output": Key("runs/demo", "folder of the picture and the numbers"),
            "threads": Key(1, "CPU threads of this process"),
        },
    ),
}


def read_yaml(file: str) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no config file {file}: give a YAML file, or only key=value pairs")
    given = yaml.safe_load(Path(file).read_text()) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{file} must hold a mapping of keys to values")
    return given


def read_config(command: str, file: str | None, overrides: list[str]) -> dict[str, Any]:
    """Defaults, then the YAML file, then key=value pairs; dots reach into mappings.

    Raises:
        ValueError: an unknown key, a required one that is missing, or something that is not key=value.
    """
    keys = COMMANDS[command][1]
    config: dict[str, Any] = {name: key.default for name, key in keys.items()}
    if file is not None:
        config |= read_yaml(file)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not key=value: write for example batch_size=4 or data.limit=100")
        *outer, last = path.split(".")
        place = config
        for name in outer:
            if isinstance(place.get(name), str) and Path(place[name]).suffix == ".yaml":
                place[name] = read_yaml(place[name])
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place[name] = dict(place[name])
            place = place[name]
        place[last] = yaml.safe_load(text)
    unknown = sorted(set(config) - set(keys))
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)} for `dyvte {command}`: choose from {', '.join(keys)}")
    missing = [name for name, value in config.items() if value is ...]
    if missing:
        raise ValueError(f"`dyvte {command}` needs {', '.join(missing)}: set them in the config file or as key=value")
    return config


def load_model(config: dict[str, Any]) -> tuple[Any, Any]:
    """The MLLM, ready for inference, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = config["device"]
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    chosen = {"attn_implementation": config["attention"]} if config["attention"] else {}
    model = AutoModelForImageTextToText.from_pretrained(
        config["model"], revision=config["revision"] or "main", dtype=config["dtype"], **chosen
    )
    processor = AutoProcessor.from_pretrained(config["model"], revision=config["revision"] or "main")
    return model.eval().to(device), processor


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def data_config(config: dict[str, Any]) -> dict[str, Any]:
    """The data of a command, from a file if it names one; the command's own scoring keys win over the data's."""
    from dyvte.data import read_config as read_data

    data = read_data(config["data"])
    for key, default in (("max_new_tokens", 16), ("metric", "exact_match")):
        if key in config and config[key] is None:
            config[key] = data.get(key, default)
    return data


def trace(config: dict[str, Any]) -> None:
    from dyvte.data import fingerprint, load_samples
    from dyvte.training.write import write_traces

    data = data_config(config)
    samples = load_samples(data)
    model, processor = load_model(config)
    write_traces(
        model,
        processor,
        samples,
        config["output"],
        answers=config["answers"],
        batch_size=config["batch_size"],
        max_new_tokens=config["max_new_tokens"],
        template=data.get("template"),
        provenance=data | {"fingerprint": fingerprint(data)},
        **{name: config[name] for name in ("exits", "unit_size", "seed", "on_error", "max_errors")},
    )


def train(config: dict[str, Any]) -> None:
    from dyvte.training.calibrate import calibrate as set_threshold
    from dyvte.training.calibrate import check_enough, compare
    from dyvte.training.fit import FitSettings, fit_heads, quality
    from dyvte.training.held_out import check_held_out
    from dyvte.training.store import load_traces

    try:
        settings = FitSettings(**config["fit"])
    except TypeError as error:
        known = ", ".join(FitSettings.__dataclass_fields__)
        raise ValueError(f"wrong training settings: {error}; `fit` takes {known}") from None
    if config["alpha"] is None:
        fit_heads(load_traces(*as_list(config["traces"])), settings).save_pretrained(config["output"])
        return
    if config["calibration"] is None:
        raise ValueError("a promise needs held-out traces: set calibration=FOLDER, or alpha=null for none")
    held_out = load_traces(*as_list(config["calibration"]))
    check_enough(len(held_out), config["alpha"], config["delta"])
    traces = load_traces(*as_list(config["traces"]))
    check_held_out(traces.content.sketch(), held_out.content, config["shared_images"])
    heads = fit_heads(traces, settings)
    set_threshold(heads, held_out, config["alpha"], config["delta"], config["shared_images"])
    heads.config.training |= {f"calibration_{k}": v for k, v in quality(heads, held_out)["mean"].items()}
    heads.save_pretrained(config["output"])
    result = compare(heads, held_out)
    print(json.dumps({key: result[key] for key in ("samples", "threshold", "learned", "oracle")}, indent=2))


def calibrate(config: dict[str, Any]) -> None:
    if config["policy"] == "vtw":
        from dyvte.training.vtw import calibrate as choose_layer

        print(
            json.dumps(choose_layer(as_list(config["traces"]), config["output"], **config["vtw"]).as_dict(), indent=2)
        )
        return
    if config["policy"] != "learned":
        raise ValueError(f"policy must be learned or vtw, not {config['policy']!r}")
    if config["heads"] is None:
        raise ValueError("`dyvte calibrate` needs heads=FOLDER, or policy=vtw")
    from dyvte.heads import ExitHeads
    from dyvte.training.calibrate import calibrate as set_threshold
    from dyvte.training.store import load_traces

    heads = ExitHeads.from_pretrained(config["heads"])
    traces = load_traces(*as_list(config["traces"]))
    set_threshold(heads, traces, config["alpha"], config["delta"], config["shared_images"])
    heads.save_pretrained(config["output"] or config["heads"])
    promise = heads.config.promise
    shown = ("alpha", "delta", "samples", "risk", "bound", "saved")
    print(json.dumps(promise.setting | {name: getattr(promise, name) for name in shown}, indent=2))


def make_policies(described: dict[str, Any], heads: str | None) -> dict[str, Any]:
    """Policies by name from a config; the part of a name before the first dash says what it is."""
    from dyvte.heads import ExitHeads
    from dyvte.methods import METHODS, LearnedExit, by_name
    from dyvte.training.vtw import vtw_exit

    def learned(heads: str | None = heads, **settings: Any) -> LearnedExit:
        if heads is None:
            raise ValueError("it needs exit heads: set heads=FOLDER")
        return LearnedExit(ExitHeads.from_pretrained(heads), **settings)

    makers = {"learned": learned, "oracle": oracle, "vtw": vtw_exit}
    policies = {}
    for name, settings in described.items():
        kind, settings = name.split("-")[0], dict(settings or {})
        if kind not in makers and kind not in METHODS:
            raise ValueError(f"unknown policy {name!r}: start its name with one of {', '.join([*makers, *METHODS])}")
        later = settings.pop("exit", None) if kind in METHODS else None
        try:
            policies[name] = makers[kind](**settings) if kind in makers else by_name(kind, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"wrong settings for policy {name!r}: {error}") from None
        if later is not None:
            (leaving,) = make_policies(later, heads).values()
            policies[name] = policies[name] & leaving
    return policies


def oracle(traces: str | list[str]) -> Any:
    """The earliest exit that keeps each sample's answer, looked up in traces of the same samples."""
    from dyvte.evaluation.policies import PerSampleExit
    from dyvte.training.calibrate import oracle_exits
    from dyvte.training.store import load_traces

    known = load_traces(*as_list(traces))
    exits = oracle_exits(known.agreement >= 1).tolist()
    return PerSampleExit(
        {digest.tobytes().hex(): e for digest, e in zip(known.content.samples, exits)}, by_content=True
    )


def evaluate(config: dict[str, Any]) -> None:
    from dyvte.data import load_samples
    from dyvte.evaluation.runner import evaluate as run
    from dyvte.heads import ExitHeads

    data = data_config(config)
    policies = make_policies(config["policies"], config["heads"])
    samples = load_samples(data)
    model, processor = load_model(config)
    summary = run(
        model,
        processor,
        samples,
        policies,
        config["output"],
        batch_size=config["batch_size"],
        max_new_tokens=config["max_new_tokens"],
        metric=config["metric"],
        template=data.get("template"),
        config=config | {"data": data},
    )
    if config["heads"] is not None:
        promise = ExitHeads.from_pretrained(config["heads"]).config.promise
        if promise is not None:
            promise.write(config["output"])  # for the report
    print(json.dumps(summary, indent=2))


def inspect(config: dict[str, Any]) -> None:
    from dyvte.data import load_samples
    from dyvte.evaluation.inspection import inspect_model

    data = data_config(config)
    samples = load_samples(data)
    model, processor = load_model(config)
    inspect_model(
        model,
        processor,
        samples,
        config["output"],
        batch_size=config["batch_size"],
        max_new_tokens=config["max_new_tokens"],
        template=data.get("template"),
        config=config | {"data": data},
    )
    print(Path(config["output"], "inspect.png"))


def report(config: dict[str, Any]) -> None:
    from dyvte.report.page import report as write

    print(write(config["directory"]))


def convert(config: dict[str, Any]) -> None:
    from dyvte.heads import ExitHeads

    path = Path(config["weights"])
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the state dict that the original training saved")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    heads = ExitHeads.from_original(state, base_model=config["base_model"])
    heads.save_pretrained(config["output"])
    print(f"{heads.config.num_layers} gates of width {heads.config.hidden_size} -> {config['output']}")


def demo(config: dict[str, Any]) -> None:
    from dyvte.cli.demo import run

    run(**{key: value for key, value in config.items() if key != "threads"})


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dyvte", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, (text, keys) in COMMANDS.items():
        lines = [text, "", "keys:"]
        for key, about in keys.items():
            default = "required" if about.default is ... else f"default: {json.dumps(about.default)}"
            lines.append(f"  {key:15} {about.help} ({default})")
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description="\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", nargs="?", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="keys to set, dots reach into mappings")
    return top


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    file, overrides = options.config, options.overrides
    if file is not None and "=" in file:
        file, overrides = None, [file, *overrides]
    if options.command == "report" and file is not None:
        file, overrides = None, [f"directory={file}", *overrides]
    try:
        config = read_config(options.command, file, overrides)
        if config.get("threads"):
            torch.set_num_threads(config.pop("threads"))
        globals()[options.command](config)
    except ImportError as error:
        sys.exit(f"dyvte {options.command}: {error}. Install what it needs: pip install 'dyvte[train,eval]'")
    except ValueError as error:
        sys.exit(f"dyvte {options.command}: {error}")


if __name__ == "__main__":
    main()
