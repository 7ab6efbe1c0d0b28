"""Answers in an asked form."""

from __future__ import annotations

import pytest

from opd.prompts import Prompt
from opd.verifiers.json_object import JsonObject


@pytest.mark.parametrize(
    ("text", "any_object", "with_keys"),
    [
        (' {"answer": "Lisbon", "topic": "geography"}\n', 1, 1),
        ('{"answer": 4, "topic": ["a"]}', 1, 1),
        ('{"answer": "Lisbon"}', 1, 0),
        ('{"answer": "Lisbon", "topic": "geography", "sure": true}', 1, 0),
        ('{"answer": "", "topic": "geography"}', 1, 0),
        ('{"answer": null, "topic": "geography"}', 1, 0),
        ('Sure: {"answer": "Lisbon", "topic": "geography"}', 0, 0),
        ('{"answer": "Lisbon", "topic": "geography"} That is all.', 0, 0),
        ('{"answer": "Lisbon", "topic": "geo', 0, 0),
        ('["answer", "topic"]', 0, 0),
        ("Lisbon", 0, 0),
        ("", 0, 0),
        ("[" * 100_000, 0, 0),
    ],
)
def test_one_object_and_nothing_else(text, any_object, with_keys):
    prompt = Prompt("a", {"prompt": "x"})
    assert JsonObject().score(prompt, text) == any_object
    assert JsonObject(keys=["answer", "topic"]).score(prompt, text) == with_keys
