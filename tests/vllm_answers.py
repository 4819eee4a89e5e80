"""Answers of a vLLM engine to scenes, as JSON: python vllm_answers.py MODEL SCENES CONCURRENCY,… OUTPUT

Run by test_vllm.py in a process of its own, since plugins are loaded once in a process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

from transformers import AutoProcessor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from dyvte.data import load_samples  # noqa: E402

TOKENS = 8


class ExitLayers(logging.Handler):
    """Keeps the exit layers that the log tells, by request."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Exit layers"):
            self.layers |= {name.split("-")[0]: layer for name, layer in record.args[0].items()}


def main(model: str, scenes: str, concurrencies: str, output: str) -> None:
    samples = load_samples({"scenes": {"split": "test", "n": int(scenes), "seed": 7}})[:]
    processor = AutoProcessor.from_pretrained(model)
    prompts = [
        {
            "prompt": processor.apply_chat_template(sample.messages(), add_generation_prompt=True, tokenize=False),
            "multi_modal_data": {"image": sample.images},
        }
        for sample in samples
    ]
    # A cache too small for 32 requests at once would preempt some; this one holds them.
    llm = LLM(model, dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_memory_bytes=2**28)
    log = ExitLayers()
    logging.getLogger("vllm.dyvte").addHandler(log)  # vLLM has set up its log by now
    greedy, answers = SamplingParams(temperature=0, max_tokens=TOKENS), {}
    for concurrency in map(int, concurrencies.split(",")):
        made = []
        for start in range(0, len(prompts), concurrency):
            made += llm.generate(prompts[start : start + concurrency], greedy, use_tqdm=False)
        answers[concurrency] = {
            "prompts": [list(one.prompt_token_ids) for one in made],
            "answers": [list(one.outputs[0].token_ids) for one in made],
            "layers": [log.layers.get(one.request_id) for one in made],
        }
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
