"""`opd check`: does a recipe fit, how long does it take, what is unusual."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from opd.cli.main import app
from opd.plan import estimate as estimates
from opd.plan import make_plan
from opd.plan.estimate import CARDS, GIB, Device, Fit, estimate, seconds_of, time_text
from opd.plan.unusual import unusual
from opd.recipe import parse_recipe
from tests.conftest import save_tiny

DEVICE = Device("d", 8 * GIB, operations=1e9, reading=1e9, starting=0.0)


def recipe(path, **changes):
    data = {
        "student": {"model": path, "template": "plain"},
        "teacher": {"model": path, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": [f"{'abc'[i % 3]}{i}" for i in range(40)]},
        "evaluation": {"held_out": 2},
        "batch": {"prompts": 4, "group": 2, "micro": 8},
        "rollout": {"max_new_tokens": 10},
        "steps": 10,
        **changes,
    }
    return parse_recipe(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m") / "m")


def test_a_device_twice_as_quick_takes_half_as_long(path):
    read = recipe(path)
    plan = make_plan(read)
    once, twice = (seconds_of(plan, read, replace(DEVICE, operations=o, reading=o)) for o in (1e9, 2e9))
    assert set(once) == {"rollout", "teachers", "student forward and backward", "loss operator", "update"}
    assert all(once[part] == pytest.approx(2 * twice[part]) for part in once)


def test_tokens_are_drawn_at_the_pace_at_which_weights_are_read(path):
    """Where products cost nothing a rollout is its passes times what a pass reads."""
    read = recipe(path, rollout={"max_new_tokens": 10, "batch": 4})
    plan = make_plan(read)
    drawing = plan.drawing
    assert (drawing.passes, drawing.rows) == (2 * 10, 4)
    kept = 4 * (plan.prompt_tokens + 5) * plan.student.kv_bytes_per_token
    assert drawing.read == plan.student.weight_bytes + kept
    endless = replace(DEVICE, operations=float("inf"))
    assert seconds_of(plan, read, endless)["rollout"] == pytest.approx(20 * drawing.read / 1e9)
    layered = seconds_of(plan, read, replace(endless, starting=1.0))
    assert layered["rollout"] == pytest.approx(20 * (drawing.read / 1e9 + plan.student.layers))


def test_what_is_computed_again_takes_a_third_more(path):
    own, again = ({"model": path, "template": "plain", "gradient_checkpointing": on} for on in (False, True))
    took = [
        seconds_of(make_plan(read), read, DEVICE)["student forward and backward"]
        for read in (recipe(path, student=own), recipe(path, student=again))
    ]
    assert took[1] == pytest.approx(took[0] * 4 / 3)


def test_texts_that_are_written_already_are_not_drawn(path):
    rows = [{"prompt": f"a{i}", "response": "b"} for i in range(40)]
    read = recipe(path, rollout={"kind": "data"}, prompts={"kind": "inline", "prompts": rows})
    assert "rollout" not in seconds_of(make_plan(read), read, DEVICE)


@pytest.mark.parametrize(("peak", "verdict"), [(3, "fits"), (7, "tight"), (9, "does not fit")])
def test_verdicts(peak, verdict):
    fit = Fit(DEVICE, peak * GIB, {"rollout": 30.0}, 100)
    assert fit.verdict == verdict
    told = f"{verdict}: {peak}.00 GiB of 8.00 GiB"
    assert fit.told() == (told if verdict == "does not fit" else f"{told}; a step 30 s, the run 50 min")


def test_this_machine_is_measured_and_cards_stand_beside_it(path):
    read = recipe(path)
    found = estimate(read, make_plan(read))
    assert found.here.device.operations > 0
    assert found.here.device.reading > 0
    assert all(seconds > 0 for seconds in found.here.step.values())
    assert [fit.device for fit in found.cards] in ([], list(CARDS))
    on_cpu = recipe(path, hardware={"device": "cpu"})
    assert not estimate(on_cpu, make_plan(on_cpu)).cards


@pytest.fixture
def no_card(monkeypatch):
    """A machine without one, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_a_recipe_for_a_card_is_planned_where_there_is_none(path, no_card):
    """As for the card: the rows of cards are those of a recipe that leaves the device open, and nothing is measured."""
    named, free = recipe(path, hardware={"device": "cuda"}), recipe(path)
    found = estimate(named, make_plan(named))
    assert found.here is None
    assert found.as_dict()["here"] is None
    assert found.cards == estimate(free, make_plan(free)).cards
    assert [fit.device for fit in found.cards] == list(CARDS)
    ((_, rows),) = found.sections()
    assert [name for name, _ in rows] == [card.name for card in CARDS]
    assert found.notes == (
        "planned for a machine that has it, a run here is refused: hardware.device is 'cuda' and this machine has no "
        "CUDA device; use auto or cpu",
    )


def test_of_a_device_without_a_data_sheet_the_plan_alone_is_told(path, monkeypatch):
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    read = recipe(path, hardware={"device": "xpu"})
    found = estimate(read, make_plan(read))
    assert (found.here, found.cards, list(found.sections())) == (None, (), [])
    assert "hardware.device is 'xpu' and this machine has no XPU device" in found.notes[0]


def test_a_teacher_on_a_card_that_is_not_here_is_told(path, no_card):
    read = recipe(path, teacher={"model": path, "template": "plain", "device": "cuda:1"})
    found = estimate(read, make_plan(read))
    assert found.here is not None
    assert any("teacher.device is 'cuda:1' and this machine has no CUDA device" in note for note in found.notes)


def test_a_card_is_planned_as_a_card(path):
    """There rows are padded, nothing of Python lies in its memory, and the largest cards are the quickest."""
    read = recipe(path, hardware={"device": "auto"})
    there, here = make_plan(read, "cuda"), make_plan(read, "cpu")
    assert "Python and libraries" in here.memory
    assert "Python and libraries" not in there.memory
    steps = [sum(seconds_of(there, read, card).values()) for card in CARDS if card.name[:4] in ("A100", "H100", "H200")]
    assert steps == sorted(steps, reverse=True)


def test_what_does_not_fit_is_told_with_the_largest_part_and_what_helps(path, monkeypatch):
    read = recipe(path, batch={"prompts": 512, "micro": 512}, rollout={"max_new_tokens": 400})
    small = replace(DEVICE, memory=2**20)
    monkeypatch.setattr(estimates, "this_machine", lambda recipe, plan: small)
    (note,) = estimate(read, make_plan(read)).notes
    assert "this machine has 1.0 MiB" in note
    assert "largest part is" in note
    assert any(note.endswith(advice) for advice in [*estimates.LESS.values(), "lower batch.micro"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (12.3, "12 s"), (119, "119 s"), (150, "2.5 min"), (8e3, "2.2 h"), (1e6, "12 d")],
)
def test_seconds_as_a_person_says_them(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"update": {"learning_rate": 1e-2}}, "update.learning_rate reaches 0.01, where a model of"),
        ({"update": {"learning_rate": {"kind": "cosine", "start": 1e-2}}}, "update.learning_rate reaches 0.01"),
        ({"lora": 1e-5}, "update.learning_rate is at most 1e-05, where adapters usually take 1e-4"),
        ({"rollout": {"max_new_tokens": 4, "top_k": 1}}, "rollout.top_k is 1"),
        ({"steps": 1000}, "38 training prompts come 105 times each in 1000 steps of batch.prompts=4"),
    ],
)
def test_what_is_seldom_meant_is_said_and_nothing_else(changes, line, path):
    changes = dict(changes)
    if rate := changes.pop("lora", None):
        changes = {
            "student": {"model": path, "template": "plain", "lora": {"rank": 2}},
            "update": {"learning_rate": rate},
        }
    found = unusual(read := recipe(path, **changes), make_plan(read))
    assert len(found) == (line is not None), found
    assert line is None or found[0].startswith(line)


def test_the_command_says_all_of_it(path, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(recipe(path, steps=1000, hardware={"device": "cpu"}).model_dump_json())
    shown = CliRunner().invoke(app, ["check", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "this machine: cpu" in shown.output
    assert "unusual: 38 training prompts come 105 times each" in shown.output
    as_json = json.loads(CliRunner().invoke(app, ["check", str(file), "--json"]).output)
    assert as_json["estimate"]["here"]["verdict"] == "fits"
    assert as_json["estimate"]["here"]["seconds"] > 0
    assert len(as_json["unusual"]) == 1
