"""What users get wrong: each of these command lines ends with fault and remedy, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
from string import Template

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import LAYERS, save_tiny_llava

from dyvte import ExitHeads, ExitHeadsConfig
from dyvte.cli.faults import faults
from dyvte.cli.main import main
from dyvte.training.lock import one_run

DATA = "data.scenes.split=dev data.scenes.n=4"
MODEL = "model=$MLLM dtype=float32 max_new_tokens=2"
TRACE = f"trace {MODEL} output=$OUT"
EVALUATE = f"evaluate {MODEL} output=$OUT"
FIT = "fit traces=$TRACES calibration=$TRACES output=$OUT"
TRAIN = "train model=m data=d held_out=h output=$OUT"
CALIBRATE = "calibrate traces=$TRACES"
CONVERT = "convert base_model=m output=$OUT"
TABLE = "data.columns={image: image, question: question, answers: answer, id: id}"

# Whatever is wrong with the words alone.
WORDS = [
    ("trian", "did you mean train?"),
    ("zzz", "there is no command 'zzz': choose from demo, trace"),
    ("app port=99999", "port must be 1 or more and at most 65535, not 99999"),
    ("trace --verbose", "--verbose has no value"),
    ("trace -x", "'-x' is not key=value"),
    ("trace model=m oops", "'oops' is not key=value"),
    ("trace =5", "no config file =5"),
    ("trace seed=", "seed has no value"),
    ("trace", "needs model, data, output"),
    ("report", "needs directory"),
    ("convert", "needs weights, base_model, output"),
    (f"{TRACE} {DATA} btach_size=3", "did you mean batch_size?"),
    (f"{TRACE} {DATA} colour=red", "choose from"),
    (f"{TRAIN} fit.epoch=3", "did you mean fit.epochs?"),
    (f"{TRAIN} epochs=3", "did you mean fit.epochs?"),
    (f"{TRAIN} fit.zzz=3", "choose from form, width"),
    (f"{TRAIN} model.layers=3", "model is 'm' and has no keys"),
]
FILES = [
    ("trace nowhere.yaml", "there is no config file nowhere.yaml"),
    ("trace $TMP", "is a folder: give a YAML file"),
    ("trace $TMP/syntax.yaml", "is not YAML, line 2"),
    ("trace $TMP/tabs.yaml", "is not YAML"),
    ("trace $TMP/list.yaml", "must hold a mapping"),
    ("trace $TMP/text.yaml", "must hold a mapping"),
    ("trace $TMP/twice.yaml", "'model' is there twice"),
    ("trace $TMP/binary.yaml", "cannot be read"),
    ("trace $TMP/tag.yaml", "is not YAML"),
    ("trace $TMP/unknown.yaml", "unknown key colour"),
    ("trace $TMP/null.yaml", "needs model, data, output"),
    (f"{TRACE} data=nowhere.yaml", "there is no data config nowhere.yaml"),
    (f"{TRACE} data=$TMP", "is a folder"),
    (f"{TRACE} data=$TMP/list.yaml", "must hold a mapping"),
    (f"{TRACE} data=$TMP/syntax.yaml data.limit=3", "is not YAML"),
    (f"{FIT} fit=nowhere.yaml fit.lr=1", "there is no file of fit nowhere.yaml"),
    (f"{TRACE} 'data={{scenes: '", "the value of data is not YAML"),
]
VALUES = [
    (f"{TRACE} {DATA} {pair}", fault)
    for pair, fault in [
        ("batch_size=0", "batch_size must be 1 or more"),
        ("batch_size=-1", "batch_size must be 1 or more"),
        ("batch_size=1.5", "batch_size must be a whole number"),
        ("batch_size=many", "batch_size must be a whole number"),
        ("batch_size=nan", "batch_size must be a whole number"),
        ("max_new_tokens=0", "max_new_tokens must be 1 or more"),
        ("threads=0", "threads must be 1 or more"),
        ("unit_size=0", "unit_size must be 1 or more"),
        ("unit_size=33", "unit_size must be 1 ... 32"),
        ("seed=x", "seed must be a whole number"),
        ("exits=x", "exits must be a whole number, a list of whole numbers or null"),
        ("exits=0", "exit"),
        ("exits=[99]", "exit"),
        ("exits=[]", "exit"),
        ("answers=mine", "answers must be one of dense, dataset"),
        ("on_error=ignore", "on_error must be one of stop, skip"),
        ("max_errors=-1", "max_errors must be 0 or more"),
        ("dtype=int8", "dtype must be one of auto, float32"),
        ("device=gpu", "device must be cpu, cuda"),
        ("device=cuda", "GPUs"),
        ("device=cuda:99", "GPUs"),
        ("attention=zzz", "cannot be loaded"),
        ("quantization=4", "quantization must be a mapping"),
        ("plan=maybe", "plan must be true or false"),
    ]
] + [
    (f"{FIT} {pair}", fault)
    for pair, fault in [
        ("alpha=0", "alpha must be above 0 and below 1"),
        ("alpha=1", "alpha must be above 0 and below 1"),
        ("alpha=-1e-2", "alpha must be above 0 and below 1"),
        ("alpha=.nan", "alpha must be above 0 and below 1"),
        ("alpha=little", "alpha must be a number above 0 and below 1 or null"),
        ("delta=1", "delta must be above 0 and below 1"),
        ("shared_images=perhaps", "shared_images must be true or false"),
        ("fit.epochs=0", "fit.epochs must be 1 or more"),
        ("fit.lr=0", "fit.lr must be above 0"),
        ("fit.lr=.inf", "fit.lr must be above 0"),
        ("fit.dropout=1", "fit.dropout must be 0 or more and below 1"),
        ("fit.validation=1", "fit.validation must be above 0 and below 1"),
        ("fit.guard=2", "fit.guard must be above 0 and below 1"),
        ("fit.form=round", "fit.form must be one of shared, original"),
        ("fit.width=0", "fit.width must be 1 or more"),
        ("fit=3", "fit must be a mapping"),
    ]
]
SAMPLES = [
    (f"{TRACE} {pairs}", fault)
    for pairs, fault in [
        ("'data={}'", "needs one of `scenes"),
        ("'data={scenes: {}}'", "`scenes` must be a mapping with split and n"),
        ("'data={scenes: 3}'", "`scenes` must be a mapping with split and n"),
        (f"{DATA} data.path=x", "needs one of `scenes"),
        (f"{DATA} data.limt=3", "unknown keys ['limt'] in the data config"),
        (f"{DATA} data.limit=0", "limit must be a number of samples"),
        (f"{DATA} data.limit=x", "limit must be a number of samples"),
        (f"{DATA} data.scenes.split=x", "split"),
        (f"{DATA} data.scenes.n=0", "scenes.n must be a number of samples"),
        (f"{DATA} data.scenes.n=1.5", "scenes.n must be a number of samples"),
        (f"{DATA} data.scenes.seed=x", "scenes.seed must be a whole number"),
        (f"{DATA} data.scenes.kinds=[zzz]", "unknown question kinds"),
        (f"{DATA} data.scenes.kinds=3", "scenes.kinds must be a list"),
        (f"{DATA} data.scenes.style=zzz", "style"),
        (f"{DATA} data.max_new_tokens=0", "max_new_tokens must be a number of tokens"),
        (f"{DATA} data.metric=3", "metric must be text"),
        (f"{DATA} data.prompt=3", "prompt must be text"),
        (f"{DATA} 'data.prompt={{colour}}'", "colour"),
        (f"{DATA} 'data.template={{% for %}}'", "the chat template does not take sample"),
        (f"{DATA} data.template=hello", "the chat template leaves the user's"),
        (f"{DATA} 'data.template={{{{ nothing.there }}}}'", "the chat template does not take sample"),
        (f"data.path=nowhere '{TABLE}'", "cannot load nowhere"),
        (f"data.path=$TMP/empty '{TABLE}'", "cannot load"),
        ("data.path=$TMP/rows.jsonl data.format=zzz", "format must be one of table, llava, messages"),
        ("data.path=$TMP/rows.jsonl data.fraction=2", "fraction must be a share"),
        ("data.path=$TMP/rows.jsonl data.fraction=0.5", "fraction needs a seed"),
        (f"data.path=$TMP/rows.jsonl '{TABLE}' data.skip=99 data.limit=1", "has no rows left"),
        ("data.path=$TMP/rows.jsonl 'data.columns={question: zzz}'", "zzz"),
        ("data.path=$TMP/rows.jsonl data.columns=3", "a mapping of image, question"),
        (f"data.path=$TMP/empty.jsonl '{TABLE}'", "cannot load"),
        (f"data.path=$TMP/junk.jsonl '{TABLE}'", "cannot load"),
        ("data.path=$TMP/llava.json data.format=llava", "not valid JSON"),
        (f"data.path=$TMP/rows.jsonl '{TABLE}'", "sample 'b'"),
        (f"data.path=$TMP/rows.jsonl '{TABLE}' on_error=skip max_errors=0", "sample 'b'"),
    ]
]
MODELS = [
    ("nowhere", "HF_HUB_OFFLINE"),
    ("some/model", "HF_HUB_OFFLINE"),
    ("$TMP/rows.jsonl", "cannot be loaded"),
    ("$TMP/empty", "cannot be loaded"),
    ("$TMP/config-junk", "cannot be loaded"),
    ("$TMP/config-other", "cannot be loaded"),
    ("$TMP/weights-truncated", "cannot be loaded"),
    ("$TMP/weights-junk", "cannot be loaded"),
    ("$TMP/weights-missing", "cannot be loaded"),
    ("$TMP/weights-lacking", "its weights lack 1 tensors"),
    ("$TMP/weights-misshapen", "cannot be loaded"),
    ("$TMP/processor-missing", "cannot be loaded"),
    ("$TMP/template-missing", "has no chat template"),
    ("$TMP/template-broken", "the chat template does not take sample"),
    ("$TMP/not-finite", "NaN"),
]
TRACED = [
    ("fit traces=nowhere output=$OUT alpha=null", "nowhere holds no traces"),
    ("fit traces=$TMP/rows.jsonl output=$OUT alpha=null", "holds no traces"),
    ("fit traces=$TMP/empty output=$OUT alpha=null", "holds no traces"),
    ("fit traces=[] output=$OUT alpha=null", "no trace folder"),
    ("fit traces=$TMP/record-junk output=$OUT alpha=null", "is damaged"),
    ("fit traces=$TMP/record-empty output=$OUT alpha=null", "another version of dyvte"),
    ("fit traces=$TMP/plan-missing output=$OUT alpha=null", "has no plan.json"),
    ("fit traces=$TMP/unit-truncated output=$OUT alpha=null", "units are damaged"),
    ("fit traces=$TMP/unit-flipped output=$OUT alpha=null", "units are damaged"),
    ("fit traces=$TMP/unit-missing output=$OUT alpha=null", "run `dyvte trace` again"),
    ("fit traces=$TMP/manifest-junk output=$OUT alpha=null", "units are damaged"),
    ("fit traces=$TRACES output=$OUT", "a promise needs held-out samples"),
    (f"{FIT} alpha=0.001", "cannot show a risk below 0.001"),
    (f"{FIT} alpha=0.5", "are those the heads were trained on"),
    ("train traces=$TRACES output=$OUT", "a promise needs held-out samples"),
    ("train model=$MLLM data=d output=$OUT", "held_out"),
    (f"{TRACE} {DATA} output=$TRACES", "holds traces made otherwise"),
    (CALIBRATE, "needs heads=FOLDER"),
    (f"{CALIBRATE} policy=best", "policy must be one of learned, vtw"),
    (f"{CALIBRATE} heads=nowhere", "heads=nowhere cannot be loaded"),
    (f"{CALIBRATE} heads=$HEADS alpha=null", "cannot be null"),
    (f"{CALIBRATE} heads=$HEADS alpha=0.001 output=$OUT", "cannot show a risk"),
    (f"{CALIBRATE} heads=$TMP/heads-other alpha=0.5 output=$OUT", "3 layers"),
    (f"{CALIBRATE} policy=vtw vtw.eta=-1", "eta must be"),
    (f"{CALIBRATE} policy=vtw vtw.eta=zzz", "there is no preset eta"),
    (f"{CALIBRATE} policy=vtw vtw.first=0", "vtw.first must be 1 or more"),
    (f"{CALIBRATE} policy=vtw vtw.first=99", "first must be an exit layer"),
    (f"{CALIBRATE} policy=vtw vtw.samples=999 vtw.first=1", "999 samples were asked for"),
    (f"{CALIBRATE} policy=vtw vtw.first=1 output=$TMP", "is a folder: name a file"),
]
COMPARED = [
    (f"{EVALUATE} {DATA} {pairs}", fault)
    for pairs, fault in [
        ("", "needs exit heads: set heads=FOLDER"),
        ("policies=3", "policies must be a mapping"),
        ("'policies={best: {}}'", "unknown policy 'best'"),
        ("'policies={1: {}}'", "unknown policy"),
        ("'policies={fixed: 3}'", "must have a mapping of settings"),
        ("'policies={fixed: {depth: 3}}'", "wrong settings for policy 'fixed'"),
        ("'policies={fixed: {layer: x}}'", "layer"),
        ("'policies={fixed: {layer: 0}}'", "layer"),
        ("'policies={fixed: {layer: 99}}'", "99"),
        ("'policies={fastv: {layer: 1, keep: 2}}'", "keep"),
        ("'policies={fastv: {layer: 1, keep: 0.5, exit: 3}}'", "exit of policy 'fastv' must name one policy"),
        ("'policies={random: {p: 2}}'", "p"),
        ("'policies={fixed-a/b: {layer: 1}}'", "policy names"),
        ("'policies={oracle: {}}'", "wrong settings for policy 'oracle'"),
        ("'policies={oracle: {traces: nowhere}}'", "nowhere holds no traces"),
        ("'policies={vtw: {traces: nowhere}}'", "nowhere holds no traces"),
        ("'policies={learned: {threshold: 2}}' heads=$HEADS", "threshold"),
        ("heads=nowhere", "heads=nowhere cannot be loaded"),
        ("heads=$TMP/heads-junk", "cannot be loaded"),
        ("heads=$TMP/heads-truncated", "cannot be loaded"),
        ("heads=$TMP/heads-other", "these heads fit a decoder of 3 layers"),
        ("heads=$TMP/rows.jsonl", "cannot be loaded"),
        ("metric=zzz 'policies={fixed: {layer: 1}}'", "zzz"),
        ("'policies={fixed: {layer: 1}}' output=$TMP/results-other", "is damaged"),
        ("'policies={fixed: {layer: 2}}' output=$RESULTS", "holds results made with another"),
        ("'policies={fixed: {layer: 1}}' output=$RESULTS data.scenes.n=3", "holds results made with another"),
        ("'policies={fixed: {layer: 1}}' output=$TMP/rows-junk", "fixed.jsonl is damaged"),
    ]
]
OTHERS = [
    ("report nowhere", "no summary.json in nowhere"),
    ("report $TMP/rows.jsonl", "no summary.json"),
    ("report $TMP/empty", "no summary.json"),
    ("report $TMP/summary-junk", "summary.json is damaged"),
    ("report $TMP/summary-empty", "summary.json is damaged"),
    ("report $TMP/rows-junk", "fixed.jsonl is damaged"),
    ("report $TMP/promise-junk", "promise.json"),
    ("report $TMP/promise-empty", "promise.json"),
    (f"{CONVERT} weights=nowhere", "there is no file nowhere"),
    (f"{CONVERT} weights=$TMP", "there is no file"),
    (f"{CONVERT} weights=$TMP/rows.jsonl", "holds no weights that can be read"),
    (f"{CONVERT} weights=$TMP/empty.safetensors", "holds no weights that can be read"),
    (f"{CONVERT} weights=$TMP/junk.safetensors", "holds no weights that can be read"),
    (f"{CONVERT} weights=$TMP/list.bin", "not a state dict"),
    (f"{CONVERT} weights=$TMP/code.bin", "holds no weights that can be read"),
    (f"{CONVERT} weights=$TMP/other.safetensors", "gates"),
    (f"{CONVERT} weights=$TMP/text.bin", "gates"),
    ("demo model=nowhere", "there is no checkpoint in nowhere"),
    ("demo heads=nowhere", "there is no checkpoint in nowhere"),
    ("demo per_kind=0", "per_kind must be 1 or more"),
    ("demo repeats=-1", "repeats must be 1 or more"),
    ("demo output=$TMP/rows.jsonl", "is a file"),
    (f"{TRACE} {DATA} output=$TMP/rows.jsonl", "is a file"),
    (f"{TRACE} {DATA} output=$TMP/rows.jsonl/deeper", "is a file"),
    (f"{TRACE} {DATA} output=/proc/traces", "/proc/traces"),
    (f"{FIT} output=$TMP/rows.jsonl", "is a file"),
    (f"{CALIBRATE} heads=$HEADS output=$TMP/rows.jsonl", "is a file"),
    (f"{EVALUATE} {DATA} output=$TMP/rows.jsonl", "is a file"),
    (f"inspect {MODEL} {DATA} output=$TMP/rows.jsonl", "is a file"),
    (f"{CONVERT} weights=$TMP/gates.safetensors output=$TMP/rows.jsonl", "is a file"),
    (f"{CONVERT} weights=$TMP/gates.safetensors output=/proc/heads", "choose another place"),
]
CASES = [*WORDS, *FILES, *VALUES, *SAMPLES, *TRACED, *COMPARED, *OTHERS]
CASES += [(f"{TRACE} {DATA} model={folder}", fault) for folder, fault in MODELS]


def edited(source: Path, target: Path, name: str, content: bytes | str | None) -> None:
    """A copy of a folder in which one file has another content, or is missing."""
    shutil.copytree(source, target)
    if content is None:
        (target / name).unlink()
    else:
        (target / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, its traces, heads and results; and in TMP whatever can be wrong with such things."""
    home = tmp_path_factory.mktemp("home")
    names = {name: home / name.lower() for name in ("MLLM", "TRACES", "HEADS", "RESULTS")} | {"TMP": home / "tmp"}
    mllm, traces, heads, results, tmp = names.values()
    save_tiny_llava(mllm)
    hidden = json.loads((mllm / "config.json").read_text())["text_config"]["hidden_size"]
    shape = {"hidden_size": hidden, "width": 4, "base_model": str(mllm)}
    ExitHeads(ExitHeadsConfig(num_layers=LAYERS, **shape)).save_pretrained(heads)
    run(f"{TRACE} {DATA} data.scenes.n=24 exits=2 output=$TRACES", names)
    run(f"{EVALUATE} {DATA} 'policies={{fixed: {{layer: 1}}}}' output=$RESULTS", names)

    (tmp / "empty").mkdir(parents=True)
    for name, text in {
        "syntax.yaml": "model: m\n  data: {",
        "tabs.yaml": "model:\n\t- m",
        "list.yaml": "[model, data]",
        "text.yaml": "model",
        "twice.yaml": "model: m\nmodel: n",
        "tag.yaml": "model: !!python/object/apply:os.getcwd []",
        "unknown.yaml": "model: m\ndata: d\noutput: o\ncolour: red",
        "null.yaml": "model: null\ndata:\noutput: ~",
        "empty.jsonl": "",
        "junk.jsonl": "{]",
        "llava.json": "[{]",
        "empty.safetensors": "",
        "junk.safetensors": "x" * 100,
    }.items():
        (tmp / name).write_text(text)
    (tmp / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    Image.new("RGB", (90, 90)).save(tmp / "a.png")
    (tmp / "b.png").write_bytes((tmp / "a.png").read_bytes()[:60])
    rows = [{"id": i, "image": str(tmp / f"{i}.png"), "question": "What?", "answer": "one"} for i in "ab"]
    (tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    weights = load_file(mllm / "model.safetensors")
    first = next(name for name in weights if "layers" in name)
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    whole = (mllm / "model.safetensors").read_bytes()
    edited(mllm, tmp / "config-junk", "config.json", "{]")
    edited(mllm, tmp / "config-other", "config.json", '{"model_type": "zzz"}')
    edited(mllm, tmp / "weights-truncated", "model.safetensors", whole[: len(whole) // 2])
    edited(mllm, tmp / "weights-junk", "model.safetensors", "junk")
    edited(mllm, tmp / "weights-missing", "model.safetensors", None)
    for name, changed in {
        "weights-lacking": {name: weight for name, weight in weights.items() if name != first},
        "weights-misshapen": weights | {first: torch.zeros(3, 3)},
        "not-finite": weights | {head: torch.full_like(weights[head], torch.nan)},
    }.items():
        edited(mllm, tmp / name, "model.safetensors", None)
        save_file(changed, tmp / name / "model.safetensors", metadata={"format": "pt"})
    edited(mllm, tmp / "processor-missing", "processor_config.json", None)
    edited(mllm, tmp / "template-missing", "chat_template.jinja", None)
    edited(mllm, tmp / "template-broken", "chat_template.jinja", "{% for x %}")

    unit = next(path for path in (traces / "units").iterdir() if path.suffix == ".arrow")
    data = unit.read_bytes()
    edited(traces, tmp / "record-junk", "provenance.json", "{]")
    edited(traces, tmp / "record-empty", "provenance.json", "{}")
    edited(traces, tmp / "plan-missing", "plan.json", None)
    edited(traces, tmp / "unit-truncated", f"units/{unit.name}", data[:100])
    edited(traces, tmp / "unit-flipped", f"units/{unit.name}", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    edited(traces, tmp / "unit-missing", f"units/{unit.stem}.json", None)
    edited(traces, tmp / "manifest-junk", f"units/{unit.stem}.json", "{]")

    edited(heads, tmp / "heads-junk", "config.json", "{]")
    edited(heads, tmp / "heads-truncated", "model.safetensors", "junk")
    ExitHeads(ExitHeadsConfig(num_layers=3, **shape)).save_pretrained(tmp / "heads-other")

    edited(results, tmp / "results-other", "config.json", "{]")
    edited(results, tmp / "rows-junk", "fixed.jsonl", "{]\n")
    edited(results, tmp / "summary-junk", "summary.json", "{]")
    edited(results, tmp / "summary-empty", "summary.json", "{}")
    edited(results, tmp / "promise-junk", "promise.json", "{]")
    edited(results, tmp / "promise-empty", "promise.json", "{}")

    torch.save([1, 2], tmp / "list.bin")
    torch.save({"gate": "text"}, tmp / "text.bin")
    torch.save(Path("x"), tmp / "code.bin")
    save_file({"x": torch.zeros(1)}, tmp / "other.safetensors")
    gates = {f"model.visual_gates_router.0.w{i}.weight": torch.ones(s) for i, s in ((1, (2, 4)), (2, (2, 2)))}
    save_file(gates, tmp / "gates.safetensors")
    return names


def run(line: str, names: dict[str, Path]) -> None:
    main(shlex.split(Template(line).safe_substitute(names)))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock" and not path.is_dir()}


def refused(line: str, names: dict[str, Path], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        run(line, names)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error[error.index("error: ") :]


def test_there_are_many():
    assert len(CASES) == len(set(CASES)) >= 120


@pytest.mark.parametrize(("line", "fault"), CASES, ids=range(len(CASES)))
def test_faults_are_named_and_leave_nothing(line, fault, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    before = files(places["MLLM"].parent)
    assert fault in refused(line, places | {"OUT": tmp_path / "out"}, capsys)
    assert files(places["MLLM"].parent) == before
    # A trace that stops at a sample has said what it is of, and goes on from there.
    started = {"provenance.json", "plan.json", "config.json"}
    assert {path.name for path in files(tmp_path)} <= started


def test_a_disk_that_is_full(places, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    heads, results = tmp_path / "heads", tmp_path / "results"
    shutil.copytree(places["HEADS"], heads)
    shutil.copytree(places["RESULTS"], results)
    before = files(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    for line in (
        f"{TRACE} {DATA}",
        f"{EVALUATE} {DATA} 'policies={{fixed: {{layer: 2}}}}'",
        "report $RESULTS",
        f"{CONVERT} weights=$TMP/gates.safetensors",
        f"{CALIBRATE} policy=vtw vtw.first=1 output=$OUT/vtw.json",
    ):
        error = refused(line, places | {"OUT": tmp_path / "out", "RESULTS": results}, capsys)
        assert "No space left on device" in error
        half = {path.name for path in files(tmp_path).keys() - before.keys()}
        assert not half & {"vtw.json", "report.html", "summary.json", "model.safetensors", "README.md"}, line
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_two_runs_cannot_work_in_one_folder(places, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with one_run(tmp_path / "out", "another run"):
        for line in (f"{TRACE} {DATA}", f"{EVALUATE} {DATA} 'policies={{fixed: {{layer: 2}}}}'"):
            assert "is in use by another run" in refused(line, places | {"OUT": tmp_path / "out"}, capsys)


def test_dollars_and_tags_in_questions(places, tmp_path, capsys):
    """And ids that are there twice, which are told apart."""
    questions = ["Costs $5 or $6?", "What is $x_{$?", "<script>alert(1)</script> $$", "100 % \\ of \u2028 {it}?"]
    rows = [{"id": "a", "image": str(places["TMP"] / "a.png"), "question": q, "answer": "$<b>$"} for q in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = places | {"OUT": tmp_path / "out", "ROWS": tmp_path / "rows.jsonl"}
    run(f"{EVALUATE} data.path=$ROWS '{TABLE}' 'policies={{fixed: {{layer: 1}}}}'", names)
    assert re.search(r"^dense +0.0 %", capsys.readouterr().out, re.MULTILINE)
    written = (tmp_path / "out" / "fixed.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["question"] for line in written.splitlines()] == questions
    run("report $OUT", names)
    page = (tmp_path / "out/report/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "Costs $5 or $6?" in page
    run(f"{EVALUATE} data.path=$ROWS '{TABLE}' 'policies={{fixed: {{layer: 1}}}}' --json", names)
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["policies"]["dense"]["n"] == 4
    assert (tmp_path / "out" / "fixed.jsonl").read_text(encoding="utf-8") == written


def test_interrupts_and_readers_that_leave(monkeypatch, capfd):
    for raised, code, text in (
        (KeyboardInterrupt, 130, "error: interrupted; the same command"),
        (BrokenPipeError, 1, ""),
    ):
        with pytest.raises(SystemExit) as stop, faults():
            raise raised
        assert stop.value.code == code and text in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="a fault of the program"), faults():
        raise RuntimeError("a fault of the program")
