"""Every image-text-to-text type of transformers fares as the account says."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import transformers
from zoo import MAPPING
from zoo_account import PAGE, RECORD, examine, page

ACCOUNT = json.loads(RECORD.read_text())
RECORDED = transformers.__version__ == ACCOUNT["transformers"]


@pytest.mark.parametrize("name", MAPPING)
def test_type(name):
    account = examine(name).entry()
    assert account["outcome"] != "wrong", account
    if RECORDED:
        assert account == ACCOUNT["types"][name]


@pytest.mark.skipif(not RECORDED, reason="the account is of another version of transformers")
def test_every_type_is_accounted_for():
    assert set(ACCOUNT["types"]) == set(MAPPING)
    assert Counter(entry["outcome"] for entry in ACCOUNT["types"].values())["exact"] >= 60
    assert all(entry.get("why") for entry in ACCOUNT["types"].values() if entry["outcome"] != "exact")


def test_the_page_shows_the_account():
    assert PAGE.read_text() == page(ACCOUNT["types"])
