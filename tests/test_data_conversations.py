"""Conversations in every layout become the prompts they were, up to the answer that is asked for."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import datasets
import pytest
from data_files import FOLDERS, llava, messages, picture, said, save_picture, spelling_processor
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from dyvte import data
from dyvte.data.selection import unique

TEXT = Value("string")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def processor():
    return spelling_processor()


def prompts(processor, samples, template=None) -> list[str]:
    """What a model would read, padding aside."""
    ids = data.encode(processor, samples, template)["input_ids"]
    return [processor.tokenizer.decode(row).replace("<pad>", "") for row in ids]


def random_rows(count: int) -> list[dict]:
    """Conversations of 1 to 4 turns whose every text is unmistakable, with pictures in any question."""
    rng, rows = random.Random(0), []
    for i in range(count):
        turns = rng.randint(1, 4)
        marks = [1 if turn == 0 else rng.choice([0, 0, 1, 2]) for turn in range(turns)]
        if i % 3 == 0:
            marks = [rng.randint(1, 3)] + [0] * (turns - 1)
        texts = []
        for turn, number in enumerate(marks):
            words = [f"ask-{i}-{turn}-é", f"more-{i}-{turn}"]
            for _ in range(number):
                words.insert(rng.randint(0, len(words)), "<image>")
            texts += [" ".join(words), f"Answer {i} {turn} ünïque."]
        images = [f"{FOLDERS[i % 6]}/{i}-{n}.png" for n in range(sum(marks))]
        rows.append({"id": i, "image": images, "conversations": said(*texts, system=f"Rule {i}." if i % 2 else None)})
    return rows


def llava_file(folder: Path, rows: list[dict]) -> dict:
    return llava(folder, rows)


def json_lines(folder: Path, rows: list[dict]) -> dict:
    config = llava(folder, rows) | {"format": "messages", "path": str(folder / "rows.jsonl")}
    lines = [{"images": row["image"], "messages": messages(row["conversations"])} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return config


def sharegpt(folder: Path, rows: list[dict]) -> dict:
    """A table of file names."""
    features = {"image": List(TEXT), "conversations": List({"from": TEXT, "value": TEXT})}
    config = llava(folder, rows) | {"format": "messages", "path": str(folder / "table")}
    write_table(folder / "table", features, [{name: row[name] for name in features} for row in rows])
    return config


def parts(folder: Path, rows: list[dict]) -> dict:
    """A table of pictures, as on the hub, whose messages have parts."""
    part = {"type": TEXT, "text": TEXT}
    features = {"images": List(ImageFeature()), "messages": List({"role": TEXT, "content": List(part)})}
    llava(folder, rows)
    made = [
        {
            "images": [str(folder / "images" / name) for name in row["image"]],
            "messages": messages(row["conversations"], parts=True),
        }
        for row in rows
    ]
    write_table(folder / "table", features, made)
    return {"path": str(folder / "table"), "split": "train", "format": "messages"}


def write_table(folder: Path, features: dict, rows: list[dict]) -> None:
    folder.mkdir()
    columns = {name: [row[name] for row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, Features(features))
    table.to_parquet(folder / "train.parquet")


LAYOUTS = [llava_file, json_lines, sharegpt, parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turns", ["first", "single", "all"])
def test_no_answer_reaches_its_prompt_and_all_before_it_does(layout, turns, tmp_path, processor):
    rows = random_rows(40)
    samples = data.load_samples(layout(tmp_path, rows) | {"turns": turns})
    asked = []  # row and turn of every sample that there must be
    for i, row in enumerate(rows):
        count = sum(turn["from"] == "gpt" for turn in row["conversations"])
        asked += [(i, turn) for turn in range(count if turns == "all" else turns == "first" or count == 1)]
    assert len(samples) == len(asked) > 5
    for sample, prompt, (i, turn) in zip(samples, prompts(processor, samples[:]), asked):
        talk = [message["value"] for message in rows[i]["conversations"] if message["from"] != "system"]
        assert sample.answers == [talk[2 * turn + 1]]
        assert sample.answers[0] not in prompt
        spoken = [("[user]", "[assistant]")[k % 2] + shown(text) for k, text in enumerate(talk[: 2 * turn + 1])]
        system = f"[system]Rule {i}." if i % 2 else ""
        assert prompt == system + "".join(spoken) + "[assistant]"
        assert len(sample.images) == prompt.count("<image>")


def shown(text: str) -> str:
    """How a text is written in a prompt: pictures before or after it come first, those inside stay."""
    inside = re.sub(r"^(<image> )+|( <image>)+$", "", text)
    return text if "<image>" in inside else "<image>" * text.count("<image>") + inside


def columns(folder: Path, rows: list[dict]) -> dict:
    """A table of first turns, a column for each part."""
    llava(folder, rows)
    talks = [[turn["value"] for turn in row["conversations"] if turn["from"] != "system"] for row in rows]
    made = [
        {"image": [str(folder / "images" / name) for name in row["image"]][: talk[0].count("<image>")], "q": talk[0]}
        | {"a": talk[1]}
        for row, talk in zip(rows, talks)
    ]
    write_table(folder / "table", {"image": List(TEXT), "q": TEXT, "a": TEXT}, made)
    return {"path": str(folder / "table"), "columns": {"image": "image", "question": "q", "answers": "a", "kind": "a"}}


@pytest.mark.parametrize("layout", [*LAYOUTS, columns])
def test_prompts_do_not_change_with_the_answers(layout, tmp_path, processor):
    rows = random_rows(12)
    other = json.loads(json.dumps(rows).replace("Answer", "No idea"))
    here = data.load_samples(layout(tmp_path / "here", rows))
    there = data.load_samples(layout(tmp_path / "there", other))
    assert prompts(processor, here[:]) == prompts(processor, there[:])
    assert not any(a.answers == b.answers for a, b in zip(here, there))


def mixture(folder: Path) -> dict:
    """What LLaVA's mixture is made of."""
    one = ["<image>\nWhat is this?", "a cat"]
    rows = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": said(*one, "Sure?", "yes")},
        {"id": 2400001, "image": "vg/VG_100K_2/2400001.jpg", "conversations": said("Where?\n<image>", "left")},
        {"id": "2400001", "image": "ocr_vqa/images/0061.jpg", "conversations": said(*one)},
        {"id": "wgByO4Y_0", "model": "", "conversations": said("Tell me a joke", "No.", "Please", "No!")},
        {
            "id": "unicode",
            "image": "gqa/images/naïve-猫.jpg",
            "conversations": said("<image>\n这是什么？", "一只猫 🐈"),
        },
        {"conversations": said("<image>\nRead", "STOP"), "image": "textvqa/train_images/f0.jpg"},
    ]
    return llava(folder, rows)


def test_the_layout_of_llava(tmp_path):
    config = mixture(tmp_path)
    samples = data.load_samples(config)
    assert samples.left_out == {"no image": 1}
    assert samples.ids == [sample.id for sample in samples]
    assert [(sample.id, sample.kind, sample.question, sample.answers, sample.history) for sample in samples] == [
        ("000000033471", "coco", "What is this?", ["a cat"], []),
        ("2400001", "vg", "Where?", ["left"], []),
        ("2400001#2", "ocr_vqa", "What is this?", ["a cat"], []),
        ("unicode", "gqa", "这是什么？", ["一只猫 🐈"], []),
        ("5", "textvqa", "Read", ["STOP"], []),
    ]
    assert all(sample.images[0].mode == "RGB" for sample in samples)
    every = data.load_samples(config | {"turns": "all"})
    assert every.ids[:3] == ["000000033471@1", "000000033471@2", "2400001@1"] and len(every) == 6
    assert (every[1].question, every[1].answers) == ("Sure?", ["yes"])
    assert every[1].history == [("What is this?", "a cat")]
    single = data.load_samples(config | {"turns": "single"})
    assert len(single) == 4 and single.left_out == {"no image": 1, "several turns": 1}
    beside = {key: value for key, value in config.items() if key != "images"}
    (tmp_path / "mix.json").rename(tmp_path / "images/mix.json")
    assert data.load_samples(beside | {"path": str(tmp_path / "images/mix.json")})[4].question == "Read"


def test_ids_that_repeat_get_names_that_nobody_has():
    assert unique(["a", "a", "a#2", "a", "b", "a#2"]) == ["a", "a#3", "a#2", "a#4", "b", "a#2#2"]


def test_a_turn_before_its_first_image_is_left_out(tmp_path, processor):
    rows = [{"image": "x.png", "conversations": said("Hello", "Hi", "<image>\nWhat?", "a cat", "Sure?", "yes")}]
    config = llava(tmp_path, rows)
    samples = data.load_samples(config | {"turns": "all"})
    assert samples.ids == ["0@2", "0@3"] and samples.left_out == {"turns before the first image": 1}
    start = "[user]Hello[assistant]Hi[user]<image>What?[assistant]"
    assert prompts(processor, samples[:]) == [start, start + "a cat[user]Sure?[assistant]"]
    with pytest.raises(ValueError, match="none of the 1 rows"):
        data.load_samples(config)


def test_messages_need_no_marks(tmp_path, processor):
    rows = [
        {"images": ["a.png", "b.png"], "system": "Be brief.", "messages": messages(said("Same?", "no", "Eh?", "!"))}
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    for name in rows[0]["images"]:
        save_picture(tmp_path, name)
    samples = data.load_samples({"path": str(tmp_path / "rows.jsonl"), "format": "messages", "turns": "all"})
    assert prompts(processor, [samples[1]])[0] == (
        "[system]Be brief.[user]<image><image>Same?[assistant]no[user]Eh?[assistant]"
    )


def many(folder: Path) -> tuple[list[dict], dict]:
    rows = []
    for i in range(1000):
        turns = ["<image>\nWhat?", f"a {i}"] * (1 + i % 2)
        rows.append({"id": i, "conversations": said(*turns)} | ({"image": f"{i % 4}.png"} if i % 5 else {}))
        if not i % 5:
            rows[-1]["conversations"] = said("Hello", "Hi")
    return rows, llava(folder, rows)


def test_a_fraction_of_the_single_turn_rows_with_an_image(tmp_path):
    rows, config = many(tmp_path)
    right = {str(row["id"]) for row in rows if "image" in row and len(row["conversations"]) == 2}
    published = config | {"turns": "single", "fraction": 0.1, "seed": 0}
    samples = data.load_samples(published)
    assert len(samples) == round(0.1 * len(right)) == 40 and set(samples.ids) <= right
    assert samples.left_out == {"no image": 200, "several turns": 400}
    assert samples.ids == data.load_samples(published).ids != sorted(samples.ids, key=int)
    assert samples.ids != data.load_samples(published | {"seed": 1}).ids
    held_out = data.load_samples(published | {"skip": 40})
    assert len(held_out) == 40 and not set(held_out.ids) & set(samples.ids)
    assert [sample.answers for sample in samples[:2]] == [[f"a {name}"] for name in samples.ids[:2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.1}, "fraction needs a seed"),
        ({"fraction": 2, "seed": 0}, "above 0 and at most 1"),
        ({"fraction": 0.1, "seed": 0, "limit": 3}, "give one of them"),
        ({"turns": "last"}, "turns must be one of first, single, all"),
        ({"format": "sharegpt"}, "format must be one of table, llava, messages"),
        ({"prompt": "{question}!"}, r"conversations take no \['prompt'\]"),
        ({"split": "train"}, r"conversations take no \['split'\]"),
        ({"columns": {"question": "q"}}, "`columns` of conversations may name messages"),
        ({"columns": {"messages": "talks"}}, "there is no column 'talks': the rows have id, image, conversations"),
        ({"images": "nowhere"}, "there is no folder of images nowhere"),
        ({"path": "liuhaotian/LLaVA-Instruct-150K"}, "give a .json or .jsonl file .* set format to messages"),
        ({"skip": 9}, "no rows left"),
        ({"max_characters": 0}, "number of characters"),
        ({"format": "table"}, "which column is the question"),
        ({"format": "table", "columns": {"question": "conversations"}, "turns": "all"}, "`turns` are those of"),
    ],
)
def test_wrong_configs_are_refused_with_a_remedy(tmp_path, changes, message):
    config = llava(tmp_path, [{"id": 1, "image": "x.png", "conversations": said("<image>\nWhat?", "a cat")}])
    with pytest.raises(ValueError, match=message):
        data.load_samples(config | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"question": "talk.value", "answers": "a"}}, "holds conversations.*set format to llava"),
        ({"columns": {"question": "q", "answers": "a"}, "prompt": "{question} {answers}"}, "tell the answer.*column a"),
        ({"columns": {"question": "q", "answers": "a", "hint": "a"}, "prompt": "{hint}{question}"}, "tell the answer"),
        (
            {"columns": {"question": "q", "answers": "d.a", "kind": "d"}, "prompt": "{kind}{question}"},
            "tell the answer",
        ),
        (
            {"columns": {"question": "q", "answers": "a", "h": "h", "x": "a"}, "optional": {"h": "{x}"}},
            "{x} is column a",
        ),
    ],
)
def test_a_table_whose_prompt_would_tell_the_answer_is_refused(tmp_path, changes, message):
    row = {"q": "What?", "a": "cat", "d": {"a": "cat"}, "h": "look", "talk": said("What?", "a cat")}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        data.load_samples({"path": str(tmp_path / "train.jsonl")} | changes)


def test_encode_renders_the_history_through_any_template(processor):
    sample = data.Sample("x", [picture()], "Why?", ["so"], [], "all", [("What?", "a cat")], "Be brief.")
    assert prompts(processor, [sample]) == ["[system]Be brief.[user]<image>What?[assistant]a cat[user]Why?[assistant]"]
    plain = (
        "{% for m in messages %}{{ m.role.upper() }}: {% for p in m.content %}{{ '<image>' if p.type == 'image' else "
        "p.text }}{% endfor %} {% endfor %}ASSISTANT:"
    )
    bare = spelling_processor()
    bare.chat_template = None
    told = "SYSTEM: Be brief. USER: <image>What? ASSISTANT: a cat USER: Why? ASSISTANT:"
    assert prompts(bare, [sample], plain) == [told]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<image>{{ messages[-1].content[0].text }}", "leaves the system's 'Be brief.' of sample 'x' out"),
        ("{{ raise_exception('no system prompts') }}", "does not take sample 'x': no system prompts"),
        ("{{ messages[0].content + '' }}", "does not take sample 'x'"),
    ],
)
def test_a_template_that_loses_part_of_the_chat_is_refused(processor, template, message):
    sample = data.Sample("x", [picture()], "Why?", ["so"], [], "all", [("What?", "a cat")], "Be brief.")
    with pytest.raises(ValueError, match=message):
        data.encode(processor, [sample], template)


def test_marks_must_be_as_many_as_images():
    sample = data.Sample("x", [picture()], "<image> or <image>?", ["so"], [], "all")
    with pytest.raises(ValueError, match="sample 'x' has <image> 2 times for 1 images"):
        sample.messages()
