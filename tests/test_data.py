"""Every ready config reads a tiny folder laid out like the data set on the hub, card included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from dyvte import data
from dyvte.evaluation.metrics import METRICS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))
CONFIGS = sorted((ROOT / "configs" / "data").glob("*.yaml"))
TEXT, WHOLE, PICTURE = Value("string"), Value("int64"), ImageFeature()


def picture(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 6), (shade, 10, 20))


def table(path: Path, split: str, features: dict, rows: list[dict]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, Features(features)).to_parquet(path / f"{split}-00000-of-00001.parquet")


def card(path: Path, configs: dict[str, tuple[str, str]]) -> None:
    """A README as on the hub: which files belong to which configuration and split."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{folder}/{split}-*"}]}
        for name, (folder, split) in configs.items()
    ]
    (path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": listed}) + "---\n")


def one_table(path: Path, split: str, features: dict, rows: list[dict], name: str = "default") -> None:
    folder = "data" if name == "default" else name
    table(path / folder, split, features, rows)
    card(path, {name: (folder, split)})


def write_gqa(path: Path) -> None:
    table(path / "testdev_balanced_images", "testdev", {"id": TEXT, "image": PICTURE}, [
        {"id": "n1", "image": picture(1)}, {"id": "n2", "image": picture(2)}])  # fmt: skip
    features = {
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": Value("bool"),
        "groups": {"global": TEXT, "local": TEXT},
        "entailed": TEXT,
        "equivalent": TEXT,
        "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT},
        "annotations": {"question": List({"objectId": TEXT, "value": TEXT})},
        "semantic": List({"operation": TEXT, "argument": TEXT, "dependencies": List(Value("int32"))}),
        "semanticStr": TEXT,
    }
    kinds = {"structural": "query", "semantic": "attr", "detailed": "color"}
    rows = [
        {"id": "201", "imageId": "n2", "question": "What colour is it?", "answer": "red", "types": kinds},
        {"id": "202", "imageId": "n2", "question": "Is it big?", "answer": "no", "types": kinds},
    ]
    table(path / "testdev_balanced_instructions", "testdev", features, rows)
    names = ("testdev_balanced_images", "testdev_balanced_instructions")
    card(path, {name: (name, "testdev") for name in names})


def write_vqav2(path: Path) -> None:
    answer = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": WHOLE}
    features = {
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": List(answer),
        "image_id": WHOLE,
        "answer_type": TEXT,
        "question_id": WHOLE,
        "question": TEXT,
        "image": PICTURE,
    }
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(["red"] * 9 + ["pink"])]
    row = {"question_id": 7, "question": "What colour?", "answers": given, "answer_type": "other", "image": picture()}
    one_table(path, "validation", features, [row])


def write_textvqa(path: Path) -> None:
    features = {
        "image_id": TEXT,
        "question_id": Value("int32"),
        "question": TEXT,
        "question_tokens": List(TEXT),
        "image": PICTURE,
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": List(TEXT),
        "image_classes": List(TEXT),
        "set_name": TEXT,
        "ocr_tokens": List(TEXT),
    }
    row = {"question_id": 3, "question": "what brand?", "answers": ["nokia"] * 10, "image": picture()}
    one_table(path, "validation", features, [row])


def write_scienceqa(path: Path) -> None:
    names = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = {"image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": Value("int8")}
    features |= {name: TEXT for name in names}
    row = {"image": picture(), "question": "Which?", "choices": ["ant", "bee"], "answer": 1, "subject": "biology"}
    one_table(path, "test", features, [row | {"hint": "Look."}, row | {"hint": ""}], "ScienceQA-IMG")


def write_pope(path: Path) -> None:
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    features = {name: TEXT for name in names} | {"image": PICTURE}
    row = {"id": "0", "question_id": "1", "question": "Is there a dog?", "answer": "yes", "image": picture()}
    one_table(path, "test", features, [row | {"category": c} for c in ("adversarial", "popular", "random")])


def write_mme(path: Path) -> None:
    features = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT}
    row = {"question_id": "a/1.png", "image": picture(), "category": "count", "answer": "Yes", "question": "One?"}
    one_table(path, "test", features, [row, row | {"answer": "No"}])


def write_mmbench(path: Path) -> None:
    names = "index question hint answer A B C D category source L2-category comment split".split()
    features = {name: TEXT for name in names} | {"image": PICTURE}
    row = {"index": "5", "question": "Which?", "hint": "nan", "answer": "B", "A": "ant", "B": "bee", "C": "nan"}
    row |= {"D": "nan", "category": "nature", "image": picture()}
    one_table(path, "dev", features, [row, row | {"index": "6", "hint": "Look.", "C": "cow"}], "en")


def write_seedbench(path: Path) -> None:
    names = "answer choice_a choice_b choice_c choice_d data_id data_type question question_id".split()
    features = {name: TEXT for name in names}
    features |= {"question_type_id": Value("int16"), "image": List(PICTURE), "segment": List(WHOLE)}
    row = {"answer": "C", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "question": "How many?"}
    row |= {"question_type_id": 5, "image": [picture()], "question_id": "11", "data_type": "image"}
    one_table(path, "test", features, [row | {"question_id": "9", "data_type": "video"}, row])


def write_mmvet(path: Path) -> None:
    names = ("question_id", "question", "answer", "image_source", "capability")
    features = {name: TEXT for name in names} | {"image": PICTURE}
    row = {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "capability": "ocr,math"}
    one_table(path, "test", features, [row | {"image": picture()}])


def write_docvqa(path: Path) -> None:
    names = ("questionId", "question", "ucsf_document_id", "ucsf_document_page_no", "data_split")
    features = {name: TEXT for name in names} | {"docId": WHOLE, "image": PICTURE}
    features |= {"question_types": List(TEXT), "answers": List(TEXT)}
    row = {
        "questionId": "49153",
        "question": "What year?",
        "answers": ["1999", "99"],
        "question_types": ["form", "layout"],
    }
    one_table(path, "validation", features, [row | {"image": picture()}], "DocVQA")


def write_chartqa(path: Path) -> None:
    features = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE}
    row = {"type": "human_test", "question": "How much?", "answer": "0.57", "image": picture()}
    one_table(path, "test", features, [row])


def write_ocrbench(path: Path) -> None:
    features = {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": List(TEXT), "image": PICTURE}
    row = {"dataset": "IIIT5K", "question": "what is written?", "answer": ["CENTRE"], "image": picture()}
    one_table(path, "test", features, [row | {"question_type": "Regular Text Recognition"}])


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
EXPECTED = {  # id, question, answers, choices, kind of the last sample
    "gqa": ("202", "Is it big?" + SHORT, ["no"], [], "query"),
    "vqav2": ("7", "What colour?" + SHORT, ["red"] * 9 + ["pink"], [], "other"),
    "textvqa": ("3", "what brand?" + SHORT, ["nokia"] * 10, [], "all"),
    "scienceqa": ("1", "Which?\nA. ant\nB. bee" + LETTER, ["B"], ["ant", "bee"], "biology"),
    "pope": ("random/1", "Is there a dog?" + SHORT, ["yes"], [], "random"),
    "mme": ("a/1.png#2", "One?" + SHORT, ["No"], [], "count"),
    "mmbench": ("6", "Look.\nWhich?\nA. ant\nB. bee\nC. cow" + LETTER, ["B"], ["ant", "bee", "cow"], "nature"),
    "seedbench": ("11", "How many?\nA. 1\nB. 2\nC. 3\nD. 4" + LETTER, ["C"], ["1", "2", "3", "4"], "5"),
    "mmvet": ("v1_0", "What is x?", ["-1<AND>-5"], [], "ocr,math"),
    "docvqa": ("49153", "What year?" + SHORT, ["1999", "99"], [], "form, layout"),
    "chartqa": ("0", "How much?" + SHORT, ["0.57"], [], "human_test"),
    "ocrbench": ("0", "what is written?", ["CENTRE"], [], "Regular Text Recognition"),
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_every_config_is_tested_and_names_a_metric():
    assert {path.stem for path in CONFIGS} == set(EXPECTED) | {"scenes"}
    for path in CONFIGS:
        assert data.read_config(path)["metric"] in METRICS


def test_configs_are_read_from_files_or_mappings(tmp_path):
    (tmp_path / "list.yaml").write_text("[1]")
    assert data.read_config({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="must hold a mapping"):
        data.read_config(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="there is no data config"):
        data.read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", EXPECTED)
def test_ready_configs_read_the_layout_of_the_hub(name, tmp_path):
    config = data.read_config(ROOT / "configs" / "data" / f"{name}.yaml")
    globals()[f"write_{name}"](tmp_path / "copy")
    samples = data.load_samples(config | {"path": str(tmp_path / "copy")})
    last = samples[len(samples) - 1]
    assert (last.id, last.question, last.answers, last.choices, last.kind) == EXPECTED[name]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert [(image.mode, image.size) for image in sample.images] == [("RGB", (8, 6))]
    METRICS[config["metric"]]().update(["x"], [last.answers], [last.choices])


def test_optional_text_and_joined_images(tmp_path):
    write_scienceqa(tmp_path / "s")
    config = data.read_config(ROOT / "configs/data/scienceqa.yaml") | {"path": str(tmp_path / "s")}
    assert data.load_samples(config)[0].question.startswith("Context: Look.\nWhich?")
    write_gqa(tmp_path / "g")
    config = data.read_config(ROOT / "configs/data/gqa.yaml") | {"path": str(tmp_path / "g")}
    assert data.load_samples(config)[0].images[0].getpixel((0, 0))[0] == 2


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"q": f"number {i}?", "a": i, "file": f"{i}.png", "two": [f"{i}.png"] * 2, "k": i % 2} for i in range(4)]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config_of(folder: Path, **changes) -> dict:
    columns = {"question": "q", "answers": "a", "image": "file", "kind": "k"}
    return {"path": str(folder), "split": "test", "columns": columns} | changes


def test_json_with_image_files_limits_choices_by_value_and_slices(folder):
    samples = data.load_samples(config_of(folder, where={"k": 1}))
    assert [s.answers for s in samples] == [["1"], ["3"]] and [s.kind for s in samples] == ["1", "1"]
    assert samples[-1].images[0].getpixel((0, 0))[0] == 3
    assert len(data.load_samples(config_of(folder, limit=3))) == 3
    shuffled = [s.answers[0] for s in data.load_samples(config_of(folder, seed=0))]
    assert sorted(shuffled) == ["0", "1", "2", "3"] != shuffled
    parts = [data.load_samples(config_of(folder, seed=0, skip=skip, limit=2)) for skip in (0, 2)]
    assert [s.answers[0] for part in parts for s in part] == shuffled
    samples = data.load_samples(config_of(folder))
    assert [s.id for s in samples[1:3]] == ["1", "2"]
    with pytest.raises(IndexError):
        samples[4]
    assert [[s.id for s in batch] for batch in data.batches(samples, 3)] == [["0", "1", "2"], ["3"]]


def test_scenes():
    config = {"scenes": {"split": "dev", "n": 12, "seed": 3}, "limit": 11, "prompt": "{question} !"}
    samples = data.load_samples(config)
    assert len(samples) == 11 and samples[0].kind == "arithmetic" and samples[0].question.endswith("? !")
    assert samples[10].id == "scenes-dev-3-10" and len(samples[10].answers) == 1
    assert samples.fingerprint == data.fingerprint(config)
    some = data.load_samples({"scenes": {"split": "dev", "n": 2, "kinds": ["left_of"]}})
    assert [s.id for s in some] == ["scenes-dev-0-left_of-0", "scenes-dev-0-left_of-1"]


def test_fingerprint_follows_the_samples_alone(folder):
    config = config_of(folder)
    assert data.fingerprint(config) == data.fingerprint(config | {"metric": "anls", "max_new_tokens": 3, "limit": None})
    assert data.fingerprint(config) != data.fingerprint(config | {"prompt": "{question}!"})
    before = data.fingerprint(config)
    (folder / "test.json").write_text((folder / "test.json").read_text() + "\n" + json.dumps({"q": "more"}))
    assert data.fingerprint(config) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colums": {}}, r"unknown keys \['colums'\].*choose from path"),
        ({"scenes": {"split": "dev", "n": 1}}, "needs one of"),
        ({"columns": None}, "which column is the question"),
        ({"columns": {"question": "Q"}}, "no column 'Q': the data set has q, a, file"),
        ({"prompt": "{question} {hint}"}, r"uses \['hint'\], which no column fills"),
        ({"prompt": "{question"}, "is not a template"),
        ({"optional": {"hint": "x"}}, "add it to `columns`"),
        ({"split": "dev"}, "cannot load .*test"),
        ({"path": "nowhere/at-all"}, "Give the id of a data set on the hub or a folder"),
        ({"where": {"k": 7}}, "no row has k in .*holds 0, 1"),
        ({"where": {"z": 7}}, "no column 'z' to choose by"),
        ({"limit": 0}, "limit must be"),
        ({"images": {"key": "x"}}, "`images` must be a mapping"),
    ],
)
def test_wrong_configs_are_refused_with_a_remedy(folder, changes, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        data.load_samples(config_of(folder, **changes))


@pytest.mark.parametrize(
    "scenes",
    [None, {"n": 2}, {"split": "dev", "n": 0}, {"split": "nope", "n": 2}, {"split": "dev", "n": 2, "kinds": ["x"]}],
)
def test_wrong_scenes_are_refused(scenes):
    with pytest.raises(ValueError, match="split|n must be|kinds"):
        data.load_samples({"scenes": scenes})


def test_answers_in_dictionaries_need_a_field(tmp_path):
    write_vqav2(tmp_path)
    config = {"path": str(tmp_path), "split": "validation", "columns": {"question": "question", "answers": "answers"}}
    with pytest.raises(ValueError, match=r"as in answers\.answer"):
        data.load_samples(config)[0]


@pytest.fixture(scope="module")
def processor():
    from reference_mllm import build_processor

    return build_processor(9)


def test_encode_pads_left_and_places_the_images(processor):
    samples = data.load_samples({"scenes": {"split": "dev", "n": 3}})[:]
    few = data.Sample("x", [], samples[0].question, ["1"], [], "all")
    batch = data.encode(processor, [samples[0], samples[1], few])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [100, 100, 0]
    assert batch["pixel_values"].shape == (2, 3, 90, 90)
    assert batch["attention_mask"][2, 0] == 0 and batch["attention_mask"][:, -1].all()
    start = int(batch["attention_mask"][2].argmax())
    assert processor.decode(batch["input_ids"][2, start:]) == f"<s> USER: {few.question} ASSISTANT:"
    alone = data.encode(processor, [samples[1]])
    assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][1])
    two = data.Sample("x", samples[0].images * 2, samples[0].question, ["1"], [], "all")
    assert data.encode(processor, [two, samples[1]])["pixel_values"].shape[0] == 3


def test_encode_without_a_template_says_what_to_do(processor):
    sample = data.load_samples({"scenes": {"split": "dev", "n": 1}})[0]
    template = processor.chat_template
    processor.chat_template = None
    try:
        with pytest.raises(ValueError, match="`template` in the data config"):
            data.encode(processor, [sample])
        text = "<s> <image> {{ messages[0]['content'][1]['text'] }}"
        ids = data.encode(processor, [sample], template=text)["input_ids"][0].tolist()
        assert ids.count(1) == 1  # the template's own first token, and no second one
    finally:
        processor.chat_template = template
    with pytest.raises(ValueError, match="nothing to encode"):
        data.encode(processor, [])
