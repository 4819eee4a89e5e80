"""Digests follow what a model is shown, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import datasets
import pytest
from data_files import llava, picture, said
from PIL import Image

from dyvte import data

ROWS = [
    {"id": i, "image": f"coco/train2017/{i}.png", "conversations": said("<image>\nWhat?", f"a {i}", "Sure?", "yes")}
    for i in range(3)
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_the_digest_of_an_image_is_that_of_its_size_and_pixels():
    image = picture(7)
    pixels = bytes(value for y in range(18) for x in range(24) for value in image.getpixel((x, y)))
    assert data.image_digest(image) == hashlib.sha256(b"24x18:" + pixels).hexdigest()
    turned = Image.frombytes("RGB", (18, 24), image.tobytes())
    assert data.image_digest(turned) != data.image_digest(image)


def digests(config: dict) -> tuple[list[str], str]:
    samples = data.load_samples(config | {"turns": "all"})
    return [data.sample_digest(sample) for sample in samples], data.dataset_digest(samples)


def test_names_places_times_and_layouts_do_not_count(tmp_path):
    config = llava(tmp_path / "here", ROWS)
    expected = digests(config)
    assert len(set(expected[0])) == 6
    (tmp_path / "here").rename(tmp_path / "there")
    config = config | {"path": str(tmp_path / "there/mix.json"), "images": str(tmp_path / "there/images")}
    for file in (tmp_path / "there").rglob("*.*"):
        os.utime(file, (1, 1))
    assert digests(config) == expected
    (tmp_path / "there/images/coco").rename(tmp_path / "there/images/COCO")
    renamed = [
        row | {"id": f"other {row['id']}", "image": row["image"].replace("coco", "COCO").removesuffix(".png") + ".bmp"}
        for row in ROWS
    ]
    for row, new in zip(ROWS, renamed):
        with Image.open(tmp_path / "there/images" / row["image"].replace("coco", "COCO")) as image:
            image.save(tmp_path / "there/images" / new["image"])  # without loss, in another format
    (tmp_path / "there/mix.json").write_text(json.dumps(renamed))
    assert digests(config) == expected
    # The first turns again, as a table.
    lines = [
        {"i": row["image"].replace(".png", ".bmp"), "q": "What?", "a": row["conversations"][1]["value"]} for row in ROWS
    ]
    table = tmp_path / "there/images/train.jsonl"
    table.write_text("\n".join(json.dumps(line | {"i": line["i"].replace("coco", "COCO")}) for line in lines))
    samples = data.load_samples({"path": str(table), "columns": {"image": "i", "question": "q", "answers": "a"}})
    assert [data.sample_digest(sample) for sample in samples] == expected[0][::2]
    assert data.dataset_digest(samples) == data.dataset_digest(data.load_samples(config))


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (("What?", "That?"), {0, 1}),
        (("a 0", "a 7"), {1}),  # the history of the second turn, the answer of the first
        (("Sure?", "Pure?"), {1}),
        (("yes", "yet"), set()),  # answers are not shown, but are data
    ],
)
def test_edits_that_keep_the_size_count(tmp_path, edit, changed):
    before = digests(llava(tmp_path, ROWS[:1]))
    size = (tmp_path / "mix.json").stat().st_size
    after = digests(llava(tmp_path, json.loads(json.dumps(ROWS[:1]).replace(*edit))))
    assert (tmp_path / "mix.json").stat().st_size == size
    assert {i for i, (a, b) in enumerate(zip(before[0], after[0])) if a != b} == changed
    assert before[1] != after[1]


def test_one_pixel_counts(tmp_path):
    config = llava(tmp_path, ROWS)
    before = digests(config)
    file = tmp_path / "images" / ROWS[1]["image"]
    with Image.open(file) as image:
        image.load()
    image.putpixel((3, 3), (0, 0, 0))
    image.save(file)
    after = digests(config)
    assert [a == b for a, b in zip(before[0], after[0])] == [True, True, False, False, True, True]
    assert before[1] != after[1]


def test_everything_shown_counts_and_nothing_else():
    sample = data.Sample(
        "a", [picture(1), picture(2)], "Which?", ["b"], ["x", "y"], "k", [("What?", "a cat")], "Brief."
    )
    digest = data.sample_digest(sample)
    for same in ({"id": "b"}, {"answers": ["c"]}, {"kind": "l"}, {"history": [("<image>\n<image>What?", "a cat")]}):
        assert data.sample_digest(replace(sample, **same)) == digest
    others = [
        {"images": [picture(2), picture(1)]},
        {"system": ""},
        {"question": "Which"},
        {"history": [("What?", "a dog")]},
        {"history": [("<image>What?", "a cat")], "question": "Which?<image>"},
        {"history": []},
    ]
    assert len({digest, *(data.sample_digest(replace(sample, **other)) for other in others)}) == 7
    known = [data.image_digest(image) for image in sample.images]
    assert data.sample_digest(replace(sample, images=[None, None]), known) == digest


def test_the_digest_of_a_data_set_is_ordered_and_streams():
    samples = data.load_samples({"scenes": {"split": "dev", "n": 4}})
    digest = data.DatasetDigest()
    for sample in samples:
        digest.update(data.sample_digest(sample), sample.answers)
    assert digest.hexdigest() == data.dataset_digest(iter(samples)) != data.dataset_digest(samples[::-1])


def test_fingerprints_of_files_follow_their_content(tmp_path):
    config = llava(tmp_path / "here", ROWS)
    before = data.fingerprint(config)
    (tmp_path / "here").rename(tmp_path / "there")
    config = config | {"path": str(tmp_path / "there/mix.json"), "images": str(tmp_path / "there/images")}
    assert data.fingerprint(config) == data.load_samples(config).fingerprint == before
    assert data.fingerprint(config | {"turns": "all"}) != before
    file = tmp_path / "there/mix.json"
    file.write_text(file.read_text().replace("What?", "That?"))
    assert data.fingerprint(config) != before
