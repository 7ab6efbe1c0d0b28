"""The report of focusing and of temporal grounding: the map of prompts, and intervals on a line with frames."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opd.pictures import data_address
from opd.report import write_report
from opd.report.maps import POINTS, maps
from opd.report.page import collect, updates
from tests.reports import browser, write_lines, write_run  # noqa: F401


def scored(count=40, rounds=2):
    rows = []
    for number in range(1, rounds + 1):
        for i in range(count):
            reliable = i % 4 > 0
            row = {"step": 3 * (number - 1), "round": number, "id": f"p{i}", "reliability": i / count}
            row |= {"student": i / count / 2 if reliable else None, "disagreement": i / count / 2 if reliable else None}
            rows.append({**row, "reliable": reliable, "drawn": reliable and i > count / 2})
    rows.append({"step": 0, "round": 1, "id": "none", "reliability": None, "reliable": False, "drawn": False})
    return rows


def test_a_map_has_a_point_for_each_prompt_and_counts_all(tmp_path):
    write_lines(tmp_path / "curriculum.jsonl", scored())
    first, second = maps(tmp_path / "curriculum.jsonl")
    assert (first["round"], first["judged"], first["reliable"], first["drawn"]) == (1, 40, 30, 15)
    assert second["round"] == 2
    assert first["group"][:6] == [0, 1, 1, 1, 0, 1]
    assert first["disagreement"][:2] == [None, 0.0125]
    assert maps(tmp_path / "none.jsonl") == []
    write_lines(tmp_path / "curriculum.jsonl", scored(2 * POINTS, 1))
    (large,) = maps(tmp_path / "curriculum.jsonl")
    assert len(large["reliability"]) == POINTS
    assert large["judged"] == 2 * POINTS


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", steps=9)
    write_lines(folder / "curriculum.jsonl", scored())
    rng = np.random.default_rng(0)
    frames = {"times": [0.0, 4.0, 8.0], "images": [data_address(rng.random((8, 8, 3))) for _ in range(3)]}
    rows = []
    for step, said in ((0, None), (9, [2.0, 5.0])):
        interval = {"true": [2.0, 6.0], "said": said, "teacher": [2.0, 6.5], "duration": 16.0}
        row = {"prompt": "when does <b>it</b> move?", "id": "a", "completion": "2 - 5", "tokens": ["2 -", " 5"]}
        rows.append({"step": step, **row, "values": {}, "interval": interval, "frames": frames})
    write_lines(folder / "samples.jsonl", rows)
    (folder / "rollouts.jsonl").unlink()
    return folder


def test_the_page_and_what_follows_it_hold_the_maps(run):
    data = collect([run])
    assert [one["round"] for one in data["runs"][0]["maps"]] == [1, 2]
    json.dumps(data, allow_nan=False)
    assert [one["drawn"] for one in updates(run, {"metrics": 0, "samples": 0, "rollouts": 0})["maps"]] == [15, 15]
    layers = {layer["reads"]: layer["renderer"] for layer in data["layers"]}
    assert layers["interval"] == "timeline"


@pytest.mark.slow
def test_in_a_browser_intervals_stand_on_a_line_with_frames_before_and_after(browser, run, tmp_path):  # noqa: F811
    browser.open(write_report([run], tmp_path / "page.html").as_uri())
    browser.until("document.querySelectorAll('#rollouts .timeline').length >= 1")
    browser.run(
        "[...document.querySelectorAll('#rollouts button, #rollouts [role=tab], #rollouts label')]"
        ".find((b) => b.innerText.trim() === 'Before and after').click()"
    )
    browser.until("document.querySelectorAll('#rollouts .timeline').length >= 2")
    bars = browser.run(
        "[...document.querySelectorAll('.timeline .interval span')].map((b) => [b.style.left, b.style.width])"
    )
    whole, after = [["12.5%", "25%"], ["12.5%", "28.13%"]], ["12.5%", "18.75%"]
    assert bars == [*whole, *whole, after]
    told = browser.run("document.querySelector('#rollouts').innerText")
    assert "no interval" in told
    assert "when does <b>it</b> move?" in told
    assert browser.run("document.querySelectorAll('.timeline .strip img').length") >= 6
    assert "round 2: 40 prompts, 30 of them reliable, 15 taken" in browser.run(
        "document.querySelector('#curves').innerText"
    )
