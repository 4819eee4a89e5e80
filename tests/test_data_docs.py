"""The page on data: every example on it works as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml
from data_files import llava, messages, picture, said

from dyvte import data
from dyvte.data.config import KEYS

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """What the examples name, in the folder they are run in."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    llava(tmp_path, json.loads(blocks("json")[0]))
    talk = messages(said("<image>\nWhat?", "a cat"))
    hub = {
        "lmms-lab/ChartQA/test": {"image": picture(), "question": "How much?", "answer": "3", "type": "human"},
        "somebody/conversations/train": {"pictures": [picture()], "talk": talk},
    }
    for name, row in hub.items():
        (tmp_path / name).parent.mkdir(parents=True)
        datasets.Dataset.from_list([row]).to_parquet(f"{name}-00000-of-00001.parquet")
    return tmp_path


def test_every_config_on_the_page_is_read(disk):
    read = [data.load_samples(yaml.safe_load(block)) for block in blocks("yaml")]
    assert [[sample.id for sample in samples][:3] for samples in read] == [
        ["0"],
        ["000000033471@1", "000000033471@2", "2400001@1"],
        ["0"],
        ["2400001"],
        ["scenes-dev-0-0", "scenes-dev-0-1", "scenes-dev-0-2"],
    ]
    assert read[0][0].question == "How much?\nAnswer the question using a single word or phrase."
    assert read[1][1].history == [("What colour is the bus?", "Red.")] and read[1].left_out == {"no image": 1}
    assert read[2][0].answers == ["a cat"] and len(read[2][0].images) == 1


def test_the_code_on_the_page_runs(disk, capsys):
    (disk / "images/vg/VG_100K_2/2400001.jpg").unlink()
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["readable"].record() == [
        {"index": 1, "id": "2400001", "file": "images/vg/VG_100K_2/2400001.jpg", "reason": "there is no such file"}
    ]
    assert capsys.readouterr().out == "000000033471 What colour is the bus? ['Red.']\nTrue\n"


def test_every_key_is_on_the_page():
    assert not [key for key in KEYS if not re.search(rf"\b{key}\b", PAGE)]
