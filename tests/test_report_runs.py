"""What the report shows of runs that were made: their curves and rollouts, and that every name in them is explained."""

from __future__ import annotations

import json

import pytest

from opd.api import execute
from opd.choice import choices_of
from opd.compatibility import Compatibility
from opd.drafting.record import saved
from opd.report import write_report
from opd.report.curves import PHASES
from opd.report.glossary import MEANINGS
from opd.report.layers import registered
from opd.report.page import page
from tests.conftest import save_tiny
from tests.drafters import LAYERS
from tests.reports import browser, data_of, unpack  # noqa: F401
from tests.test_draft_opd import recipe_for as recipe_of_a_drafter
from tests.test_prune import DRIFT
from tests.test_prune import run as run_pruned
from tests.uni import trained as run_uni


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The files of a run with drift weights, a window and a watch; two models that have nothing in common."""
    return run_pruned(
        tmp_path_factory.mktemp("pruned"),
        steps=3,
        shaping={"kind": "drift", **DRIFT},
        curriculum={"kind": "window", "minimum": 16, "maximum": 24},
        rollout={"max_new_tokens": 24, "segment": 4, "watch": {"kind": "drift", **DRIFT}},
        end_tokens=[89],
    ).directory


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The files of a run with margins, balancers and a gate; two untrained models that are right by chance."""
    found, *_ = run_uni(
        tmp_path_factory.mktemp("calibrated"),
        steps=3,
        curriculum={"kind": "difficulty", "responses": 3, "by": "side"},
        # Cut groups: what is shown is put together again.
        batch={"prompts": 3, "group": 6, "micro": 4},
    )
    return found.directory


def test_a_real_run_is_reported(tmp_path):
    from opd.api import execute
    from tests.conftest import save_tiny
    from tests.test_loop import recipe_for

    models = save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)
    run = execute(recipe_for(models, tmp_path, evaluation={"every": 2}), quiet=True).directory
    (one,) = data_of(page([run]))["runs"]
    assert one["series"]["train/loss"]["x"] == [1, 2, 3]
    assert one["series"]["held_out/forward_kl"]["x"] == [0, 2, 3]
    assert {"rollout", "teacher", "student", "loss", "backward", "update", "step"} <= one["phases"]["seconds"].keys()
    written = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {}
    for chunk in one["rows"]["held_out"]["chunks"]:
        keys = zip(chunk["index"]["step"], chunk["index"]["id"], strict=True)
        shown |= dict(zip(keys, unpack(chunk), strict=True))
    assert len(shown) == len(written) == 12
    for row in written:
        got = shown[row["step"], row["id"]]
        assert (got["prompt"], got["tokens"], got["values"]) == (row["prompt"], row["tokens"], row["values"])
        assert got["extra"]["alternatives"] == row["alternatives"]
    assert list(one["rows"]["training"]["chunks"][0]["ranges"]) == ["divergence", "weight"]


def test_every_name_that_a_run_logs_is_explained(tmp_path):
    from opd.api import execute
    from tests.conftest import save_tiny
    from tests.test_loop import TEXTS, recipe_for

    models = save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)
    recipe = recipe_for(
        models,
        tmp_path,
        steps=2,
        temperature=[[0, 1.0], [2, 0.8]],
        prompts={"prompts": [{"prompt": text, "answer": "1"} for text in TEXTS]},
        verifier={"kind": "exact_match", "pattern": "([0-9])"},
        objective=["reverse_kl", "grpo"],
        curriculum={"kind": "length_ladder", "lengths": [4, 8], "steps_per_rung": 1},
        evaluation={"k": 2, "greedy": True},
    )
    logged = {name for record in execute(recipe, quiet=True).history for name in record} - {"step"}
    assert {"train/curriculum/rung", "train/objective/grpo", "train/schedule/temperature"} <= logged
    assert {"held_out/pass_at_k", "held_out/greedy_accuracy"} <= logged
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    unknown = {n for n in logged if n not in MEANINGS and not n.startswith((*families, PHASES))}
    assert not unknown


def test_a_pruned_run_shows_signal_events_weights_and_where_rollouts_ended(pruned):
    (one,) = data_of(page([pruned]))["runs"]
    names = ("window", "hits", "effective_length")
    assert all(one["series"][f"train/curriculum/{name}"]["x"] == [1, 2, 3] for name in names)
    known = {layer["reads"]: layer for layer in registered()}
    rows = [row for chunk in one["rows"]["training"]["chunks"] for row in unpack(chunk)]
    assert {"overlap", "drifted", "reliable", "weight"} <= rows[0]["values"].keys()
    assert all(f"values.{name}" in known for name in rows[0]["values"])
    assert known["stopped"]["place"] == "row"
    for row in rows:
        assert row["extra"]["stopped"] == "drifted, 8 events"
        assert row["values"]["reliable"] == [1.0] * 4 + [0.0] * 4
        assert row["values"]["weight"][-1] == 0.5
    logged = {name for name in one["series"] if name.startswith("train/")}
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    assert {name for name in logged if name not in MEANINGS and not name.startswith((*families, PHASES))} == set()
    signals = [choice.measured for choice in choices_of(Compatibility).values()]
    assert all(f"train/{name}" in MEANINGS and f"values.{name}" in known for name in signals)


OF_DRAFTERS = ("acceptance length", "passes saved by a drafter", "proposals that stood, by slot")


def test_a_drafters_run_shows_its_blocks_and_which_slots_stood(tmp_path):
    target = save_tiny(tmp_path / "target", seed=1, layers=LAYERS, initializer_range=0.15)
    result = execute(recipe_of_a_drafter(target, tmp_path, steps=2), quiet=True)
    data = data_of(page([result.directory]))
    (one,) = data["runs"]
    length, passes, slots = (
        next(chart for chart in data["charts"] if chart["title"] == title) for title in OF_DRAFTERS
    )
    assert {line["reads"] for line in length["lines"]} - {"train/engine/acceptance_length"} <= one["series"].keys()
    assert passes["lines"][0]["reads"] == "train/passes_saved"
    assert {f"train/{name}" for name in saved(1, 2)} <= one["series"].keys() & MEANINGS.keys()
    assert all(f"{family}{k}" in one["series"] for family, _ in slots["families"] for k in range(1, 5))
    logged = {name for name in one["series"] if "accept" in name and "objective" not in name}
    assert all(name in MEANINGS or name.startswith(("train/accepted_at/", "held_out/accepted_at/")) for name in logged)
    known = {layer["reads"]: layer for layer in registered()}
    assert known["blocks"]["renderer"] == "blocks"
    for kind in ("training", "held_out"):
        rows = [row for chunk in one["rows"][kind]["chunks"] for row in unpack(chunk)]
        assert rows
        for row in rows:
            slots_of_row = [k for block in row["extra"]["blocks"] for k in range(1, block["proposals"] + 1)]
            assert row["values"]["slot"] == slots_of_row
            stood = [float(k < b["accepted"]) for b in row["extra"]["blocks"] for k in range(b["proposals"])]
            assert row["values"]["accepted"] == stood


def test_a_calibrated_run_shows_margins_balance_and_difficulty(calibrated):
    data = data_of(page([calibrated]))
    (one,) = data["runs"]
    for chart in data["charts"]:
        if chart["title"] in OF_DRAFTERS:
            continue
        if chart["kind"] == "bars":
            families = [family for family, _ in chart["families"]] + [chart["notes"]]
            assert all(f"{family}{tag}/{c}" in one["series"] for family in families for tag in "ab" for c in range(4))
        else:
            names = [name for line in chart["lines"] for name in (line["reads"], line["low"], line["high"]) if name]
            assert {name for name in names if name in one["series"]} == set(names), chart["title"]
            assert all(name in MEANINGS or name.startswith(tuple(MEANINGS)) for name in names)
    known = {layer["reads"]: layer for layer in registered()}
    (chunk,) = one["rows"]["training"]["chunks"]
    assert {"offset", "return", "group_margin", "inverted", "outcome_kept"} <= set(chunk["of_rows"])
    assert "divergence" not in chunk["of_rows"]
    rows = unpack(chunk)
    assert all(f"values.{name}" in known for name in rows[0]["values"])
    for step in (1, 2, 3):
        here = [i for i, found in enumerate(chunk["index"]["step"]) if found == step]
        assert len(here) == 4
        assert len({chunk["index"]["id"][i] for i in here}) == 1
        if any(rows[i]["values"]["offset"][0] for i in here):
            # Of a group that was moved both outcomes are there, however many of each it has.
            assert {chunk["index"]["reward"][i] for i in here} == {0.0, 1.0}
            assert all(rows[i]["extra"]["shaped"].startswith(("right, ", "wrong, ", "dropped by chance")) for i in here)
    logged = {name for name in one["series"] if name.startswith("train/")}
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    assert {name for name in logged if name not in MEANINGS and not name.startswith((*families, PHASES))} == set()


# ---- in a browser ----


@pytest.mark.slow
def test_in_a_browser_a_pruned_rollout_says_where_it_ended(browser, pruned, tmp_path):  # noqa: F811
    browser.open(write_report([pruned], tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('[data-mode=training]').click()")
    browser.until("document.querySelectorAll('.card details[open] p').length > 0")
    ended = "behind token 8: drifted, 8 events"
    assert browser.run("document.querySelector('.card details p').textContent") == ended
    browser.run(
        "(() => { const s = document.querySelector('#rollouts [data-control=colour]'); s.value = 'drifted';"
        "s.dispatchEvent(new Event('change')) })()"
    )
    browser.until("document.querySelector('.scale').innerText.includes('student and teacher part')")
    browser.point_at("document.querySelectorAll('.t')[2]")
    assert all(word in browser.panel() for word in ("overlap", "drift event", "reliable", "weight"))
    browser.run("document.getElementById('curves').scrollIntoView()")
    assert all(word in browser.run("document.getElementById('curves').innerText") for word in ("window", "hits"))
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_groups_say_what_was_moved_and_why(browser, calibrated, tmp_path):  # noqa: F811
    browser.open(write_report([calibrated], tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('[data-mode=groups]').click()")
    browser.until("document.querySelectorAll('.card .members').length > 0")
    head = browser.run("document.querySelector('.members thead').innerText")
    assert all(word in head for word in ("reward", "return", "offset", "what was done to it"))
    assert "divergence" not in head
    assert "margin" in browser.run("document.querySelector('.card .meta').innerText")
    offsets = browser.run(
        "[...document.querySelectorAll('.members')].map((table) => {"
        "const k = [...table.querySelectorAll('thead th')].findIndex((cell) => cell.textContent === 'offset');"
        "return Math.max(...[...table.querySelectorAll('tbody tr')].map((row) => Math.abs(Number(row.children[k]"
        ".textContent.replace('−', '-')))))})"
    )
    assert offsets == sorted(offsets, reverse=True)
    assert offsets[0] > 0
    words = browser.run("document.querySelector('.members .what').innerText")
    assert words.startswith("right, ")
    assert "nats a token" in words
    sides = "[...document.querySelector('.pair').children].map((side) => side.innerText)"
    right, wrong = browser.run(sides)
    assert "reward 1" in right
    assert "reward 0" not in right
    assert "reward 0" in wrong
    browser.point_at("document.querySelector('.pair .t')")
    assert all(word in browser.panel() for word in ("return", "offset", "margin after"))
    curves = browser.run("document.getElementById('curves').innerText")
    wanted = ("margins of prompts", "balancer keeps", "before training: a", "before training: b")
    assert all(title in curves for title in wanted)
    browser.run("document.querySelector('[aria-label^=\"prompts by right answers\"]').scrollIntoView()")
    browser.until("document.querySelectorAll('#curves .bars .point').length > 0")
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []
