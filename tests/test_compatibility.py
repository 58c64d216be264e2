"""Tests of the workarounds' docstrings: four headings, and an existing test."""

import re

import pytest
from utils import ROOT

from internimage_hf import compatibility


@pytest.mark.parametrize("name", compatibility.__all__)
def test_each_workaround_says_when_it_can_be_deleted(name):
    text = getattr(compatibility, name).__doc__
    for heading in ("Fault: ", "Versions: ", "Test: ", "Delete when: "):
        assert heading in text
    file, test = re.search(r"Test: `(.+?)::(\w+)`", text).groups()
    assert f"def {test}(" in (ROOT / file).read_text()
