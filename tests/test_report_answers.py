"""What the report shows first: the verdict and what differs, answers as text beside their tokens, what a teacher reads
and says itself; and what a reader can do with it: find, compare on one scale, smooth, save, switch colours."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re

import pytest

from benchmarks.browser import CHROMIUM
from opd.api import execute
from opd.measurement import LOOKED_AT, LOOKS, looks
from opd.report import write_report
from opd.report.card import facts
from opd.report.layers import ASSETS
from opd.report.page import collect, page
from tests.conftest import save_tiny
from tests.reports import ATTACK, browser, data_of, held_out_row, unpack, write_lines, write_run  # noqa: F401
from tests.test_loop import recipe_for

# ---- what a run leaves for it ----


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The files of a run whose teacher is another model that reads a column of its own."""
    folder = tmp_path_factory.mktemp("taught")
    models = save_tiny(folder / "student", seed=1), save_tiny(folder / "teacher", seed=2, vocabulary=72)
    texts = [f"{a}+{b}=" for a in range(3) for b in range(4)]
    return execute(
        recipe_for(
            models,
            folder,
            prompts={"prompts": [{"prompt": text, "hint": f"{text} hint"} for text in texts]},
            teacher={"model": models[1], "template": "plain", "sees": "hint"},
            evaluation={"every": 2, "samples": 2},
        ),
        quiet=True,
    ).directory


def test_the_teacher_is_asked_for_its_answers_once_and_counted(taught):
    rows, metrics = rows_of(taught, "samples.jsonl"), rows_of(taught, "metrics.jsonl")
    answered = [row for row in rows if "teacher_answer" in row]
    assert [row["step"] for row in answered] == [0, 0]
    counted = [record for record in metrics if "report/teacher_answers" in record]
    assert [record["step"] for record in counted] == [0]
    assert counted[0]["report/teacher_answers"] == 2
    assert counted[0]["report/teacher_tokens"] > 0
    assert "held_out/teacher_accuracy" not in counted[0]


def test_rows_say_once_what_the_teacher_reads_where_that_is_something_else(taught):
    rows = rows_of(taught, "samples.jsonl")
    assert {row["step"] for row in rows if "teacher_prompt" in row} == {0}
    assert all(row["teacher_prompt"] == f"{row['prompt']} hint" for row in rows if row["step"] == 0)
    assert all(row["teacher_prompt"] == f"{row['prompt']} hint" for row in rows_of(taught, "rollouts.jsonl"))


def test_training_rows_have_the_alternatives_of_both_sides_where_the_divergence_was_taken(taught):
    rows = rows_of(taught, "rollouts.jsonl")
    assert rows
    for row in rows:
        assert set(row["alternatives"]) == {"student", "teacher"}
        for side in row["alternatives"].values():
            assert len(side) == len(row["tokens"]) <= LOOKED_AT
            for ranked in side:
                chances = [chance for _, chance in ranked]
                assert chances == sorted(chances, reverse=True)
                assert 0 < sum(chances) <= 1.001
    # Before training the second model is the first one's teacher: both sides are as the first evaluation has them.
    sides = [row["alternatives"] for row in rows if row["step"] == 1]
    assert any(side["student"] != side["teacher"] for side in sides)


def test_alternatives_are_kept_of_so_many_steps_evenly():
    assert all(looks(step, LOOKS) for step in range(LOOKS))
    kept = [step for step in range(1000) if looks(step, 1000)]
    assert kept[0] == 0
    assert kept[-1] == 999
    assert LOOKS // 2 < len(kept) <= LOOKS + 1
    assert {b - a for a, b in itertools.pairwise(kept[:-1])} == {16}


def test_no_answer_is_asked_for_where_the_recipe_says_so(tmp_path):
    models = save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)
    recipe = recipe_for(models, tmp_path, steps=1, evaluation={"teacher_answers": False})
    run = execute(recipe, quiet=True).directory
    assert not any("teacher_answer" in row or "teacher_prompt" in row for row in rows_of(run, "samples.jsonl"))
    assert not any("report/teacher_answers" in record for record in rows_of(run, "metrics.jsonl"))


# ---- the card ----


def test_the_card_names_what_differs_of_a_real_run(taught):
    told = dict(data_of(page([taught]))["runs"][0]["facts"])
    assert "layers" in told["student"]
    assert "layers" in told["teacher"]
    assert "the teacher reads the column hint" in told["what differs"]
    assert told["steps"].startswith("3, each of")


def test_the_card_says_views_adapters_sizes_and_tokenizers_and_guesses_nothing():
    small, large = {"layers": 4, "width": 64, "parameters": 1_500_000}, {"layers": 8, "width": 64}
    recipe = {
        "student": {"model": "s", "drop_layers": [3, 4], "lora": {"rank": 8}},
        "teacher": [{"model": "t", "system": "be kind", "examples": [{}, {}], "tokenizer": "own"}],
        "prompts": [{"kind": "file", "path": "/home/somebody/questions.jsonl"}],
        "objective": [{"kind": "forward_kl"}],
        "rollout": {"kind": "student"},
        "steps": 20,
        "batch": {"prompts": 4, "group": 2},
        "evaluation": {"held_out": 6},
    }
    told = dict(facts(recipe, {"steps": 8, "seconds": 7300}, {"models": {"student": small, "teachers": [large]}}))
    assert told["student"] == "s (4 layers, width 64, 1.50 M parameters)"
    assert told["teacher"] == "t (8 layers, width 64)"
    for phrase in (
        *("layers 4 (student), 8 (teacher)", "2 layers were taken out", "LoRA, rank 8", "a system text"),
        *("2 examples before each prompt", "another tokenizer"),
    ):
        assert phrase in told["what differs"]
    assert "width" not in told["what differs"]
    assert told["data"] == "questions.jsonl; 6 prompts held out"
    assert told["objective"] == "forward_kl, on answers written by the student"
    assert told["steps"] == "8 of 20, each of 4 prompts, 2 answers each"
    assert told["time"] == "2.0 h"
    assert facts({}, {}, {}) == []
    folder = {"student": {"target": {"model": "/home/somebody/target"}}, "teacher": [{"model": "~/runs/large"}]}
    assert dict(facts(folder, {}, {})) == {"student": "a drafter of target", "teacher": "large"}
    odd = {"student": 3, "teacher": "t", "prompts": "p.jsonl", "evaluation": [], "batch": 7, "lora": 1}
    assert dict(facts(odd, {"privacy": 1, "prompt_tokens": 5}, {"models": {"teachers": 4}}))["teacher"] == "t"


def test_the_colours_of_the_switch_are_those_of_the_system():
    style = (ASSETS / "report.css").read_text()
    names = [
        re.findall(r"--[\w-]+: [^;]+", re.search(start + r"[^{]*\{(.*?)\}", style, re.S)[1])
        for start in (r":root:not\(\[data-theme=\"light\"\]\)", r":root\[data-theme=\"dark\"\]")
    ]
    assert names[0] == names[1] != []


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("start", [":root {", ':root[data-theme="dark"]'])
def test_texts_have_the_contrast_that_reading_needs(start):
    style = (ASSETS / "report.css").read_text()
    block = style[style.index(start) :].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [(text, on) for text in ("text", "quiet", "link", "good", "bad") for on in ("page", "raised", "sunken")]
    pairs += [(name, f"{name}-tint") for name in ("good", "bad", "mixed")]
    pairs += [(name, "sunken") for name in ("student", "teacher")]
    for text, on in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[on])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, on)


# ---- in a browser ----


def judged(folder, rate=1.0, steps=9):
    """A run with verdicts, whose last answers are right, with what the teacher reads and says."""
    run = write_run(folder, steps=steps, prompts=4, evaluations=2, update={"learning_rate": rate})
    told = {"teacher_prompt": [{"role": "system", "content": ATTACK}, {"role": "user", "content": "q"}]}
    rows = []
    for step in (0, steps):
        for i in range(4):
            row = held_out_row(step, i) | {"reward": float(step > 0 and i != 2)}
            row["completion"] = f"{ATTACK} answer {i}" if i == 0 else "".join(row["tokens"])
            row["values"]["reverse_kl"] = [rate * (1 + k) for k in range(6)]
            rows.append(row | (told | {"teacher_answer": f"own {i} {ATTACK}"} if step == 0 and i < 3 else {}))
    write_lines(run / "samples.jsonl", rows)
    metrics = [{"step": 0, "held_out/accuracy": 0.0, "held_out/reverse_kl": 2.0, "held_out/truncated": 0.1}]
    metrics[0]["held_out/top1_agreement"] = 0.0
    for step in range(1, steps + 1):
        loss = 2 / step + (step % 2)
        one = {"train/loss": loss, "train/divergence": loss, "train/tokens": 16 * loss, "train/fixed": 7.0}
        metrics.append({"step": step, **{name: rate * value for name, value in one.items()}})
    metrics.append({"step": steps, "held_out/accuracy": 0.75, "held_out/reverse_kl": 0.5, "held_out/truncated": 0.4})
    metrics[-1]["held_out/top1_agreement"] = 0.0
    write_lines(run / "metrics.jsonl", metrics)
    return run


def control(page, name, value, event="change"):
    page.run(
        f"(() => {{ const node = document.querySelector('[data-control=\"{name}\"]'); node.value = {json.dumps(value)};"
        f"node.dispatchEvent(new Event('{event}')) }})()"
    )


CARDS = "document.querySelectorAll('#rollouts .card').length"
TEXT = "document.querySelector('#rollouts .list').innerText"


@pytest.mark.slow
def test_in_a_browser_the_verdict_stands_first_and_answers_before_curves(browser, tmp_path):  # noqa: F811
    browser.open(write_report([judged(tmp_path / "one")], tmp_path / "page.html").as_uri())
    told = browser.run("document.querySelector('.verdict').innerText.replaceAll('\\u00a0', ' ')")
    assert told.startswith("better")
    assert "accuracy rose from 0 % to 75 %" in told
    assert "reverse KL fell from 2 to 0.5 nats a token" in told
    assert "Worse than before: truncated (10 % to 40 %)" in told
    assert "Measured on 4 prompts" in told
    tiles = browser.run("[...document.querySelectorAll('.tile')].map((one) => [one.className.trim(), one.innerText])")
    kinds = {text.splitlines()[0]: kind for kind, text in tiles}
    assert kinds["top-1 agreement"] == "tile"
    assert kinds["accuracy"] == "tile good"
    order = browser.run("[...document.querySelectorAll('main section:not([hidden])')].map((one) => one.id)")
    assert order == ["summary", "rollouts", "curves", "recipe", "environment"]

    assert browser.run("document.querySelectorAll('.answers .answer').length") == 7
    first = browser.run("document.querySelector('.card .answers').innerText")
    assert "answer 0" in first
    assert "own 0 </script>" in first
    assert "asked at step 0" in first
    assert "asked for its own answer to 3 of 4 prompts" in browser.run("document.querySelector('#rollouts').innerText")
    browser.run("document.querySelector('.read > summary').click()")
    assert "</script>" in browser.run("document.querySelector('.read').innerText")
    assert browser.run("window.attacked") is None
    assert browser.run("document.querySelectorAll('main img').length") == 0

    control(browser, "show", "text")
    browser.until("![...document.querySelectorAll('.tokens')].some((one) => one.offsetParent)")
    control(browser, "show", "tokens")
    browser.until("!document.querySelector('.answers')")

    for dark in (False, True):
        browser.colours(dark)
        for theme, wanted in (("light", "rgb(246, 247, 249)"), ("dark", "rgb(20, 23, 27)")):
            browser.run(f"document.querySelector('[data-theme-name={theme}]').click()")
            assert browser.run("getComputedStyle(document.body).backgroundColor") == wanted
            assert browser.run(f"document.querySelector('[data-theme-name={theme}]').ariaPressed") == "true"
    browser.run("document.querySelector('[data-theme-name=system]').click()")
    browser.until("getComputedStyle(document.body).backgroundColor === 'rgb(20, 23, 27)'")
    assert browser.problems == []
    assert len(browser.requests) == 1


@pytest.mark.slow
def test_in_a_browser_rollouts_are_found_by_text_verdict_and_step(browser, tmp_path):  # noqa: F811
    browser.open(write_report([judged(tmp_path / "one")], tmp_path / "page.html").as_uri())
    assert browser.run(CARDS) == 4
    control(browser, "verdict", "wrong")
    browser.until(f"{CARDS} === 1")
    assert "question 2" in browser.run(TEXT)
    control(browser, "verdict", "")
    browser.until(f"{CARDS} === 4")
    control(browser, "search", "QUESTION 3", "input")
    browser.until(f"{CARDS} === 1")
    assert "question 3" in browser.run(TEXT)
    assert "1 of 4 rollouts match" in browser.run("document.querySelector('#rollouts [role=status]').innerText")
    control(browser, "search", "nowhere", "input")
    browser.until(f"{CARDS} === 0 && {TEXT}.includes('No rollout matches')")
    browser.run("document.querySelector('#rollouts button.quiet').click()")
    browser.until(f"{CARDS} === 4")
    browser.run("document.querySelector('[data-mode=training]').click()")
    browser.until(f"{CARDS} === 9")
    control(browser, "first step", "3")
    control(browser, "last step", "4")
    browser.until(f"{CARDS} === 2")
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_runs_share_a_scale_or_have_their_own(browser, tmp_path):  # noqa: F811
    runs = [judged(tmp_path / "a"), judged(tmp_path / "b", rate=4.0)]
    browser.open(write_report(runs, tmp_path / "page.html").as_uri())
    last = "Number(document.querySelectorAll('#rollouts .card .t')[5].style.getPropertyValue('--strength'))"
    assert browser.run("document.querySelectorAll('.scale .ramp').length") == 1
    assert browser.run(last) == pytest.approx(0.5), "6 of 24 nats, and colour grows with the root"
    control(browser, "scale", "own")
    browser.until("document.querySelectorAll('.scale .ramp').length === 2")
    browser.until(f"{last} === 1")
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        inside = "[...document.querySelectorAll('table')].every((one) => one.closest('.scroll, .panel'))"
        assert browser.run(inside)
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_each_curve_is_drawn_once_smoothed_and_saved(browser, tmp_path):  # noqa: F811
    run = judged(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "train/=HYPERLINK()": 1.5}) + "\n")
    browser.open(write_report([run], tmp_path / "page.html").as_uri())
    titles = browser.run("[...document.querySelectorAll('#curves figure:not([hidden])')].map((one) => one.ariaLabel)")
    assert titles == ["loss", "phases"][: len(titles)]
    also = browser.run("document.querySelector('#curves figure').innerText")
    assert "also: value of the first objective; 16 × this is tokens" in also
    assert "fixed" in browser.run("document.querySelector('.still').innerText")
    assert "on top says it all" in browser.run("document.querySelector('#curves').innerText")

    browser.run("document.querySelector('#curves figure').scrollIntoView()")
    plot = "document.querySelector('#curves .plot').data"
    browser.until(f"{plot} && {plot}.length === 1")
    control(browser, "smoothing", "0.9", "input")
    browser.until(f"{plot}.length === 2")
    assert browser.run(f"{plot}[0].opacity") == 0.3
    rough, smooth = (browser.run(f"{plot}[{k}].y") for k in (0, 1))
    assert smooth[0] == pytest.approx(rough[0])
    assert smooth[1] == pytest.approx((0.9 * rough[0] + rough[1]) / 1.9)

    table = list(csv.DictReader(io.StringIO(browser.run("opd.card.csv()"))))
    assert [row["step"] for row in table] == [str(step) for step in range(10)]
    assert float(table[9]["held_out/accuracy"]) == 0.75
    assert table[0]["train/loss"] == ""
    assert float(table[2]["train/loss"]) == 1.0
    browser.run("Object.assign(opd.data.runs[0], { label: '=cmd' })")
    assert browser.run("opd.card.csv().split('\\n')[1]").startswith("'=cmd,0")
    saved = "HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href.slice(0, 5)] }"
    browser.run(f"{saved}; document.querySelector('[data-control=csv]').click()")
    assert browser.run("window.saved") == ["_cmd.csv", "blob:"]
    assert browser.problems == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
def test_the_pictures_of_the_docs_are_made_by_a_command(tmp_path, monkeypatch):
    from PIL import Image

    from benchmarks import screenshots

    run, site = judged(tmp_path / "one"), tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("<!doctype html><title>home</title><h1>home</h1>")
    words = ["screenshots", str(run), "--into", str(tmp_path / "shots"), "--site", str(site)]
    monkeypatch.setattr("sys.argv", words)
    screenshots.main()
    shots = {path.stem: Image.open(path).convert("RGB") for path in (tmp_path / "shots").glob("*.png")}
    assert set(shots) == {"token_view", "report_light", "report_dark", "report_phone", "docs_home"}
    assert shots["report_phone"].width == 780
    assert shots["report_light"].getpixel((2, 400)) == (246, 247, 249)
    assert shots["report_dark"].getpixel((2, 400)) == (20, 23, 27)
    assert all(path.stat().st_size < screenshots.LARGEST for path in (tmp_path / "shots").glob("*.png"))


def test_a_page_of_an_old_run_has_what_its_files_have(tmp_path):
    """Without sizes of models, views and answers of the teacher."""
    data = collect([write_run(tmp_path / "old")])
    (one,) = data["runs"]
    assert dict(one["facts"])["student"] == "s"
    assert one["taught"]
    (chunk,) = one["rows"]["held_out"]["chunks"]
    assert {row["teacher_answer"] for row in unpack(chunk)} == {None}
