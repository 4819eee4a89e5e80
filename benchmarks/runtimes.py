"""This checkout's runtime against another one's, in turn on the same machine: prompts, decoding, traces.

Each checkout runs in a process of its own that waits while the other works. Prompts go through a LLaVA-1.5-shaped
decoder (32 layers, 576 visual + 60 text tokens), decoding steps through the reference MLLM with the shipped heads in
a batch of 32. Both keep their memory (see shapes.py).

    git worktree add ../dyvte-before 8e26752
    python benchmarks/runtimes.py ../dyvte-before
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import heads_that_leave_at, interval, keep_memory, llava_shaped_decoder, prompt, record, seconds
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).parents[1]
STEPS = 16


@torch.no_grad()
def runs(width: int) -> dict[str, Callable[[], None]]:
    """What is timed, by name; with whatever dyvte this process imports."""
    import dyvte

    model = llava_shaped_decoder(width)
    layers = model.config.num_hidden_layers
    inputs, visual = prompt(model)
    several, their = prompt(model, batch=8)
    mixed = [layers // 4 + i * layers // 16 for i in range(8)]

    def under(policy, inputs=inputs, visual=visual):
        def run():
            with dyvte.visual_exit(model, policy, visual_mask=visual):
                model(**inputs, logits_to_keep=1)

        return run

    found = {
        "dense": lambda: model(**inputs, logits_to_keep=1),
        "known exits": under(dyvte.FixedExit(layers // 2)),
        "heads": under(dyvte.LearnedExit(heads_that_leave_at(model, layers // 2))),
        "mixed batch of 8": under(dyvte.FixedExit(mixed), several, their),
        "trace": lambda: dyvte.trace_batch(model, inputs, visual_mask=visual),
    }
    small = AutoModelForImageTextToText.from_pretrained(ROOT / "checkpoints/reference-mllm", dtype=torch.float32).eval()
    heads = dyvte.ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads")
    prompts = torch.load(Path(os.environ["DYVTE_PROMPTS"]))

    def cache_under(policy):
        with dyvte.visual_exit(small, policy):
            return small(**prompts, use_cache=True, logits_to_keep=1).past_key_values

    def decode(policy):
        cache = cache_under(policy)
        ids = prompts["input_ids"][:, -1:]

        def run():
            with dyvte.visual_exit(small, policy):
                mask = prompts["attention_mask"]
                for _ in range(STEPS):
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    position = mask.sum(1, keepdim=True) - 1
                    small(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache)
                cache.crop(-STEPS)

        return run

    return found | {"decode, dense": decode(dyvte.NeverExit()), "decode, mixed": decode(dyvte.LearnedExit(heads))}


@torch.no_grad()
def work(width: int) -> None:
    """Runs what is asked for, line by line, and answers with the seconds it took."""
    torch.set_num_threads(1)
    keep_memory()
    found = runs(width)
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        found[line.strip()]()
        print(time.perf_counter() - began, flush=True)


def start(checkout: Path, width: int, prompts: Path) -> subprocess.Popen:
    """A process that imports dyvte from a checkout."""
    paths = os.pathsep.join([str(checkout), str(ROOT / "benchmarks")])
    env = os.environ | {"PYTHONPATH": paths, "DYVTE_PROMPTS": str(prompts), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(checkout), "--worker", "--width", str(width)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)


def save_prompts(path: Path) -> None:
    """The inputs of both processes."""
    from dyvte.data import encode, load_samples

    processor = AutoProcessor.from_pretrained(ROOT / "checkpoints/reference-mllm")
    samples = load_samples({"scenes": {"split": "test", "n": 32, "seed": 5}})[:]
    torch.save(dict(encode(processor, samples)), path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("other", type=Path, help="the other checkout")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--repeats", type=int, default=25)
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        work(chosen.width)
        return
    prompts = ROOT / "runs/runtimes-prompts.pt"
    prompts.parent.mkdir(exist_ok=True)
    save_prompts(prompts)
    workers = {"this": start(ROOT, chosen.width, prompts), "other": start(chosen.other, chosen.width, prompts)}
    names = [json.loads(worker.stdout.readline()) for worker in workers.values()][0]
    laps = {f"{side}: {name}": [] for side in workers for name in names}
    draw = random.Random(0)
    for repeat in tqdm(range(chosen.repeats + 1), unit="round"):
        for name in draw.sample(names, len(names)):
            for side in draw.sample(list(workers), 2):
                workers[side].stdin.write(name + "\n")
                workers[side].stdin.flush()
                took = float(workers[side].stdout.readline())
                if repeat > 0:
                    laps[f"{side}: {name}"].append([took])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    times = {name: torch.tensor(values, dtype=torch.double) for name, values in laps.items()}

    def ratio(above: str, below: str) -> dict[str, object]:
        def of(some: dict[str, torch.Tensor]) -> float:
            return seconds(some[above]) / seconds(some[below])

        return {"ratio": of(times), "interval_90": interval(of, times)}

    record(
        "runtimes",
        {
            "command": f"python benchmarks/runtimes.py CHECKOUT --repeats {chosen.repeats} --width {chosen.width}",
            "other": subprocess.run(
                ["git", "-C", chosen.other, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "this_over_other": {name: ratio(f"this: {name}", f"other: {name}") for name in names},
            "within": {
                f"{side}: {above} / {below}": ratio(f"{side}: {above}", f"{side}: {below}")
                for side in workers
                for above, below in (
                    ("heads", "known exits"),
                    ("decode, mixed", "decode, dense"),
                    ("trace", "dense"),
                )
            },
            "median_seconds": {name: seconds(values) for name, values in times.items()},
        },
    )


if __name__ == "__main__":
    main()
