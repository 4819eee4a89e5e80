"""EAS on the reference MLLM: attentions skipped against accuracy, agreement with the dense answers, and measured time.

One search scores the layers; for each number of skipped attentions the highest-scored ones are taken and adapters
trained anew. Each is judged alone, folded, and with the reference heads' exit on top, on scenes of another split.

    python benchmarks/eas.py                                           # goes on where it stopped, in runs/eas
    python benchmarks/eas.py --share 0.05 --skip 4                     # a small run, in runs/eas-small
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from shapes import record

from dyvte import EAS, LearnedExit
from dyvte.config import EASConfig, EASSettings
from dyvte.data import load_samples, read_config
from dyvte.evaluation.runner import evaluate
from dyvte.loading import Mllm, load_heads, load_mllm
from dyvte.methods.eas_adapters import EASAdapters
from dyvte.training.eas import train_eas

ROOT = Path(__file__).parents[1]
MODEL, HEADS = ROOT / "checkpoints/reference-mllm", ROOT / "checkpoints/reference-heads"
SKIP = (2, 4, 6)
SETTINGS = EASSettings(
    width=32, adapted_width=32, search_steps=90, warmup=30, steps=120, batch_size=32, lr=4e-3, save_every=30
)
TEST, SINGLE = 1000, 24  # questions judged; prompts timed alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of steps and questions, for a small run")
    parser.add_argument("--skip", type=int, nargs="+", default=list(SKIP), help="how many attentions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = options.share == 1 and options.skip == list(SKIP)
    work = ROOT / "runs" / ("eas" if whole else "eas-small")

    def part(count: int, least: int) -> int:
        return max(round(options.share * count), least)

    settings = replace(
        SETTINGS,
        search_steps=part(SETTINGS.search_steps, 4),
        warmup=part(SETTINGS.warmup, 1),
        steps=part(SETTINGS.steps, 4),
    )
    data = {"scenes": {"split": "train", "n": 32 * settings.steps, "seed": 61}}
    config = EASConfig(model=str(MODEL), dtype="float32", threads=1, data=data, output=str(work), eas=settings)
    mllm = load_mllm(config)
    found = {count: trained(mllm, config, work, count, max(options.skip)) for count in sorted(options.skip)[::-1]}
    rows = judge(mllm, found, work, part(TEST, 32), part(SINGLE, 4))
    result = {
        "command": "python benchmarks/eas.py",
        "settings": asdict(settings),
        "weights": next(iter(found.values())).config.identity["weights"],
        "questions": part(TEST, 32),
        "scores": found[max(found)].config.training["scores"],
        "rows": rows,
    }
    if whole:
        record("eas", result)
    else:
        for row in rows:
            print(row)


def trained(mllm: Mllm, config: EASConfig, work: Path, count: int, most: int) -> EASAdapters:
    """Adapters for that many attentions, those of the most first: its search says which."""
    folder, settings = work / f"skip-{count}", replace(config.eas, skip=count)
    if count < most:
        scores = EASAdapters.load(work / f"skip-{most}").config.training["scores"]
        best = sorted(scores, key=lambda layer: (scores[layer], int(layer)))[-count:]
        settings = replace(settings, layers=sorted(map(int, best)))
    own = replace(config, output=str(folder), work=str(folder / "work"), eas=settings)
    adapters = train_eas(mllm, load_samples(read_config(own.data)), own)
    adapters.save(folder)
    return adapters


def judge(
    mllm: Mllm, found: Mapping[int, EASAdapters], work: Path, questions: int, single: int
) -> list[dict[str, Any]]:
    """One row for the dense model, the exit alone, and every number of skipped attentions in three forms."""
    exit = LearnedExit(load_heads(str(HEADS)))
    policies, skipped = {"exit": exit}, {"dense": [], "exit": []}
    for count, adapters in sorted(found.items()):
        forms = {"": EAS(adapters), "-folded": EAS(adapters, fold=True), "-exit": EAS(adapters) & exit}
        policies |= {f"eas-{count}{form}": method for form, method in forms.items()}
        skipped |= {f"eas-{count}{form}": adapters.config.skipped for form in forms}
    samples = load_samples({"scenes": {"split": "test", "n": questions, "seed": 62}})
    asked = {"max_new_tokens": 8, "pictures": 0}
    summary = evaluate(mllm.model, mllm.processor, samples, policies, work / "batches", batch_size=32, **asked)
    alone = evaluate(
        mllm.model,
        mllm.processor,
        load_samples({"scenes": {"split": "test", "n": single, "seed": 63}}),
        policies,
        work / "alone",
        batch_size=1,
        timing_batches=single,
        **asked,
    )
    return [row(name, skipped[name], summary["policies"][name], alone["policies"][name]) for name in skipped]


def row(name: str, skipped: Sequence[int], whole: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy comes to; times over those of the dense model beside it."""
    times = {}
    for batch, found in (("1", alone["timing"]), ("32", whole["timing"])):
        if found is not None:
            decode = found["decode_seconds"]
            times[batch] = {"decoder": found["decoder_ratio"], "token": decode["exit"] / decode["dense"]}
    return {
        "name": name,
        "skipped": list(skipped),
        "accuracy": whole["accuracy"],
        "agreement": whole["agreement"],
        "visual_layers_removed": whole["visual_layers_removed"],
        "times": times,
    }


if __name__ == "__main__":
    main()
