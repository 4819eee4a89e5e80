"""Where the time of an answer goes: processor, vision tower, prefill of the decoder, decoding, each timed apart.

The reference MLLM on a batch of mixed questions, dense and with its heads, in turn.

    python benchmarks/stages.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from shapes import alternate, record, seconds, timed
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyvte
from dyvte.data import encode, load_samples

ROOT = Path(__file__).parents[1]
BATCH, REPEATS, TOKENS = 32, 75, 4


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(ROOT / "checkpoints/reference-mllm", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(ROOT / "checkpoints/reference-mllm")
    policy = dyvte.LearnedExit(dyvte.ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads"))
    samples = load_samples({"scenes": {"split": "test", "n": BATCH, "seed": 5}})[:]
    inputs = encode(processor, samples)
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}

    def prefill():
        return model(**prompts, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)

    def decode(cache, steps: int = TOKENS) -> None:
        mask, token = prompts["attention_mask"], prompts["input_ids"][:, -1:]
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
        cache.crop(-steps)

    runs = {
        "processor": lambda: timed(lambda: encode(processor, samples)),
        "vision tower": lambda: timed(lambda: model.get_image_features(inputs["pixel_values"], return_dict=True)),
        "prefill, dense": lambda: timed(prefill),
    }
    dense_cache = prefill().past_key_values
    runs["decode, dense"] = lambda: timed(lambda: decode(dense_cache))
    with dyvte.visual_exit(model, policy) as exits:
        short_cache = prefill().past_key_values
        layers = exits.layers

    def under(run):
        def inside():
            with dyvte.visual_exit(model, policy):
                return timed(run)

        return inside

    runs["prefill, exits"] = under(prefill)
    runs["decode, exits"] = under(lambda: decode(short_cache))
    medians = {name: seconds(laps) for name, laps in alternate(runs, REPEATS).items()}
    for name in ("decode, dense", "decode, exits"):
        medians[name] /= TOKENS
    record(
        "stages",
        {
            "command": "python benchmarks/stages.py",
            "batch": BATCH,
            "mean_exit_layer": layers.double().mean().item(),
            "median_seconds": medians,
            "prefill_ratio": medians["prefill, exits"] / medians["prefill, dense"],
            "decode_ratio": medians["decode, exits"] / medians["decode, dense"],
        },
    )


if __name__ == "__main__":
    main()
