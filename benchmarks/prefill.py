"""Does saved work become saved time? The prompt's pass through a LLaVA-1.5-shaped decoder, dense and with exits.

Timed in turn: dense (SDPA), the text alone, exits known in advance at L/4, L/2 and 3L/4, the same exits chosen by heads
(what deciding costs). In turn with the known exits after that, the way of the original: eager attention that returns
its maps at every layer, rows sliced off at the exit. And a batch whose samples leave at different layers against its
samples alone (what mixing costs): on a CPU under the allocator's defaults first, then, like all the rest, with memory
kept (see shapes.py).

    python benchmarks/prefill.py
    python benchmarks/prefill.py --width 4096 --batches 1 8 --visual 576 2880 --lookahead 1    # on a GPU, in bfloat16
"""

from __future__ import annotations

import argparse
import sys

import matplotlib
import torch
from shapes import (
    RESULTS,
    alternate,
    heads_that_leave_at,
    interval,
    keep_memory,
    llava_shaped_decoder,
    prompt,
    record,
    seconds,
    timed_by_layer,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import dyvte
from dyvte.evaluation.costs import prefill_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def original_way(model: LlamaForCausalLM, inputs: dict, visual: torch.Tensor, layer: int) -> None:
    """Eager attention with maps kept at every layer; from ``layer`` on, visual rows are sliced off."""
    keep = (~visual[0]).nonzero().flatten()

    def before(index):
        def hook(module, args, kwargs):
            hidden = args[0][:, keep] if index == layer else args[0]
            cos, sin = kwargs["position_embeddings"]
            changed = {
                "position_embeddings": (cos[:, keep], sin[:, keep]),
                "attention_mask": kwargs["attention_mask"][:, :, keep][..., keep],
            }
            return (hidden,), kwargs | changed

        return hook

    layers = list(enumerate(model.get_decoder().layers))[layer:]
    hooks = [module.register_forward_pre_hook(before(i), with_kwargs=True) for i, module in layers]
    try:
        model(**inputs, output_attentions=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def run_under(model, inputs, visual, policy):
    """A timed pass with exits; attaching is paid once, before."""

    def run():
        with dyvte.visual_exit(model, policy, visual_mask=visual):
            return timed_by_layer(model, lambda: model(**inputs, logits_to_keep=1))

    return run


def flops_of(model, inputs, visual, exits) -> int:
    with FlopCounterMode(display=False) as counter, dyvte.visual_exit(model, dyvte.FixedExit(exits), visual):
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


def single(
    model: LlamaForCausalLM, eager: LlamaForCausalLM, batch: int, tokens: int, repeats: int, lookahead: int = 0
) -> dict:
    """Dense, fixed and learned exits at a quarter, half and three quarters of the depth; the original way.

    A prompt of the text alone is timed with them. No exit can save more than the difference, and a layer takes longer
    on so few rows than their FLOPs suggest: its weights are read all the same.
    """
    layers = model.config.num_hidden_layers
    inputs, visual = prompt(model, batch, visual=tokens)
    text = int((~visual[0]).sum())
    points = (layers // 4, layers // 2, 3 * layers // 4)
    text_only = {"inputs_embeds": inputs["inputs_embeds"][:, ~visual[0]]}
    runs = {
        "dense": lambda: timed_by_layer(model, lambda: model(**inputs, logits_to_keep=1)),
        "text": lambda: timed_by_layer(model, lambda: model(**text_only, logits_to_keep=1)),
    }
    policies = {f"fixed_{e}": dyvte.FixedExit(e) for e in points}
    policies |= {f"learned_{e}": dyvte.LearnedExit(heads_that_leave_at(model, e, lookahead)) for e in points}
    runs |= {name: run_under(model, inputs, visual, policy) for name, policy in policies.items()}
    laps = alternate(runs, repeats, warmup=1)
    originals = {}
    for e in points:
        originals[f"fixed_{e}"] = runs[f"fixed_{e}"]
        originals[f"original_{e}"] = lambda e=e: timed_by_layer(eager, lambda: original_way(eager, inputs, visual, e))
    original_laps = alternate(originals, 5, warmup=1)

    dense_flops = prefill_flops(model.config, text, tokens, layers)
    rows = []
    for e in points:
        saved_flops = 1 - prefill_flops(model.config, text, tokens, e) / dense_flops
        fixed, learned = f"fixed_{e}", f"learned_{e}"

        def time_over_flops(of: dict, fixed=fixed, saved_flops=saved_flops) -> float:
            return (1 - seconds(of[fixed]) / seconds(of["dense"])) / saved_flops

        def over_fixed(of: dict, name: str = learned, fixed=fixed) -> float:
            return seconds(of[name]) / seconds(of[fixed])

        rows.append(
            {
                "exit_layer": e,
                "flops_saved": saved_flops,
                "time_saved": 1 - seconds(laps[fixed]) / seconds(laps["dense"]),
                "time_saved_over_flops_saved": time_over_flops(laps),
                "time_saved_over_flops_saved_interval": interval(time_over_flops, laps),
                "learned_over_fixed": over_fixed(laps),
                "learned_over_fixed_interval": interval(over_fixed, laps),
                "original_over_fixed": over_fixed(original_laps, f"original_{e}"),
                "learned_saved_time": 1 - seconds(laps[learned]) / seconds(laps["dense"]),
            }
        )

    def most(of: dict) -> float:
        text_flops = prefill_flops(model.config, text, 0, layers)
        return (1 - seconds(of["text"]) / seconds(of["dense"])) / (1 - text_flops / dense_flops)

    return {
        "batch": batch,
        "visual_tokens": tokens,
        "rounds": repeats,
        "dense_seconds": seconds(laps["dense"]),
        "most_time_saved_over_flops_saved": most(laps),
        "most_time_saved_over_flops_saved_interval": interval(most, laps),
        "rows": rows,
    }


def mixed_time(model: LlamaForCausalLM, exits: list[int], repeats: int) -> dict:
    """A batch whose samples leave at different layers, and a dense one, against their samples alone."""
    inputs, visual = prompt(model, len(exits))
    runs = {
        "together": run_under(model, inputs, visual, dyvte.FixedExit(exits)),
        "dense": lambda: timed_by_layer(model, lambda: model(**inputs, logits_to_keep=1)),
    }
    for i, e in enumerate(exits):
        alone = {key: value[i : i + 1] for key, value in inputs.items()}
        runs[f"alone_{i}"] = run_under(model, alone, visual[i : i + 1], dyvte.FixedExit(e))
    one = {"inputs_embeds": inputs["inputs_embeds"][:1]}
    runs["dense_alone"] = lambda: timed_by_layer(model, lambda: model(**one, logits_to_keep=1))
    laps = alternate(runs, repeats, warmup=1)

    def mixing(of: dict) -> float:
        return seconds(of["together"]) / sum(seconds(of[f"alone_{i}"]) for i in range(len(exits)))

    def batching(of: dict) -> float:
        return seconds(of["dense"]) / (len(exits) * seconds(of["dense_alone"]))

    return {
        "rounds": repeats,
        "time_over_sum_alone": mixing(laps),
        "time_over_sum_alone_interval": interval(mixing, laps),
        "dense_time_over_sum_alone": batching(laps),
        "dense_time_over_sum_alone_interval": interval(batching, laps),
    }


def mixed_work(model: LlamaForCausalLM, eager: LlamaForCausalLM, exits: list[int]) -> dict:
    """FLOPs and cache of such a batch against its samples alone; both are counted, not timed."""
    layers, inputs, visual = model.config.num_hidden_layers, *prompt(model, len(exits))
    together = flops_of(eager, inputs, visual, exits)
    apart = sum(
        flops_of(eager, {key: value[i : i + 1] for key, value in inputs.items()}, visual[i : i + 1], [e])
        for i, e in enumerate(exits)
    )
    with dyvte.visual_exit(model, dyvte.FixedExit(exits), visual):
        cache = model(**inputs, logits_to_keep=1).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    text, full = int((~visual[0]).sum()), visual.shape[1]
    needed = sum(e * full + (layers - e) * text for e in exits) * 2 * model.config.hidden_size
    return {"exits": exits, "flops_over_sum_alone": together / apart, "cache_over_sum_alone": held / needed}


def draw(result: dict, name: str) -> None:
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for case, colour in zip(result["single"], ("#0072b2", "#d55e00", "#009e73", "#cc79a7")):
        flops = [100 * row["flops_saved"] for row in case["rows"]]
        saved = [100 * row["time_saved"] for row in case["rows"]]
        ranges = zip(flops, (row["time_saved_over_flops_saved_interval"] for row in case["rows"]))
        ends = [[x * end for end in ratios] for x, ratios in ranges]
        bars = [[y - low for y, (low, _) in zip(saved, ends)], [high - y for y, (_, high) in zip(saved, ends)]]
        label = f"batch {case['batch']}, {case['visual_tokens']} visual tokens"
        axis.errorbar(flops, saved, bars, fmt="o-", color=colour, label=label, capsize=3)
        learned = [100 * row["learned_saved_time"] for row in case["rows"]]
        axis.plot(flops, learned, "x", color=colour, label="the same, heads deciding")
    axis.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle=":")
    axis.set(xlim=(0, 80), ylim=(0, 80), xlabel="prefill FLOPs saved, %", ylabel="prefill time saved, %")
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options.add_argument("--visual", type=int, nargs="+", default=[576], help="visual tokens of a prompt")
    options.add_argument("--lookahead", type=int, default=0, help="layers between a decision and its exit")
    options.add_argument("--repeats", type=int, default=61, help="rounds at batch 1; larger batches get fewer")
    chosen = options.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = llava_shaped_decoder(chosen.width, dtype=dtype)
    eager = llava_shaped_decoder(chosen.width, attention="eager", dtype=dtype)
    eager.load_state_dict(model.state_dict(), assign=True)  # one set of weights
    cases = [(batch, tokens) for tokens in chosen.visual for batch in chosen.batches]
    layers = model.config.num_hidden_layers
    exits = [max(1, layers * (i + 1) // 8) for i in range(8)]
    mixed = mixed_work(model, eager, exits) | {"allocator_defaults": mixed_time(model, exits, 9)}
    if not cuda and keep_memory():
        mixed["memory_kept"] = mixed_time(model, exits, 9)
    result = {
        "command": " ".join(["python benchmarks/prefill.py", *sys.argv[1:]]),
        "decoder": f"{layers} layers, width {chosen.width}, 60 text tokens beside the visual ones, {dtype}",
        "lookahead": chosen.lookahead,
        "single": [
            single(model, eager, batch, tokens, max(chosen.repeats // batch, 7), chosen.lookahead)
            for batch, tokens in cases
        ],
        "mixed": mixed,
    }
    name = "prefill_gpu" if cuda else "prefill"
    record(name, result)
    draw(result, name)


if __name__ == "__main__":
    main()
