"""The page for users of other trainers: what it says of opd's keys, values and defaults is so."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from opd.cli.main import app
from opd.plan import make_plan
from opd.recipe import all_keys, apply_override, parse_recipe
from tests.conftest import save_tiny

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
REST = {
    "student": {"model": "org/small"},
    "teacher": {"model": "org/large", "name": "reference"},
    "prompts": {"kind": "inline", "prompts": ["a"]},
    "verifier": "exact_match",
    "batch": {"group": 2},
}


def tables():
    """Every table: its rows, of which the first is the heading, as lists of cells."""
    for text in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines()]
        head, _, *body = rows
        yield head, [[*row, *[""] * (len(head) - len(row))] for row in body]


def said():
    """What stands in backticks where the page speaks of opd."""
    general = PAGE.partition("## What changes")[2].partition("## Defaults")[0].partition("\nTrainers that")[0]
    cells = [cell for head, body in tables() if head[1:] == ["opd", "what differs"] for row in body for cell in row[1:]]
    spans = [span for text in (general, *cells) for span in re.findall(r"`([^`]+)`", " ".join(text.split()))]
    return sorted(set(spans))


@pytest.mark.parametrize("span", said())
def test_what_the_page_names_exists(span):
    if span.startswith("opd "):
        assert span.split()[1] in {command.name or command.callback.__name__ for command in app.registered_commands}
    elif ": " in span:
        key, _, value = span.partition(": ")
        data = copy.deepcopy(REST)
        apply_override(data, f"{key}={value}")
        parse_recipe(data)
    else:
        assert span in all_keys()


def test_the_page_has_tables_of_each_trainer():
    heads = [head[0] for head, _ in tables()]
    assert [heads.count(name) for name in ("TRL", "verl", "ms-swift")] == [3, 1, 1]
    assert len(said()) > 100


def test_defaults_are_those_of_a_recipe():
    ((_, body),) = [(head, body) for head, body in tables() if head[0] == "key"]
    recipe = parse_recipe({key: REST[key] for key in ("student", "teacher", "prompts")}).dump()
    checked = 0
    for first, ours, *_ in body:
        for key in re.findall(r"^`([^`]+)`", first):
            value = recipe
            for part in key.split("."):
                value = value[part]
            assert json.dumps(value).strip('"') == ours, key
            checked += 1
    assert checked >= 10


def examples():
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S):
        recipe = yaml.safe_load(text)
        yield pytest.param(recipe, id=recipe["name"])


@pytest.mark.parametrize("data", examples())
def test_examples_can_be_planned(data, tmp_path):
    """With tiny models and prompts in place of theirs, whose names need a network."""
    model = save_tiny(tmp_path / "model")
    data["student"] |= {"model": model, "template": "plain"}
    teacher = data["teacher"]
    teacher |= {"template": "plain"} | ({"tokenizer": model} if teacher.get("kind") == "served" else {"model": model})
    inline = {"kind": "inline", "prompts": ["abc", "defgh", "i", "jk"]}
    data["prompts"] = inline
    evaluation = data.setdefault("evaluation", {"held_out": 1})
    if "prompts" in evaluation:
        evaluation["prompts"] = inline
    assert make_plan(parse_recipe(data)).student.trainable > 0


def test_what_the_page_says_of_estimators_by_the_token_that_was_drawn():
    """k2 and k3 as losses, on the student's own samples, against the gradients that the page says they have."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_p = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_q = logits.log_softmax(-1)
    ratio = log_p - log_q
    drawn = log_q.exp().detach()

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    forward = gradient((log_p.exp() * ratio).sum())
    reverse = gradient(-(log_q.exp() * ratio).sum())
    torch.testing.assert_close(gradient((drawn * (ratio.exp() - ratio - 1)).sum()), forward)
    torch.testing.assert_close(gradient((drawn * 0.5 * ratio.square()).sum()), reverse)
    torch.testing.assert_close(gradient(-(drawn * ratio.detach() * log_q).sum()), reverse)
