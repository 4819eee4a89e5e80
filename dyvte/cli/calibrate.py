"""Choose what keeps a promise: the setting of any method, another threshold of heads, or VTW's one exit layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from dyvte.cli.arguments import named_keys, read_arguments
from dyvte.cli.fit import promise_of
from dyvte.config import CalibrateConfig, MethodConfig

EXAMPLES = (
    "dyvte calibrate heads=checkpoints/reference-heads traces=runs/traces/calibration alpha=0.005",
    "dyvte calibrate policy=vtw traces=runs/traces/calibration vtw.eta=0.003 output=runs/vtw.json",
    "dyvte calibrate method=fastv model=llava-hf/llava-1.5-7b-hf data=held-out.yaml alpha=0.01 output=runs/promise",
)


def main(arguments: Sequence[str]) -> None:
    options = {"prog": "dyvte calibrate", "examples": EXAMPLES}
    if "method" in named_keys(arguments):
        run_method(read_arguments(MethodConfig, arguments, **options))
    else:
        run(read_arguments(CalibrateConfig, arguments, **options))


def run_method(config: MethodConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.training.promise import calibrate_config

    check_folder(config.output)
    promise = calibrate_config(config)
    shown = {name: getattr(promise, name) for name in ("alpha", "delta", "samples", "risk", "bound", "saved")}
    print(json.dumps(promise.setting | shown, indent=2))


def run(config: CalibrateConfig) -> None:
    import torch

    from dyvte.cli.outputs import check_file, check_folder
    from dyvte.loading import load_heads
    from dyvte.training.calibrate import calibrate
    from dyvte.training.recipes import listed
    from dyvte.training.store import load_traces
    from dyvte.training.vtw import calibrate as choose_layer

    if config.threads:
        torch.set_num_threads(config.threads)
    if config.policy == "vtw":
        if config.output is not None:
            check_file(config.output)
        print(json.dumps(choose_layer(listed(config.traces), config.output, **asdict(config.vtw)).as_dict(), indent=2))
        return
    if config.heads is None:
        raise ValueError("`dyvte calibrate` needs heads=FOLDER, or policy=vtw")
    if config.alpha is None:
        raise ValueError("alpha is what is promised and cannot be null here: set for example alpha=0.01")
    output = config.output or config.heads
    check_folder(output)
    heads = load_heads(config.heads)
    calibrate(heads, load_traces(*listed(config.traces)), config.alpha, config.delta, config.shared_images)
    heads.save_pretrained(output)
    print(promise_of(heads))
