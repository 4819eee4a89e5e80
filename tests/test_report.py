from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from browser import check_quiet, chromium, needs_browser
from PIL import Image
from promises import promise_record

from dyvte.evaluation.metrics import build_metric
from dyvte.evaluation.summary import summarise
from dyvte.promise import Promise
from dyvte.report.examples import example_cards
from dyvte.report.figures import plot_exit_layers
from dyvte.report.page import report
from dyvte.report.runs import read_run
from dyvte.report.tradeoff import pareto_front as front
from dyvte.report.tradeoff import policy_families as families

LAYERS = 4
KINDS = ("none at all", "one_spot")


def write_run(folder, policies, timed=True, scored=True, samples=12):
    """A folder as evaluate() leaves it; policies: name -> exit layer of sample i; wrong below the layer i % 4 needs."""
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    rows = {}
    for name, exit_of in {"dense": lambda i: LAYERS, **policies}.items():
        rows[name] = []
        for i in range(samples):
            layer, need = exit_of(i), 1 + i % 3
            answer = "red" if layer >= need else "blue <b>"
            row = {"id": f"s{i}", "kind": KINDS[i % 2], "question": f"What & <why> {i}?", "answer": answer, "ids": [1]}
            row |= {"answers": ["red"] if scored else [], "choices": [], "exit_layer": layer, "index": i}
            row |= {"agrees": layer >= need, "flops": 10 + 10 * layer, "kv_bytes": 5 + layer}
            rows[name].append(row | {"text_tokens": 5, "visual_tokens": 100})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    for i in range(samples):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(folder / "images" / f"{i}.png")
    summaries = {name: summarise(build_metric("exact_match"), r, rows["dense"], LAYERS) for name, r in rows.items()}
    seconds = {"dense": 0.2, "exit": 0.1}
    timing = {
        "prefill_ratio": 0.5,
        "decoder_ratio": 0.4,
        "prefill_seconds": seconds,
        "decode_seconds": seconds,
        "batch_size": 4,
    }
    for name, summary in summaries.items():
        summary["timing"] = timing if timed and name != "dense" else None
    model = {"class": "TinyLlava", "dtype": "float32", "weights": "0"}
    settings = {"model": model, "model_name": None, "metric": "exact_match", "batch_size": 4, "max_new_tokens": 2}
    content = {
        "settings": settings,
        "versions": {"dyvte": "0"},
        "hardware": {"device": "cpu", "name": "a processor", "threads": 1, "system": "Linux"},
        "layers": LAYERS,
        "policies": summaries,
    }
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


POLICIES = {
    "fixed-1": lambda i: 1,
    "fixed-3": lambda i: 3,
    "learned@0.9": lambda i: 1 + i % 3,
    "learned@0.5": lambda i: 1 + i % 2,
    "oracle": lambda i: 1 + i % 3,
    "random-0.1": lambda i: 1 + i % 4,
}


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.text = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.images.append(given["src"])
        self.links += [v for k, v in attrs if k in ("href", "src") and not v.startswith("data:")]

    def handle_data(self, data):
        self.text.append(data)


def decoded(source):
    return base64.b64decode(source.partition("base64,")[2])


def test_one_page_holds_everything_and_needs_no_other_file(tmp_path):
    run = write_run(tmp_path / "run", POLICIES)
    Promise.from_dict(promise_record()).write(run)
    path = report(run)
    page = Page(path)
    assert path == run / "report" / "report.html" and not page.links
    names = {p.stem for p in (run / "report").glob("*.svg")}
    tradeoffs = {"score-time", "score-flops", "changed-time", "changed-flops"}
    assert names == {*tradeoffs, "exit-layers", "risk", "reliability"} and (run / "report" / "examples.png").exists()
    drawings = [decoded(source) for source in page.images if source.startswith("data:image/svg+xml")]
    pictures = [decoded(source) for source in page.images if source.startswith("data:image/png")]
    assert len(drawings) == 7 and len(pictures) == 12 and len(page.images) == 19
    for drawing in drawings:
        texts = {text.text for text in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
        assert len(texts) > 3 and b"prefers-color-scheme: dark" in drawing  # text that can be read, in the dark too
    for picture in pictures:
        assert Image.open(io.BytesIO(picture)).size[0] >= 20
    text = " ".join(" ".join(page.text).split())
    for expected in (
        *POLICIES,
        "TinyLlava",
        "a processor",
        "× 0.50",
        "× 0.40",
        "What & <why> 0?",
        "8 of 12",
        "± ",
        "Answers stay the same in 100.0 % of 12 questions while 50 % of the layers' work on visual tokens is left out, "
        "and the first token takes 0.50 times as long.",
        "Per kind, learned@0.9",
    ):
        assert expected in text
    assert "<why>" not in re.sub(r"&lt;why&gt;", "", path.read_text())
    marked = re.findall(r'<tr class="main">\s*<th scope="row">(.*?)</th>', path.read_text())
    assert marked == ["learned@0.9"]


def test_what_a_dataset_says_is_text_everywhere(tmp_path, monkeypatch):
    evil = "<script>alert('$1$')</script>"
    monkeypatch.setitem(globals(), "KINDS", (evil, "$x_y$"))
    path = report(write_run(tmp_path / "run", POLICIES))
    assert "<script" not in path.read_text() and "&lt;script&gt;" in path.read_text()
    drawing = (path.parent / "exit-layers.svg").read_text()
    texts = [text.text for text in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert "<script" not in drawing and evil in texts and "$x y$" in texts


def test_runs_without_times_scores_or_exits(tmp_path):
    write_run(tmp_path / "a", {"fixed-2": lambda i: 2}, timed=False)
    write_run(tmp_path / "b", {}, timed=False, scored=False)
    write_run(tmp_path / "deep" / "c", {"learned": lambda i: 1 + i % 4}, scored=False)
    path = report(tmp_path, output=tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert path == tmp_path / "out" / "report.html"
    expected = {"a-score-flops.svg", "a-changed-flops.svg", "deep-c-exit-layers.svg", "exit-layers-by-task.svg"}
    assert expected <= names and "a-score-time.svg" not in names
    assert not any(name.startswith("b-") for name in names)  # there is nothing but the dense model
    report(tmp_path, output=tmp_path / "out")  # again, over the old one


def test_examples_show_every_kind_and_changed_answers(tmp_path):
    run = read_run(write_run(tmp_path / "run", POLICIES), tmp_path)
    assert run.main_policy() == "learned@0.9"
    cards = example_cards(run, "learned@0.5", count=6)
    assert len(cards) == 6 and [card["agrees"] for card in cards] == [True] * 4 + [False] * 2
    assert {card["kind"] for card in cards[:2]} == set(KINDS)
    assert cards[-1]["dense"] == "red" and cards[-1]["exit"] == "blue <b>"


def test_families_and_the_best_at_each_cost():
    assert families(["fixed-1", "fixed-2", "vtw", "learned@0.99", "fastv-3-50%"]) == {
        "fixed": [("fixed-1", "1"), ("fixed-2", "2")],
        "vtw": [("vtw", "")],
        "learned@0.99": [("learned@0.99", "0.99")],
        "fastv-3-50%": [("fastv-3-50%", "50%")],
    }
    assert list(families(["learned", "learned@0.5", "learned@0.9"])) == ["learned", "learned, swept"]
    points = [(0.2, 0.5), (0.4, 0.4), (0.5, 0.9), (1.0, 0.9)]
    assert front(points) == [(0.2, 0.5), (0.5, 0.9), (1.0, 0.9)]
    assert front(points, lower_is_better=True) == [(0.2, 0.5), (0.4, 0.4), (1.0, 0.4)]
    assert front([]) == []


def test_many_kinds_are_cut_to_the_largest():
    figure = plot_exit_layers({f"k{i}": [i + 1, 0, 3] for i in range(40)})
    assert len(figure.axes) == 16


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no summary.json .*`dyvte evaluate`"):
        report(tmp_path)
    run = write_run(tmp_path / "run", POLICIES)
    (run / "promise.json").write_text("{}")
    with pytest.raises(ValueError, match="promise.json: the promise has missing fields .*calibrate again"):
        report(run)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(880, False), (390, False), (390, True)])
def test_in_a_browser(tmp_path, width, dark):
    run = write_run(tmp_path / "a-run-of-a-task-with-a-rather-long-name", POLICIES)
    Promise.from_dict(promise_record()).write(run)
    with chromium(width, dark) as driver:
        driver.get(report(run).as_uri())
        figures = driver.find_elements("css selector", "figure img")
        scales = [figure.size["width"] / figure.get_property("naturalWidth") for figure in figures]
        assert len(figures) == 7 and min(12 * scale for scale in scales) > 10  # pixels of text of nine points
        channels = re.findall(r"\d+", driver.find_element("tag name", "body").value_of_css_property("background-color"))
        assert (sum(map(int, channels[:3])) < 150) == dark
        check_quiet(driver)
