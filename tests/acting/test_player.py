"""The report plays episodes: what a row holds of one, and what the page makes of it."""

from __future__ import annotations

import json

import pytest

from opd.api import execute
from tests.acting.tiny import episodes, recipe_of
from tests.reports import browser  # noqa: F401


def test_held_out_rows_hold_what_the_page_plays(policies, tmp_path):
    run = tmp_path / "run"
    evaluation = {"prompts": episodes(per_task=8, seed=1), "frames": True}
    execute(recipe_of(policies[0], run, teacher="scripted", steps=1, evaluation=evaluation), quiet=True)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 16
    first = rows[0]["episode"]
    assert (first["chunk"], first["dimensions"], first["steps"], first["success"]) == (4, 3, 16, False)
    assert len(first["frames"]) == 17, "the first picture, and one behind each step"
    assert first["frames"][0].startswith("data:image/png;base64,")
    assert len(first["expert"]) == len(rows[0]["tokens"]) == 48
    assert all(-1 <= value <= 1 for value in first["expert"])
    assert {"reverse_kl", "student_entropy"} <= rows[0]["values"].keys()
    assert [bool(row["episode"]["frames"]) for row in rows[:16]] == [True] * 12 + [False] * 4
    training = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert training[0]["episode"]["frames"] == []
    text = (run / "report.html").read_text()
    assert "opd.rowRenderers.episode" in text


@pytest.mark.slow
def test_in_a_browser_an_episode_plays(browser, policies, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    evaluation = {"prompts": episodes(per_task=1, seed=1), "frames": True}
    execute(recipe_of(policies[0], run, teacher="scripted", steps=1, evaluation=evaluation), quiet=True)
    browser.open((run / "report.html").as_uri())
    shown = "document.querySelector('.episode')"
    assert browser.run(f"{shown} !== null")
    words = f"{shown}.querySelector('[role=status]').textContent"
    assert browser.run(words).startswith("step 1 of 16, decision 1 of 4, ")
    first = browser.run(f"{shown}.querySelector('img').src")
    browser.run(f"(() => {{ const s = {shown}.querySelector('input'); s.value = s.max; s.oninput?.(); "
                "s.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert browser.run(words).startswith("step 16 of 16, decision 4 of 4, ")
    assert browser.run(f"{shown}.querySelector('img').src") != first
    assert browser.run(f"{shown}.querySelectorAll('tr').length") == 2
    assert browser.run(f"{shown}.querySelector('polyline').getAttribute('points').split(' ').length") == 4
