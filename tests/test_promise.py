"""The record of a promise: what it says, and what it refuses to be."""

from __future__ import annotations

import json

import pytest
from promises import promise_record

from dyvte import ExitHeads, ExitHeadsConfig
from dyvte.promise import Promise, boldest_safe


def test_the_first_failure_ends_the_search():
    assert boldest_safe([0.001, 0.004, 0.02, 0.003], 0.01) == 1
    assert boldest_safe([0.001, 0.004], 0.01) == 1
    assert boldest_safe([0.02, 0.001], 0.01) is None


def test_what_it_says_and_another_risk_of_the_same_curve(tmp_path):
    promise = Promise.from_dict(promise_record())
    assert promise.setting == {"learned.threshold": 0.9} and promise.of_method("learned") == {"threshold": 0.9}
    assert (promise.risk, promise.bound, promise.saved) == (0.01, 0.02, 0.4)
    promise.write(tmp_path)
    assert Promise.read(tmp_path) == promise and promise.as_dict() == promise_record()
    assert promise.with_risk(0.01).chosen == 0 and promise.with_risk(0.5).chosen == 2
    with pytest.raises(ValueError, match="1000 calibration samples cannot show a risk as low as 0.001"):
        promise.with_risk(0.001)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        promise.with_risk(1)


def test_other_weights_are_refused():
    promise = Promise.from_dict(promise_record())
    promise.check_weights("0" * 64, "some/model")
    with pytest.raises(ValueError, match="about other weights .*other_weights=True"):
        promise.check_weights("f" * 64, "some/model")


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        ("alpha", 0, "alpha must lie strictly"),
        ("alpha", True, "alpha must lie strictly"),
        ("samples", 2.5, "samples must be how many"),
        ("methods", "learned", "methods must be names"),
        ("chosen", 2, "setting 2 is not the boldest"),
        ("chosen", 0, "setting 0 is not the boldest"),
        ("rule", "by eye", "its rule 'by eye'"),
        ("content", 3, "content must be text or null"),
        ("shared_images", -1, "shared_images must be a count"),
        ("identity", {"weights": "0"}, "identity must hold weights, processor, dtype, attention"),
        ("reliability", {"confidence": [1], "frequency": [0, 1], "count": [0]}, "lists of one length"),
        ("reliability", {"confidence": [1], "frequency": [2], "count": [0]}, "shares and counts"),
        ("reliability", {"confidence": []}, "reliability has missing fields"),
        ("curve", [], "the curve is no record but list"),
        ("curve.settings", {}, "the curve has no settings"),
        ("curve.settings", {"fastv.keep": [1, 1, 1]}, "belongs to none of the methods"),
        ("curve.settings", {"learned.threshold": [1, 1]}, "lists of one length"),
        ("curve.risk", [0, 0.01, float("nan")], "risk must be shares"),
        ("curve.bound", [0.01, 0.009, 0.3], "bound of the curve lies below its risk"),
        ("curve.risk", [0, 0.0101234, 0.2], "no share of 1000 samples"),
        ("curve.colour", [0, 0, 0], "unknown fields ['colour']"),
        ("colour", "red", "unknown fields ['colour']"),
        ("delta", None, "delta must lie strictly"),
    ],
)
def test_nonsense_is_refused(place, value, match):
    record = promise_record()
    *outer, last = place.split(".")
    (record[outer[0]] if outer else record)[last] = value
    with pytest.raises(ValueError) as error:
        Promise.from_dict(record)
    assert match in str(error.value) and "calibrate again" in str(error.value)


@pytest.mark.parametrize("name", promise_record())
def test_nothing_may_be_missing(name):
    record = promise_record()
    del record[name]
    with pytest.raises(ValueError, match=f"missing fields \\['{name}'\\]"):
        Promise.from_dict(record)


def test_heads_hold_it_and_no_other_threshold(tmp_path):
    sizes = {"num_layers": 4, "hidden_size": 8, "width": 4}
    config = ExitHeadsConfig(**sizes, threshold=0.9, calibration=promise_record())
    assert config.promise == Promise.from_dict(promise_record())
    with pytest.raises(ValueError, match="threshold 0.5 is not the one that was promised"):
        ExitHeadsConfig(**sizes, threshold=0.5, calibration=promise_record())
    ExitHeads(config).save_pretrained(tmp_path)
    assert ExitHeads.from_pretrained(tmp_path).config.promise == config.promise
    content = json.loads((tmp_path / "config.json").read_text())
    content["calibration"]["curve"]["bound"][1] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not the boldest that keeps the risk below 0.02; it was changed by hand"):
        ExitHeads.from_pretrained(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(ValueError, match="no promise.json .*dyvte calibrate"):
        Promise.read(tmp_path)
