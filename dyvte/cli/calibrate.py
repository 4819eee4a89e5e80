"""Choose another threshold for trained heads from held-out traces, or VTW's one exit layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from dyvte.cli.arguments import read_arguments
from dyvte.cli.fit import as_list
from dyvte.config import CalibrateConfig

EXAMPLES = (
    "dyvte calibrate heads=checkpoints/reference-heads traces=runs/traces/calibration alpha=0.005",
    "dyvte calibrate policy=vtw traces=runs/traces/calibration vtw.eta=0.003 output=runs/vtw.json",
)
SHOWN = ("alpha", "delta", "samples", "risk", "bound", "mean_exit_layer")


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(CalibrateConfig, arguments, prog="dyvte calibrate", examples=EXAMPLES))


def run(config: CalibrateConfig) -> None:
    from dyvte.cli.loading import set_threads
    from dyvte.cli.outputs import check_file, check_folder

    set_threads(config.threads)
    if config.policy == "vtw":
        from dyvte.training.vtw import calibrate as choose_layer

        if config.output is not None:
            check_file(config.output)
        choice = choose_layer(as_list(config.traces), config.output, **asdict(config.vtw))
        print(json.dumps(choice.as_dict(), indent=2))
        return
    if config.heads is None:
        raise ValueError("`dyvte calibrate` needs heads=FOLDER, or policy=vtw")
    if config.alpha is None:
        raise ValueError("alpha is what is promised and cannot be null here: set for example alpha=0.01")
    from dyvte.cli.loading import load_heads
    from dyvte.training.calibrate import calibrate
    from dyvte.training.store import load_traces

    output = config.output or config.heads
    check_folder(output)
    heads = load_heads(config.heads)
    traces = load_traces(*as_list(config.traces))
    calibrate(heads, traces, config.alpha, config.delta, config.shared_images)
    heads.save_pretrained(output)
    found = {key: heads.config.calibration[key] for key in SHOWN}
    print(json.dumps({"threshold": heads.config.threshold} | found, indent=2))
