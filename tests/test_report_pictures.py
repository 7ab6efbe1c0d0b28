"""Pictures in the report: rows that hold one, the grid before and after, and curves by step of the sampler."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from opd.choice import choices_of
from opd.drawings import Drawing
from opd.pictures import ADDRESS, data_address, png, sheet
from opd.report import write_report
from opd.report.page import collect, page
from opd.report.rows import encode, scan
from tests.reports import ATTACK, browser, data_of, unpack, write_lines, write_run  # noqa: F401

TASKS = choices_of(Drawing)
STEPS = 6


def picture_rows(steps=(0, 3, 9), size=14):
    """As an evaluation of pictures writes them: the later, the more like the drawing."""
    rng, rows = np.random.default_rng(0), []
    for step in steps:
        share = step / max(steps)
        for kind in ("count", "glyph"):
            for row in TASKS[kind](pixels=16).rows(size):
                shown = share * row["image"] / 255 + (1 - share) * rng.random((16, 16, 3))
                kept = {key: row[key] for key in ("id", "prompt", "task")}
                values = {"gaussian_kl": [round((1.1 - share) * (k + 1), 4) for k in range(STEPS)]}
                rows.append(
                    {"step": step, **kept, "completion": "", "reward": round(share, 4), "image": data_address(shown)}
                    | {"values": values}
                )
    return rows


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", steps=9)
    write_lines(folder / "samples.jsonl", picture_rows())
    (folder / "rollouts.jsonl").unlink()
    return folder


def test_a_picture_comes_back_from_its_address():
    picture = TASKS["scene"]().rows(1)[0]["image"]
    for given in (picture, picture / 255, picture / np.float32(255)):
        address = data_address(given)
        assert address.startswith(ADDRESS)
        back = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix(ADDRESS)))))
        assert np.array_equal(back, picture)
    wild = np.array([[[np.nan, -3.0, 7.0]]])
    assert np.asarray(Image.open(io.BytesIO(png(wild)))).tolist() == [[[0, 0, 255]]]


@pytest.mark.parametrize("scale", [1, 255])
def test_large_pictures_are_made_smaller(scale):
    halves = np.concatenate([np.zeros((100, 50, 3)), np.full((100, 50, 3), scale)], axis=1)
    given = halves.astype(np.uint8) if scale == 255 else halves
    address = data_address(given, largest=30)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix(ADDRESS)))))
    assert back.shape == (25, 25, 3)
    assert back[:, :12].max() == 0
    assert back[:, 13:].min() == 255


def test_a_sheet_has_rows_of_columns():
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), dtype=np.uint8)
    made = sheet(pictures, columns=2, scale=3, gap=1)
    assert made.shape == (27, 33, 3)
    assert (made[0, 0, 0], made[0, 20, 0], made[20, 0, 0], made[20, 20, 0]) == (0, 1, 2, 255)


def test_rows_of_pictures_come_back_with_steps_for_tokens(run):
    rows = picture_rows()
    chunks = encode(rows)
    back = [row for chunk in chunks for row in unpack(chunk)]
    assert [row["extra"]["image"] for row in back] == [row["image"] for row in rows]
    assert back[0]["tokens"] == ["1", "2", "3", "4", "5", "6"]
    assert back[0]["values"] == rows[0]["values"]
    assert [t for chunk in chunks for t in chunk["index"]["task"]] == [row["task"] for row in rows]
    assert "task" not in back[0]["extra"]
    assert all(all(chunk["index"]["image"]) for chunk in chunks)
    found = scan(run / "samples.jsonl")
    assert (len(found.entries), found.broken) == (84, 0)
    plain = encode([{"step": 1, "id": "a", "prompt": "p", "tokens": ["x"]}])[0]["index"]
    assert (plain["image"], plain["task"]) == ([False], [None])


def test_a_page_of_many_pictures_stays_below_its_limit(tmp_path, run):
    rng = np.random.default_rng(0)
    big = [row | {"image": data_address(rng.random((64, 64, 3)))} for row in picture_rows()]
    write_lines(run / "samples.jsonl", big)
    data = collect([run], budget=700_000)
    assert len(json.dumps(data)) < 750_000
    held_out = data["runs"][0]["rows"]["held_out"]
    assert held_out["total"] == 84
    assert 8 <= sum(len(chunk["index"]["id"]) for chunk in held_out["chunks"]) < 84


def test_the_page_holds_the_pictures_itself(run):
    text = page([run])
    (one,) = data_of(text)["runs"]
    assert one["rows"]["held_out"]["total"] == 84
    assert "img-src data:" in text


@pytest.mark.slow
def test_in_a_browser_pictures_of_a_prompt_stand_below_the_tokens(browser, run, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    seen = [data_address(rng.random((12, 16, 3))) for _ in range(2)]
    row = {"prompt": "what?", "id": "a", "completion": "hi", "tokens": ["h", "i"], "values": {}, "images": seen}
    write_lines(run / "samples.jsonl", [{"step": step, **row} for step in (0, 4)])
    browser.open(write_report([run], tmp_path / "page.html").as_uri())
    browser.until("document.querySelectorAll('#rollouts .pictures img').length >= 2")
    shown = "[...document.querySelectorAll('#rollouts .pictures img')]"
    browser.until(f"{shown}.every((i) => i.complete && i.naturalWidth === 16)")
    assert browser.run(f"{shown}.slice(0, 2).map((i) => i.src)") == seen
    assert browser.run(f"{shown}[1].alt") == "picture 2 of the prompt"


def choose(page, label, value):
    page.run(
        f"(() => {{ const s = [...document.querySelectorAll('#pictures label')].find((l) => l.innerText.startsWith("
        f"'{label}')).querySelector('select'); s.value = '{value}'; s.dispatchEvent(new Event('change')) }})()"
    )


CARDS = "document.querySelectorAll('.drawn').length"
WORDS = "document.querySelector('#pictures [role=status]').innerText"


@pytest.mark.slow
def test_in_a_browser_pictures_before_and_after(browser, run, tmp_path):  # noqa: F811
    browser.open(write_report([run], tmp_path / "page.html").as_uri())
    browser.until(f"{CARDS} === 24")
    browser.until("[...document.querySelectorAll('.drawn img')].every((i) => i.complete && i.naturalWidth === 16)")
    assert browser.run("document.querySelector('.drawn img').alt").endswith("step 0, reward 0")
    first = picture_rows()[0]["prompt"]
    assert browser.run("document.querySelector('.drawn p').innerText") == first
    assert browser.run(WORDS) == "count: mean reward 0 before, 1 after; glyph: mean reward 0 before, 1 after"
    browser.run("[...document.querySelectorAll('#pictures button')].pop().click()")
    browser.until(f"{CARDS} === 28")
    choose(browser, "task", "glyph")
    browser.until(f"{CARDS} === 14")
    assert browser.run("[...document.querySelectorAll('.drawn p')].every((p) => p.innerText.startsWith('text '))")
    choose(browser, "after", "3")
    browser.until(f"{WORDS} === 'glyph: mean reward 0 before, 0.3333 after'")

    assert browser.run("document.querySelector('.card .meta').innerText.includes('count')")
    assert browser.run("document.querySelectorAll('.card details[open] img').length") == 10

    browser.run("document.querySelector('#pictures .grid').scrollIntoView()")
    browser.until("document.querySelectorAll('#pictures .grid .main-svg').length > 0")
    curves = browser.run("document.querySelector('#pictures .grid').innerText")
    assert "reward of count" in curves
    assert "gaussian kl by step of the sampler" in curves
    described = browser.run("[...document.querySelectorAll('#pictures .described')].pop().textContent")
    assert described == "before: from 1.100 to 6.600; after: from 0.7667 to 4.600"

    browser.run("document.querySelector('#pictures label:not([hidden]) select').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.tagName") == "SELECT"
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.until("getComputedStyle(document.body).backgroundColor === 'rgb(20, 23, 27)'")
    assert browser.problems == []
    assert len([url for url in browser.requests if not url.startswith("data:")]) == 1


@pytest.mark.slow
def test_in_a_browser_what_is_no_picture_stays_text(browser, tmp_path):  # noqa: F811
    run = write_run(tmp_path / "run")
    rows = [
        {"step": step, "id": str(i), "prompt": ATTACK, "task": ATTACK, "image": image}
        for step in (0, 4)
        for i, image in enumerate([ATTACK, "data:text/html;base64,AAAA", "https://example.org/a.png"])
    ]
    write_lines(run / "samples.jsonl", rows)
    browser.open(write_report([run, write_run(tmp_path / "plain")], tmp_path / "page.html").as_uri())
    browser.until(f"{CARDS} === 3")
    assert browser.run("document.querySelectorAll('main img').length") == 0
    assert "example.org" in browser.run("document.querySelector('.pictures').innerText")
    assert browser.run("window.attacked") is None
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_a_run_without_pictures_has_no_such_section(browser, tmp_path):  # noqa: F811
    browser.open(write_report([write_run(tmp_path / "run")], tmp_path / "page.html").as_uri())
    assert browser.run("document.getElementById('pictures').hidden")
    assert not browser.run("document.querySelector('nav').innerText.includes('Pictures')")
    assert browser.problems == []
