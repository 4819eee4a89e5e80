"""docs/results.md: every committed measurement as a table, with the command that makes it.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/results.md"
PARTS = ("decoder", "token")  # of the times of EAS


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def grid(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def promise(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            percent(row["alpha"]),
            f"{percent(row['broken_on_the_rest'])} ± {percent(row['standard_error'])}",
            percent(row["broken_on_the_pool"]),
            percent(row["mean_risk_on_the_rest"], 2),
            percent(row["mean_oracle_share"]),
        ]
        for row in result["rows"]
    ]
    return [
        "## Is the promise kept?",
        "",
        f"{result['splits']} random splits: {result['calibration_samples']:,} traces choose the threshold, the other "
        f"{result['test_samples']:,} judge it. Promised: at most {percent(result['delta'], 0)} of the splits "
        "change more than α of the answers. The share among the remaining traces has a sampling error of its own on "
        "top; the share of the whole pool is what the promise is about.",
        *grid(
            ["α", "splits above α, on the rest", "on the whole pool", "mean changed", "of the oracle's savings"], rows
        ),
        "",
        "![promise](../benchmarks/results/promise.png)",
    ]


def guard(result: dict[str, Any]) -> list[str]:
    def row(name: str, case: dict[str, Any]) -> list[str]:
        free, kept = case["without_guard"], case["with_guard"]
        cells = [name, percent(free["changed"]), f"{free['mean_exit_layer']:.1f}"]
        return [*cells, percent(kept["changed"]), f"{kept['mean_exit_layer']:.1f}"]

    kinds = result["kinds"].items()
    rows = [row(f"never seen: {name}", case["held_out_kinds"]) for name, case in kinds]
    rows += [row(f"images: {name}", case) for name, case in result["styles"].items()]
    known = [case["known_kinds"] for _, case in kinds]
    cost = sum(c["with_guard"]["mean_exit_layer"] - c["without_guard"]["mean_exit_layer"] for c in known) / len(known)
    return [
        "## Off the calibrated distribution",
        "",
        f"Question kinds held out of training and calibration, and images of another style, at α = "
        f"{percent(result['alpha'], 0)}. The guard lets {percent(result['guard'], 0)} of usual samples pass at "
        f"each layer; on the kinds it knows it costs {cost:.2f} layers on average.",
        *grid(["", "changed, no guard", "mean exit layer", "changed, guard", "mean exit layer"], rows),
    ]


def forms(result: dict[str, Any]) -> list[str]:
    small, big = result["shared"], result["original"]
    rows = []
    for a, b in zip(small["layers"], big["layers"]):
        auroc = [f"{row['auroc']:.4f}" if row["auroc"] is not None else "–" for row in (a, b)]
        rows.append([str(a["exit_layer"]), *auroc, f"{a['log_loss']:.4f}", f"{b['log_loss']:.4f}"])
    means = [f"**{form['mean'][key]:.4f}**" for key in ("auroc", "log_loss") for form in (small, big)]
    rows.append(["mean", *means])
    return [
        "## Small heads against the published form",
        "",
        f"The same {result['traces'][0]:,} traces train both, {result['traces'][2]:,} others judge. Parameters: "
        f"{small['parameters']:,} and {big['parameters']:,} here; {small['parameters_at_llava_7b']:,} and "
        f"{big['parameters_at_llava_7b']:,} at LLaVA-1.5-7B shape. At α = 1 % they save "
        f"{percent(small['at_alpha_1_percent']['oracle_share'])} and "
        f"{percent(big['at_alpha_1_percent']['oracle_share'])} of what the oracle saves.",
        *grid(["exit layer", "AUROC shared", "AUROC published", "log loss shared", "log loss published"], rows),
    ]


def ablation(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        low, high = row["oracle_share_range"]
        spread = f" ({percent(low)} … {percent(high)})" if row["seeds"] > 1 else ""
        cells = [row["variant"], percent(row["oracle_share"]) + spread, percent(row["changed"], 2)]
        rows.append([*cells, f"{row['auroc']:.4f}", f"{row['log_loss']:.4f}", f"{row['parameters']:,}"])
    return [
        "## What makes heads bolder",
        "",
        "One change at a time; mean and range over two seeds (one for the published form). α = 1 %. Heads asked one "
        "layer ahead cannot exit after the first layer, which their AUROC and log loss leave out.",
        *grid(["", "of the oracle's savings", "changed", "AUROC", "log loss", "parameters"], rows),
    ]


def trace_cost(result: dict[str, Any]) -> list[str]:
    dense, labels = result["dense_forwards"], result["labels_per_dense_forward"]
    rows = [
        ["one trace, dense forwards", f"{dense['trace_flops']:.2f}", f"{dense['trace_time']:.2f}"],
        [
            "one step of the original recipe",
            f"{dense['original_step_flops']:.2f}",
            f"{dense['original_step_time']:.2f}",
        ],
        ["labels per dense forward, trace", f"{labels['trace_flops']:.1f}", f"{labels['trace_time']:.1f}"],
        ["labels per dense forward, original", f"{labels['original_flops']:.2f}", f"{labels['original_time']:.2f}"],
    ]
    long = result["long_text"]
    return [
        "## What a trace costs",
        "",
        f"{result['decoder']}. With {long['text_tokens']} text tokens all exits take "
        f"{long['all_exits_dense_forwards_by_flops']:.1f} dense forwards by FLOPs, every "
        f"{long['stride']}th exit (`exits={long['stride']}`) {long['dense_forwards_by_flops']:.1f}. Logits of more "
        "than 256 MB are made sample by sample.",
        *grid(["", "by FLOPs", "by time"], rows),
    ]


def ranged(result: dict[str, Any], name: str) -> str:
    low, high = result[f"{name}_interval"]
    return f"{result[name]:.2f} ({low:.2f} … {high:.2f})"


def prefill(result: dict[str, Any]) -> list[str]:
    rows = []
    for case in result["single"]:
        for row in case["rows"]:
            in_place = row.get("learned_over_fixed_in_place")
            rows.append(
                [
                    str(case["batch"]),
                    str(case["visual_tokens"]),
                    str(row["exit_layer"]),
                    percent(row["flops_saved"]),
                    percent(row["time_saved"]),
                    ranged(row, "time_saved_over_flops_saved"),
                    ranged(case, "most_time_saved_over_flops_saved"),
                    ranged(row, "learned_over_fixed"),
                    "–" if in_place is None else f"{in_place:.3f}",
                    f"{row['original_over_fixed']:.2f}",
                ]
            )
    titles = [
        "batch",
        "visual tokens",
        "exit layer",
        "FLOPs saved",
        "time saved",
        "time ÷ FLOPs",
        "at most",
        "heads ÷ known exits",
        "in place",
        "original ÷ ours",
    ]
    mixed = result["mixed"]
    allocators = {"allocator_defaults": "allocator's defaults", "memory_kept": "memory kept"}
    timed = [
        [title, ranged(mixed[name], "time_over_sum_alone"), ranged(mixed[name], "dense_time_over_sum_alone")]
        for name, title in allocators.items()
        if name in mixed
    ]
    laps = "A run's time is the sum of the medians of its laps, one for every decoder layer, with memory kept. "
    laps = laps if "memory_kept" in mixed else ""
    before = ""
    if "runtime" in result:
        before = (
            f"Measured with the runtime of commit {result['runtime']}, which the last table compares with this one. "
        )
    rounds = ", ".join(f"{case['rounds']} at batch {case['batch']}" for case in result["single"])
    return [
        "## Does saved work become saved time?",
        "",
        f"{before}{result['decoder']}; {result['hardware']}, {result['threads']} thread. Runs alternate in an order "
        f"that is drawn anew for every round ({rounds}); in brackets where a figure lies at 90 % confidence, by "
        f"bootstrap over the rounds. {laps}*At most* is time ÷ FLOPs of a prompt of the text alone: what a layer takes "
        "on so few rows sets it; what lies beyond it is noise. *Heads ÷ known exits* is what deciding costs; *in "
        "place* counts only the time that is spent before the layers, where the heads are asked, and so is free of "
        "what else the machine did. The last column is the way of the original (eager attention that returns its "
        "maps, rows sliced off) over ours at the same exit layer, timed after the others in fewer rounds.",
        *grid(titles, rows),
        "",
        f"A batch of 8 that leaves at layers {mixed['exits']} costs {mixed['flops_over_sum_alone']:.3f} of the sum of "
        "its samples alone in FLOPs. What it costs in time is what any batch costs there, as a dense one shows. On a "
        "CPU that is the allocator's doing: by its defaults glibc returns big blocks to the kernel and pays for their "
        "pages again at the next layer. Large `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` keep them.",
        *grid(["time of 8 together ÷ of 8 alone", "with exits", "dense"], timed),
        "",
        f"Its cache holds {mixed['cache_over_sum_alone']:.2f} times what the samples need alone: rows of one layer "
        "share a width.",
        "",
        f"![prefill](../benchmarks/results/{'prefill' if 'CPU' in result['hardware'] else 'prefill_gpu'}.png)",
    ]


def small_costs(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            str(row["batch"]),
            str(row["exit_layer"]),
            f"{100 * row['asking_over_pass']:.1f} %",
            f"{1000 * row['seconds']:.1f} ms",
        ]
        for row in result["asking"]
    ]
    return [
        "## What heads cost in place, and a cache without padding",
        "",
        "Time between the layers with heads less that with known exits, of a pass of 32 layers and 576 visual tokens.",
        *grid(["batch", "exit layer", "of the pass", "in all"], rows),
        "",
        "A cache in which every sample holds its own tokens only would decode its groups apart, and read all weights "
        f"for each: two groups of 4 take {ranged(result['ragged_decoding'], 'two_groups_over_one')} of a step of 8.",
    ]


def eas(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        times = [f"{row['times'][b][what]:.2f}" if row["times"] else "1.00" for b in ("1", "32") for what in PARTS]
        layers = ", ".join(map(str, row["skipped"])) or "–"
        figures = [percent(row[name]) for name in ("accuracy", "agreement", "visual_layers_removed")]
        rows.append([row["name"], layers, *figures, *times])
    titles = ["", "attentions skipped", "accuracy", "as dense", "visual-token layers removed"]
    titles += [f"{what}, batch {batch}" for batch in (1, 32) for what in ("prompt", "token")]
    return [
        "## Attentions replaced by adapters (EAS)",
        "",
        f"{result['questions']:,} scenes of another split; adapters of {result['settings']['steps']} steps. Times are "
        "those of the decoder layers over a prompt and of each further token, over the dense model's measured beside "
        "them. The exit is the reference heads', which know nothing of adapters: no promise holds for them together.",
        *grid(titles, rows),
    ]


def online(result: dict[str, Any]) -> list[str]:
    offline = [found["log_loss"] for found in result["seeds"]["offline"]]
    rows = [["offline", *(f"{loss:.4f}" for loss in offline), "–"]]
    for name, gap in result["log_loss_above_offline"].items():
        rows.append([name, *(f"{found['log_loss']:.4f}" for found in result["seeds"][name]), f"{gap:+.4f}"])
    return [
        "## Learning while tracing",
        "",
        f"Log loss on {result['held_out']:,} held-out scenes of heads trained on {result['train']:,}, from stored "
        "traces or online, without any.",
        *grid(["", *(f"seed {seed}" for seed in range(len(offline))), "mean above offline"], rows),
    ]


def fit_memory(result: dict[str, Any]) -> list[str]:
    rows = [
        [f"{row['traces']:,}", *(f"{row[name]:.0f} MB" for name in ("disk_mb", "loaded_mb", "fitting_peak_mb"))]
        for row in result["runs"]
    ]
    return [
        "## Memory of fitting",
        "",
        f"Synthetic traces of {result['layers']} layers, their states on the disk. What a process owns grows by "
        f"{result['held_bytes_per_trace']:.0f} bytes a trace once they are loaded, "
        f"{result['peak_bytes_per_trace']:.0f} at the peak: labels, digests, places and orders.",
        *grid(["traces", "on the disk", "loaded", "peak of fitting"], rows),
    ]


def runtimes(result: dict[str, Any]) -> list[str]:
    rows = [[name, ranged_ratio(row)] for name, row in result["this_over_other"].items()]
    rows += [[name, ranged_ratio(row)] for name, row in result["within"].items() if name.startswith("this")]
    return [
        "## The runtime against its predecessor",
        "",
        f"Time of this runtime over that of commit {result['other']}, each in a process of its own, in turn; below, "
        "ratios within this runtime. In brackets 90 % confidence.",
        *grid(["", "ratio"], rows),
    ]


def ranged_ratio(row: dict[str, Any]) -> str:
    low, high = row["interval_90"]
    return f"{row['ratio']:.3f} ({low:.3f} … {high:.3f})"


def stages(result: dict[str, Any]) -> list[str]:
    before = f"Measured with the runtime of commit {result['runtime']}. " if "runtime" in result else ""
    rows = [[name, f"{1000 * seconds:.1f} ms"] for name, seconds in result["median_seconds"].items()]
    return [
        "## Where the time of an answer goes",
        "",
        before
        + f"The reference MLLM, a batch of {result['batch']}, one CPU thread; decoding per token of the batch. With "
        f"exits (mean exit layer {result['mean_exit_layer']:.1f}) prefill takes {result['prefill_ratio']:.2f} of its "
        f"dense time, decoding {result['decode_ratio']:.2f}.",
        *grid(["stage", "median"], rows),
    ]


SECTIONS = {
    "promise": promise,
    "guard": guard,
    "heads_forms": forms,
    "heads_ablation": ablation,
    "trace_cost": trace_cost,
    "prefill": prefill,
    "prefill_gpu": prefill,
    "stages": stages,
    "small_costs": small_costs,
    "online": online,
    "fit_memory": fit_memory,
    "runtimes": runtimes,
    "eas": eas,
}


def main() -> None:
    lines = [
        "# Results",
        "",
        "Measured with the reference MLLM of this repository, or on decoders of LLaVA-1.5's shape; nothing here was",
        "measured on a GPU. Written by `python benchmarks/results_page.py` from `benchmarks/results/*.json`.",
    ]
    for name, section in SECTIONS.items():
        result = read(name)
        if result is not None:
            lines += ["", *section(result), "", f"`{result['command']}`"]
    lines += [
        "",
        "## What the reference MLLM does, layer by layer",
        "",
        "![inspect](figures/inspect.png)",
        "",
        "`dyvte inspect model=checkpoints/reference-mllm dtype=float32 output=runs/inspect "
        "'data={scenes: {split: test, n: 120, seed: 3}}' max_new_tokens=8`",
    ]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
