"""What a trace costs, and how many labels it yields for the compute, against the recipe of the original.

The original (DyVTE, arXiv 2411.19628) labels one random layer a step: after that layer, a copy of all rows, visual ones
masked, runs beside the dense rows. A trace labels all exits at once with text-only branches.

    python benchmarks/trace_cost.py
"""

from __future__ import annotations

import argparse
import statistics

import torch
from shapes import alternate, llava_shaped_decoder, prompt, record, seconds, timed
from torch.utils.flop_counter import FlopCounterMode

import dyvte


def original_step(model, inputs: dict, visual: torch.Tensor, layer: int) -> None:
    """A dense forward whose rows are doubled after ``layer`` layers; the copies do not see visual columns."""
    length = visual.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=visual.device).tril().expand(len(visual), 1, -1, -1)
    hidden_key = (visual[:, None, None, :] & ~visual[:, None, :, None]) & causal
    mask = torch.cat([causal, causal & ~hidden_key])

    def double(index):
        def before(module, args, kwargs):
            hidden = torch.cat([args[0], args[0]]) if index == layer else args[0]
            return (hidden,), kwargs | {"attention_mask": mask}

        return before

    layers = list(enumerate(model.get_decoder().layers))[layer:]
    hooks = [module.register_forward_pre_hook(double(i), with_kwargs=True) for i, module in layers]
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    model = llava_shaped_decoder(chosen.width)
    layers = model.config.num_hidden_layers
    inputs, visual = prompt(model)
    at = range(4, layers, 8)  # four layers, spread evenly: their mean is the mean over random layers
    runs = {
        "dense": lambda: model(**inputs, use_cache=False, logits_to_keep=1),
        "trace": lambda: dyvte.trace_batch(model, inputs, visual_mask=visual),
    } | {f"original_{i}": (lambda i=i: original_step(model, inputs, visual, i)) for i in at}
    laps = alternate({name: lambda run=run: timed(run) for name, run in runs.items()}, chosen.repeats, warmup=1)
    took = {name: seconds(values) for name, values in laps.items()}
    eager = llava_shaped_decoder(chosen.width, attention="eager")  # torch's counter has no entry for CPU sdpa
    counted = {
        "dense": flops(lambda: eager(**inputs, use_cache=False, logits_to_keep=1)),
        "trace": flops(lambda: dyvte.trace_batch(eager, inputs, visual_mask=visual)),
    } | {f"original_{i}": flops(lambda i=i: original_step(eager, inputs, visual, i)) for i in at}
    in_dense = {
        "trace_flops": counted["trace"] / counted["dense"],
        "trace_time": took["trace"] / took["dense"],
        "original_step_flops": statistics.mean(counted[f"original_{i}"] for i in at) / counted["dense"],
        "original_step_time": statistics.mean(took[f"original_{i}"] for i in at) / took["dense"],
    }
    long_inputs, long_visual = prompt(model, after=565)  # 600 text tokens
    long_dense = flops(lambda: eager(**long_inputs, use_cache=False, logits_to_keep=1))
    every_fourth = flops(lambda: dyvte.trace_batch(eager, long_inputs, visual_mask=long_visual, exits=4))
    every = flops(lambda: dyvte.trace_batch(eager, long_inputs, visual_mask=long_visual))
    labels = layers - 1  # exits that differ from the dense model
    record(
        "trace_cost",
        {
            "command": "python benchmarks/trace_cost.py",
            "decoder": f"{layers} layers, width {chosen.width}, 576 visual + 60 text tokens, batch 1",
            "dense_forwards": in_dense,
            "labels_per_trace": labels,
            "labels_per_dense_forward": {
                "trace_flops": labels / in_dense["trace_flops"],
                "trace_time": labels / in_dense["trace_time"],
                "original_flops": 1 / in_dense["original_step_flops"],
                "original_time": 1 / in_dense["original_step_time"],
            },
            "times_as_many_labels": {
                "same_flops": labels / in_dense["trace_flops"] * in_dense["original_step_flops"],
                "same_time": labels / in_dense["trace_time"] * in_dense["original_step_time"],
            },
            "long_text": {
                "text_tokens": 600,
                "stride": 4,
                "dense_forwards_by_flops": every_fourth / long_dense,
                "all_exits_dense_forwards_by_flops": every / long_dense,
            },
            "median_seconds": took,
        },
    )


if __name__ == "__main__":
    main()
