"""Scenes of digits as tasks that lmms-eval runs offline: a data set on the disk, a YAML file and its functions."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value

from dyvte.data.scenes.source import samples

TASK = """\
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, until: ["never"]}}
process_results: !function scenes.score
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""
FUNCTIONS = """\
def visuals(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"])}
"""


def write_task(folder: Path, name: str, n: int, seed: int, data: str | None = None) -> None:
    """A task about ``n`` scenes.

    Args:
        folder: of the YAML file, for ``--include_path``.
        name: of the task.
        data: how the data set is called in the YAML file; its absolute path if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = Features(image=Image(), question=Value("string"), answer=Value("string"), kind=Value("string"))
    scenes = Dataset.from_list(list(samples("test", n, seed)), features=features)
    DatasetDict(test=scenes).save_to_disk(str(folder / f"{name}-data"))
    (folder / "scenes.py").write_text(FUNCTIONS)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data or folder.absolute() / f"{name}-data"))
