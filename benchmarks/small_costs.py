"""What heads cost in place, and what a cache without padding would cost while decoding.

Both on a LLaVA-1.5-shaped decoder (32 layers, 576 visual + 60 text tokens). Asking is timed between the layers, so that
it does not drown in what else a machine does.

    python benchmarks/small_costs.py
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from unittest import mock

import torch
from shapes import (
    alternate,
    heads_that_leave_at,
    interval,
    keep_memory,
    llava_shaped_decoder,
    prompt,
    record,
    seconds,
    timed,
)
from transformers import LlamaForCausalLM

import dyvte
from dyvte.runtime.prefill import PromptPass


def deciding(model, inputs, visual, policy, repeats: int) -> float:
    """Seconds that a prompt spends on asking and parting samples, between its layers: the median over runs."""
    spent: list[float] = []
    reduce = PromptPass._reduce

    def timed_reduce(run: PromptPass, index: int) -> None:
        began = time.perf_counter()
        reduce(run, index)
        spent[-1] += time.perf_counter() - began

    with mock.patch.object(PromptPass, "_reduce", timed_reduce), dyvte.visual_exit(model, policy, visual_mask=visual):
        for _ in range(repeats):
            spent.append(0.0)
            model(**inputs, logits_to_keep=1)
    return statistics.median(spent)


def ragged_decoding(model: LlamaForCausalLM, repeats: int) -> dict:
    """What a cache without padding would cost: a decoding step of 8 samples as two groups, each with its own width.

    Every group reads all weights again, which is what a step on a CPU mostly does.
    """
    token = prompt(model, 8, visual=0, before=0, after=1)[0]["inputs_embeds"]

    def step(rows: slice):
        inputs = {"inputs_embeds": prompt(model, 8)[0]["inputs_embeds"][rows]}
        cache = model(**inputs, logits_to_keep=1).past_key_values

        def run():
            model(inputs_embeds=token[rows], past_key_values=cache)
            cache.crop(-1)

        return run

    one, halves = step(slice(None)), [step(slice(0, 4)), step(slice(4, 8))]
    runs = {"one": lambda: timed(one), "two": lambda: timed(lambda: [half() for half in halves])}
    laps = alternate(runs, repeats, warmup=2)

    def ratio(of: dict) -> float:
        return seconds(of["two"]) / seconds(of["one"])

    return {
        "rounds": repeats,
        "two_groups_over_one": ratio(laps),
        "two_groups_over_one_interval": interval(ratio, laps),
    }


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--repeats", type=int, default=15)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    model = llava_shaped_decoder(chosen.width)
    layers, rows = model.config.num_hidden_layers, []
    for batch in (1, 4):
        inputs, visual = prompt(model, batch)
        for e in (layers // 4, layers // 2, 3 * layers // 4):
            known, asked = dyvte.FixedExit(e), dyvte.LearnedExit(heads_that_leave_at(model, e))
            spent = [deciding(model, inputs, visual, policy, chosen.repeats) for policy in (known, asked)]
            with dyvte.visual_exit(model, known, visual_mask=visual):
                whole = [timed(functools.partial(model, **inputs, logits_to_keep=1))[0] for _ in range(5)]
            cost = (spent[1] - spent[0]) / statistics.median(whole)
            rows.append({"batch": batch, "exit_layer": e, "asking_over_pass": cost, "seconds": spent[1] - spent[0]})
    record(
        "small_costs",
        {
            "command": f"python benchmarks/small_costs.py --width {chosen.width} --repeats {chosen.repeats}",
            "asking": rows,
            "ragged_decoding": ragged_decoding(model, 41),
        },
    )


if __name__ == "__main__":
    main()
