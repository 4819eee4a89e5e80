"""Requests per second of vLLM, dense and with exits, by how many are under way at once.

Both engines stay up, and take turns, each with the same questions, so that what else a machine does meets both.

    python benchmarks/vllm_serving.py            # in the environment that `make test-vllm` makes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CONCURRENCY = (1, 8, 32)
PREFIX = "measured "  # before a line of the engine's process that is meant for this one


class Engine:
    """An engine in a process of its own.

    Args:
        model, scenes: what is asked.
        environment: more of it for that process.
    """

    def __init__(self, model: str, scenes: int, **environment: str):
        command = [sys.executable, __file__, "--model", model, "--scenes", str(scenes), "--engine"]
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=os.environ | more | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, concurrency: int) -> list[float]:
        """Requests per second, and the share of the decoder's token rows that were run."""
        print(concurrency, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(PREFIX):
                return json.loads(line.removeprefix(PREFIX))
        raise RuntimeError("the engine ended: see its output above")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(model: str, scenes: int) -> None:
    """What an engine's process does: measures once for every line it gets."""
    from prometheus_client import REGISTRY
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from dyvte.data import load_samples

    processor = AutoProcessor.from_pretrained(model)
    prompts = [
        {
            "prompt": processor.apply_chat_template(sample.messages(), add_generation_prompt=True, tokenize=False),
            "multi_modal_data": {"image": sample.images},
        }
        for sample in load_samples({"scenes": {"split": "test", "n": scenes, "seed": 7}})[:]
    ]
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=max(CONCURRENCY),
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=2**28,
        mm_processor_cache_gb=0,
    )
    greedy = SamplingParams(temperature=0, max_tokens=8)

    def rows(kind: str) -> float:
        return REGISTRY.get_sample_value("dyvte_rows_total", {"kind": kind}) or 0.0

    for line in sys.stdin:
        before, began = (rows("run"), rows("saved")), time.perf_counter()
        answered(llm.llm_engine, prompts, greedy, int(line))
        rate = len(prompts) / (time.perf_counter() - began)
        run, saved = rows("run") - before[0], rows("saved") - before[1]
        print(PREFIX + json.dumps([rate, run / (run + saved) if run else 1.0]), flush=True)


def answered(engine, prompts: Sequence[dict], greedy, concurrency: int) -> None:
    """Has all prompts answered, ``concurrency`` of them under way at any time."""
    waiting, under_way = list(enumerate(prompts)), 0
    while waiting or under_way:
        while waiting and under_way < concurrency:
            name, prompt = waiting.pop()
            engine.add_request(str(name), prompt, greedy)
            under_way += 1
        under_way -= sum(output.finished for output in engine.step())


def with_known_names(model: str, folder: str) -> str:
    """A copy of a LLaVA whose vision tower has the names it had before transformers 5, which vLLM knows."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model, Path(folder, Path(model).name))
    old, new, weights = "vision_tower.", "vision_tower.vision_model.", copy / "model.safetensors"
    tensors = {name.replace(new, old).replace(old, new): value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return str(copy)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="checkpoints/reference-mllm")
    options.add_argument("--heads", default="checkpoints/reference-heads")
    options.add_argument("--scenes", type=int, default=128)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--note", help="how it was run, for the record")
    options.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.engine:
        serve(chosen.model, chosen.scenes)
        return
    from shapes import record

    folder = tempfile.TemporaryDirectory()
    model = with_known_names(chosen.model, folder.name)
    engines = {
        "dense": Engine(model, chosen.scenes),
        "exits": Engine(model, chosen.scenes, DYVTE_HEADS=str(Path(chosen.heads).resolve())),
    }
    for engine in engines.values():
        engine.measure(max(CONCURRENCY))  # warms up
    laps = {
        concurrency: [
            {name: engine.measure(concurrency) for name, engine in engines.items()} for _ in range(chosen.rounds)
        ]
        for concurrency in CONCURRENCY
    }
    for engine in engines.values():
        engine.close()
    results = []
    for concurrency, rounds in laps.items():
        row = {"concurrency": concurrency}
        for name in engines:
            row[f"{name}_requests_per_second"] = statistics.median(lap[name][0] for lap in rounds)
        row["exits_over_dense"] = statistics.median(lap["exits"][0] / lap["dense"][0] for lap in rounds)
        row["rows_run"] = rounds[0]["exits"][1]
        results.append(row)
        print(json.dumps(row))
    command = f"python benchmarks/vllm_serving.py --scenes {chosen.scenes} --rounds {chosen.rounds}"
    record("vllm", {"command": command, "note": chosen.note, "results": results})


if __name__ == "__main__":
    main()
