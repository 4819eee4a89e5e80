"""Every damage known from the wild is named with sample, file and reason, and costs no more than its sample."""

from __future__ import annotations

import io
import json
import pickle
import random

import datasets
import pytest
from data_files import llava, picture, said
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

from dyvte import data

ASKED = ["<image>\nWhat is this?", "a cat"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def noise(kind: str, **options) -> bytes:
    """A picture that no format can squeeze into a few bytes."""
    rng, out = random.Random(0), io.BytesIO()
    Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3)).save(out, kind, **options)
    return out.getvalue()


def row(name: str = "coco/train2017/1.jpg", talk: list | None = None, **changes) -> dict:
    return {"id": "bad", "image": name, "conversations": said(*(talk or ASKED))} | changes


JPEG, PNG = noise("JPEG"), noise("PNG")
FILE = {"no file": None, "empty": b"", "no picture": b"<html>404</html>"}
FILE |= {"JPEG cut off": JPEG[: len(JPEG) // 2], "JPEG without its end": JPEG[:-2]}
FILE |= {"progressive JPEG cut off": noise("JPEG", progressive=True)[:2000], "JPEG header": JPEG[:20]}
FILE |= {"PNG cut off": PNG[: len(PNG) // 2], "PNG header": PNG[:10], "GIF cut off": noise("GIF")[:3000]}
FILE |= {"PNG with other bytes": PNG[:4000] + bytes(40) + PNG[4040:], "WebP cut off": noise("WEBP")[:1000]}
REASONS = {"no file": "there is no such file", "empty": "not a picture", "no picture": "not a picture"}


@pytest.mark.parametrize("damage", FILE)
def test_a_damaged_picture_is_named(damage, tmp_path):
    config = llava(tmp_path, [row()])
    file = tmp_path / "images/coco/train2017/1.jpg"
    file.unlink()
    if FILE[damage] is not None:
        file.write_bytes(FILE[damage])
    samples = data.load_samples(config)
    with pytest.raises(data.SampleError, match=REASONS.get(damage, "broken at its beginning|cannot be read")) as error:
        samples[0]
    assert (error.value.sample_id, error.value.file) == ("bad", str(file))


ROWS = {
    "no answer": (row(talk=[ASKED[0], None]), "the answer of turn 1 is empty"),
    "blank answer": (row(talk=[ASKED[0], " \n"]), "the answer of turn 1 is empty"),
    "only a question": (row(talk=[ASKED[0]]), "no question is answered"),
    "blank question": (row(talk=["<image>\n", "a cat"]), "the question of turn 1 is empty"),
    "no mark": (row(talk=["What?", "a cat"]), "<image> stands 0 times for 1 images"),
    "two marks": (row(talk=["<image><image>What?", "a cat"]), "<image> stands 2 times for 1 images"),
    "mark without image": (row(None), "<image> stands 1 times for 0 images"),
    "mark in the answer": (row(talk=[ASKED[0], "<image>"]), "<image> in a text that is not the user's"),
    "very long": (row(talk=[ASKED[0], "word " * 50_000]), "250,0.. characters of text, more than the 100,000"),
    "half a surrogate": (row(talk=["<image>\n\ud83d", "a cat"]), "half a surrogate pair"),
    "answer first": (row(conversations=said(*ASKED)[::-1]), "do not alternate: assistant, user"),
    "two questions": (row(conversations=said(*ASKED, "Eh?")[::2]), "do not alternate: user, user"),
    "a tool": (row(conversations=[*said(*ASKED), {"from": "tool", "value": "{}"}]), "a message by 'tool'"),
    "no list": (row(conversations="What?"), "the row has no conversation"),
    "no mappings": (row(conversations=["What?", "a cat"]), "a message is a mapping, not str"),
    "a number": (row(talk=[ASKED[0], 7]), "the text of a message is int"),
    "a video": (row(conversations=[{"role": "user", "content": [{"type": "video"}]}]), "text or image, not 'video'"),
    "no file name": (row({"name": "x"}), "an image is a picture"),
    "another row": (["not", "a row"], "a row is a mapping, not list"),
}


@pytest.mark.parametrize("turns", ["first", "all"])
@pytest.mark.parametrize("damage", ROWS)
def test_a_damaged_row_is_named_and_costs_no_other(damage, turns, tmp_path):
    bad, reason = ROWS[damage]
    good = row("gqa/images/2.jpg", id="good")
    config = llava(tmp_path, [good, row()]) | {"turns": turns}
    (tmp_path / "mix.json").write_text(json.dumps([good, bad, good]))
    samples = data.load_samples(config)
    name = ("bad" if isinstance(bad, dict) else "1") + "@1" * (turns == "all")
    with pytest.raises(data.SampleError, match=reason) as error:
        samples[1]
    assert (error.value.sample_id, error.value.file) == (name, config["path"])
    assert str(error.value).startswith(f"sample '{name}' ({config['path']}): ")
    assert samples[0].answers == samples[2].answers == ["a cat"]


def test_an_empty_answer_spoils_the_turns_after_it_alone(tmp_path):
    talk = [*ASKED, "Sure?", "", "Really?", "yes"]
    samples = data.load_samples(llava(tmp_path, [row(talk=talk)]) | {"turns": "all"})
    readable = data.Readable(samples, "skip")
    assert [sample.id for _, sample in readable] == ["bad@1"]
    assert {error.reason for error in readable.skipped.values()} == {"the answer of turn 2 is empty"}


def test_readable_pictures_that_look_odd(tmp_path):
    config = llava(tmp_path, [row()])
    file = tmp_path / "images/coco/train2017/1.jpg"
    frames = [picture(i).quantize() for i in (200, 3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    image = data.load_samples(config)[0].images[0]
    assert image.mode == "RGB" and abs(image.getpixel((0, 0))[0] - 200) < 9  # the first frame
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(size=(24, 18)).save(file, "JPEG", exif=exif)
    assert data.load_samples(config)[0].images[0].size == (18, 24)
    Image.new("I;16", (4, 4), 40_000).save(file, "PNG")
    with pytest.raises(data.SampleError, match="a picture of mode I;16"):
        data.load_samples(config)[0]


def test_pillow_must_not_fill_up_pictures(tmp_path, monkeypatch):
    samples = data.load_samples(llava(tmp_path, [row()]))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="set it to False") as error:
        samples[0]
    assert not isinstance(error.value, data.SampleError)  # so that no reader skips it


def test_wrong_json(tmp_path):
    config = llava(tmp_path, [row()])
    file = tmp_path / "mix.json"
    whole = file.read_bytes()
    for text, message in (
        (whole[:-30], "mix.json is not valid JSON: .* column"),
        (whole[:40] + b"\xff" + whole[40:], "mix.json is not valid JSON"),
        (b"", "neither a list of rows nor one row on each line"),
        (b"{\n1", "neither a list of rows nor one row on each line: line 1 is not valid JSON"),
        (b"[]", "none of the 0 rows"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            data.load_samples(config)
    line = json.dumps(row()).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + line[:-5] + b"\n\n" + line)
    samples = data.load_samples(config)
    with pytest.raises(data.SampleError, match=r"sample '1' .*line 2 is not valid JSON"):
        samples[1]
    assert [samples[0].id, samples[2].id] == ["bad", "bad#2"]


@pytest.fixture
def damaged(tmp_path):
    """Ten rows; 2, 5 and 6 cannot be used."""
    rows = [row(f"coco/train2017/{i}.png", id=i) for i in range(10)]
    rows[5]["conversations"] = said(ASKED[0], None)
    config = llava(tmp_path, rows)
    (tmp_path / "images/coco/train2017/2.png").unlink()
    file = tmp_path / "images/coco/train2017/6.png"
    file.write_bytes(file.read_bytes()[:90])
    return data.load_samples(config)


def test_damage_is_skipped_and_recorded(damaged, tmp_path):
    readable = data.Readable(damaged, on_error="skip", max_errors=3)
    assert [index for index, sample in readable] == [0, 1, 3, 4, 7, 8, 9]
    assert [(index, sample.id) for index, sample in readable.at([7, 6, 1])] == [(7, "7"), (1, "1")]
    record = json.loads(json.dumps(readable.record()))  # read three times, recorded once
    assert [(line["index"], line["id"]) for line in record] == [(2, "2"), (5, "5"), (6, "6")]
    assert record[0]["file"].endswith("images/coco/train2017/2.png") and record[1]["file"].endswith("mix.json")
    assert record[0]["reason"] == "there is no such file" and "truncated" in record[2]["reason"]


def test_damage_stops_where_it_should(damaged):
    read = []
    with pytest.raises(data.SampleError, match="sample '2'"):
        read.extend(index for index, _ in data.Readable(damaged))
    assert read == [0, 1]
    with pytest.raises(data.TooManyErrors, match="3 samples cannot be used, and max_errors allows 2.*sample '6'"):
        list(data.Readable(damaged, "skip", max_errors=2))
    for wrong in ({"on_error": "ignore"}, {"max_errors": -1}, {"max_errors": None}):
        with pytest.raises(ValueError, match="must be"):
            data.Readable(damaged, **wrong)


def test_errors_travel_between_processes(damaged):
    with pytest.raises(data.SampleError) as error:
        damaged[2]
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.file) == (str(error.value), error.value.file)
    many = pickle.loads(pickle.dumps(data.TooManyErrors([again], 0)))
    assert "max_errors allows 0" in str(many)


def test_damage_in_a_table(tmp_path):
    def stored(content: bytes | None) -> dict:
        return {"bytes": content, "path": "1.png"}

    pictures = [[stored(PNG)], [stored(PNG), stored(PNG[:9000])], [], [stored(PNG)], [stored(PNG)]]
    answers = ["a", "a", "a", None, "a"]
    questions = ["<image> or not?", "Which?", "Which?", "Which?", "<image> or <image>?"]
    features = Features({"p": List(ImageFeature()), "q": Value("string"), "a": Value("string")})
    table = datasets.Dataset.from_dict({"p": [[]] * 5, "q": questions, "a": answers}, features)
    raw = datasets.Dataset.from_dict({"p": pictures}, Features({"p": List(ImageFeature(decode=False))}))
    table = datasets.concatenate_datasets([table.remove_columns("p"), raw.cast(Features({"p": features["p"]}))], axis=1)
    table.to_parquet(tmp_path / "train.parquet")
    columns = {"image": "p", "question": "q", "answers": "a"}
    readable = data.Readable(data.load_samples({"path": str(tmp_path), "columns": columns}), "skip")
    assert [index for index, _ in readable] == [0]
    assert {index: error.reason for index, error in readable.skipped.items() if index != 1} == {
        2: "the row has no image",
        3: "the answer is empty",
        4: "<image> stands 2 times for 1 images",
    }
    assert "truncated" in readable.skipped[1].reason and readable.skipped[1].file == "1.png"
    assert readable.skipped[2].file == str(tmp_path)


def test_an_image_missing_from_another_table(tmp_path):
    for name, rows in (
        ("images", [{"key": "n1", "file": "1.png"}]),
        ("asked", [{"on": "n1", "q": "?"}, {"on": "n2", "q": "?"}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    picture().save(tmp_path / "1.png")
    config = {"path": str(tmp_path), "name": "asked", "split": "train", "columns": {"question": "q"}}
    config["images"] = {"name": "images", "key": "key", "image": "file", "reference": "on"}
    samples = data.load_samples(config)
    assert samples[0].images
    with pytest.raises(data.SampleError, match="image 'n2' is missing"):
        samples[1]
    with pytest.raises(ValueError, match="holds none of the images that column on names, such as 'n1'"):
        data.load_samples(config | {"images": config["images"] | {"key": "file"}})
