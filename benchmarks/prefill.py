"""Does saved work become saved time? The prompt's pass through a LLaVA-1.5-shaped decoder, dense and with exits.

Measured in one run, in turn: dense (SDPA), exits known in advance at L/4, L/2 and 3L/4, the same exits chosen by heads
(what deciding costs), a batch whose samples leave at different layers against its samples alone (what mixing costs),
and the way of the original: eager attention that returns its maps at every layer, rows sliced off at the exit.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --width 4096 --batches 1 8 --visual 576 2880 --lookahead 1    # on a GPU, in bfloat16
"""

from __future__ import annotations

import argparse
import sys

import matplotlib
import torch
from shapes import RESULTS, alternate, llava_shaped_decoder, prompt, record, seconds, timed_by_layer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import dyvte
from dyvte.flops import prefill_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def heads_that_leave_at(model: LlamaForCausalLM, layer: int, lookahead: int = 0) -> dyvte.ExitHeads:
    """Heads of full cost, guard included, whose layer embedding alone decides: from ``layer`` on, yes."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    heads = dyvte.ExitHeads(
        dyvte.ExitHeadsConfig(num_layers=layers, hidden_size=width, guard=0.99, lookahead=lookahead)
    )
    inner = heads.heads
    with torch.no_grad():
        for weight in (inner.project.weight, inner.project.bias, inner.hidden.weight, inner.hidden.bias):
            weight.zero_()
        inner.hidden.weight.fill_diagonal_(1)
        inner.layer[layer - 1 :, 0] = 10
        inner.out.weight.zero_()
        inner.out.weight[0, 0] = 1
        inner.out.bias.fill_(-5)
    return heads.to(model.device)


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
    """Dense, fixed and learned exits at a quarter, half and three quarters of the depth; the original way."""
    layers = model.config.num_hidden_layers
    inputs, visual = prompt(model, batch, visual=tokens)
    text = int((~visual[0]).sum())
    points = (layers // 4, layers // 2, 3 * layers // 4)
    runs = {"dense": lambda: timed_by_layer(model, lambda: model(**inputs, logits_to_keep=1))}
    for e in points:
        runs[f"fixed_{e}"] = run_under(model, inputs, visual, dyvte.FixedExit(e))
        policy = dyvte.LearnedExit(heads_that_leave_at(model, e, lookahead))
        runs[f"learned_{e}"] = run_under(model, inputs, visual, policy)
        runs[f"original_{e}"] = lambda e=e: timed_by_layer(eager, lambda: original_way(eager, inputs, visual, e))
    laps = alternate(runs, repeats, warmup=1)
    took = {name: seconds(values) for name, values in laps.items()}
    best = {name: seconds(values, min) for name, values in laps.items()}  # free of what else the machine did
    dense = prefill_flops(model.config, text, int(visual[0].sum()), layers)
    rows = []
    for e in points:
        saved_flops = 1 - prefill_flops(model.config, text, int(visual[0].sum()), e) / dense
        saved_time = 1 - took[f"fixed_{e}"] / took["dense"]
        rows.append(
            {
                "exit_layer": e,
                "flops_saved": saved_flops,
                "time_saved": saved_time,
                "time_saved_over_flops_saved": saved_time / saved_flops,
                "time_saved_over_flops_saved_at_best": (1 - best[f"fixed_{e}"] / best["dense"]) / saved_flops,
                "learned_over_fixed": took[f"learned_{e}"] / took[f"fixed_{e}"],
                "learned_over_fixed_at_best": best[f"learned_{e}"] / best[f"fixed_{e}"],
                "original_over_fixed": took[f"original_{e}"] / took[f"fixed_{e}"],
                "learned_saved_time": 1 - took[f"learned_{e}"] / took["dense"],
            }
        )
    return {"batch": batch, "visual_tokens": tokens, "rounds": repeats, "rows": rows, "dense_seconds": took["dense"]}


def mixed(model: LlamaForCausalLM, eager: LlamaForCausalLM, repeats: int) -> dict:
    """A batch of 8 whose samples leave at layers spread over the depth, against each of them alone."""
    layers, batch = model.config.num_hidden_layers, 8
    inputs, visual = prompt(model, batch)
    exits = [max(1, layers * (i + 1) // batch) for i in range(batch)]
    alone = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(batch)]
    runs = {"together": run_under(model, inputs, visual, dyvte.FixedExit(exits))}
    for i in range(batch):
        runs[f"alone_{i}"] = run_under(model, alone[i], visual[i : i + 1], dyvte.FixedExit(exits[i]))
    took = {name: seconds(laps) for name, laps in alternate(runs, repeats, warmup=1).items()}
    together = flops_of(eager, inputs, visual, exits)
    apart = sum(flops_of(eager, alone[i], visual[i : i + 1], [exits[i]]) for i in range(batch))
    with dyvte.visual_exit(model, dyvte.FixedExit(exits), visual):
        cache = model(**inputs, logits_to_keep=1).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    text, full = int((~visual[0]).sum()), visual.shape[1]
    needed = sum(e * full + (layers - e) * text for e in exits) * 2 * model.config.hidden_size
    return {
        "exits": exits,
        "flops_over_sum_alone": together / apart,
        "time_over_sum_alone": took["together"] / sum(took[f"alone_{i}"] for i in range(batch)),
        "cache_over_sum_alone": held / needed,
    }


def draw(result: dict, name: str) -> None:
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for case, colour in zip(result["single"], ("#0072b2", "#d55e00", "#009e73", "#cc79a7")):
        flops = [100 * row["flops_saved"] for row in case["rows"]]
        label = f"batch {case['batch']}, {case['visual_tokens']} visual tokens"
        axis.plot(flops, [100 * row["time_saved"] for row in case["rows"]], "o-", color=colour, label=label)
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
    options.add_argument("--repeats", type=int, default=31, help="rounds at batch 1; larger batches get fewer")
    chosen = options.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = llava_shaped_decoder(chosen.width, dtype=dtype)
    eager = llava_shaped_decoder(chosen.width, attention="eager", dtype=dtype)
    eager.load_state_dict(model.state_dict(), assign=True)  # one set of weights
    cases = [(batch, tokens) for tokens in chosen.visual for batch in chosen.batches]
    result = {
        "command": " ".join(["python benchmarks/prefill.py", *sys.argv[1:]]),
        "decoder": f"32 layers, width {chosen.width}, 60 text tokens beside the visual ones, {dtype}",
        "lookahead": chosen.lookahead,
        "single": [
            single(model, eager, batch, tokens, max(chosen.repeats // batch, 7), chosen.lookahead)
            for batch, tokens in cases
        ],
        "mixed": mixed(model, eager, 7),
    }
    name = "prefill_gpu" if cuda else "prefill"
    record(name, result)
    draw(result, name)


if __name__ == "__main__":
    main()
