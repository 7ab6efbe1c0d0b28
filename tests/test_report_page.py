"""The report is one safe, self-contained page, of one run or several, whatever they say and whatever they lack."""

from __future__ import annotations

import base64
import re

import pytest

from opd.errors import RunError
from opd.report import write_report
from opd.report.page import LARGEST, differing_keys, labels, page
from tests.reports import ATTACK, browser, data_of, held_out_row, unpack, write_lines, write_run  # noqa: F401


def outside_data(text):
    """The page without its data and its scripts: what the HTML parser sees as markup."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_the_page_is_one_file_without_references_and_its_data_parses(tmp_path):
    run = write_run(tmp_path / "one")
    out = write_report([run], tmp_path / "deep" / "page.html")
    text = out.read_text(encoding="utf-8")
    assert len(text.encode()) < 10_000_000
    markup = outside_data(text)
    assert re.findall(r'\b(?:src|href|action)\s*=\s*(?!"#\w+")', markup) == []
    assert "http" not in markup.replace("http-equiv", "")
    assert "url(" not in markup
    assert "@import" not in markup
    assert text.count("plotly.js v") == 1
    data = data_of(text)
    (one,) = data["runs"]
    assert one["label"] == "one"
    assert one["series"]["held_out/reverse_kl"] == {"x": [0, 4], "y": [2.0, 1.0], "not_finite": 0}
    assert one["phases"]["seconds"]["rollout"] == [0.5] * 4
    assert one["rows"]["held_out"]["total"] == 6
    assert one["rows"]["training"]["total"] == 4
    assert one["environment"] == [["versions.torch", "2.6"], ["command", "opd train"]]
    assert one["finished"]
    assert ["time", "12 s"] in one["facts"]
    assert not data["live"]


def test_the_size_limit_leaves_room_for_the_page_itself():
    from plotly.offline import get_plotlyjs

    assert len(get_plotlyjs()) < LARGEST - 3_000_000


def test_only_the_scripts_of_the_page_may_run_and_nothing_may_be_fetched(tmp_path):
    import hashlib

    text = page([write_run(tmp_path / "one")])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    charts = re.search(r'<script type="text/plain" id="charts">(.*?)</script>', text, re.S)[1]
    own = re.findall(r"<script>(.*?)</script>", text, re.S)
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in [*own, charts]]
    assert re.findall(r"'sha256-([^']*)'", policy) == digests
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", "".join(own))


def test_what_a_run_says_stays_text(tmp_path):
    run = write_run(tmp_path / "<b>&one", name="n", description=ATTACK, nested={ATTACK: ATTACK})
    row = held_out_row(4, 0) | {
        "id": ATTACK,
        "prompt": ATTACK,
        "completion": ATTACK,
        "tokens": [ATTACK] * 6,
        "x": ATTACK,
    }
    row["values"][ATTACK] = [1.0] * 6
    write_lines(run / "samples.jsonl", [row])
    write_lines(run / "metrics.jsonl", [{"step": 0, f"held_out/{ATTACK}": 1.0}])
    text = page([run])
    assert text.count("<script") == text.count("</script>") == len(re.findall(r"^<script", text, re.M))
    assert "<img" not in outside_data(text)
    assert "<title>&lt;b&gt;&amp;one" in text
    assert "\u2028" not in re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    (one,) = data_of(text)["runs"]
    assert dict(one["facts"])["about"] == ATTACK
    (chunk,) = one["rows"]["held_out"]["chunks"]
    assert chunk["index"]["id"] == [ATTACK]
    assert unpack(chunk)[0]["tokens"] == [ATTACK] * 6
    assert unpack(chunk)[0]["extra"]["x"] == ATTACK


def test_several_runs_and_the_keys_in_which_they_differ(tmp_path):
    runs = [
        write_run(tmp_path / "a", update={"learning_rate": 1e-4}),
        write_run(tmp_path / "b", update={"learning_rate": 2e-4}, teacher=[{"model": "t", "weight": 2}]),
        write_run(tmp_path / "c", update=None),
    ]
    data = data_of(page(runs))
    assert [run["label"] for run in data["runs"]] == ["a", "b", "c"]
    found = {row["key"]: row["values"] for row in data["differences"]}
    assert found["name"] == ["a", "b", "c"]
    assert found["update.learning_rate"] == [1e-4, 2e-4, None]
    assert found["teacher.0.weight"] == [None, 2, None]
    assert "steps" not in found
    assert differing_keys([{"a": 1}]) == []


def test_labels_take_as_many_parents_as_tell_the_runs_apart(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert len(set(labels([tmp_path, tmp_path]))) == 2


def test_a_run_without_its_side_files_still_shows(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 1.0, "note": "text", "own/thing": 3}])
    (run / "recipe.yaml").write_text("- [broken")
    (run / "environment.json").write_text("{")
    data = data_of(page([run]))
    assert data["runs"][0]["series"].keys() == {"train/loss", "own/thing"}
    assert data["runs"][0]["recipe"] == ""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["does not exist", "opd train"]),
        (lambda path: path.write_text("x"), ["is a file", "opd train"]),
        (lambda path: path.mkdir(), ["no metrics", "opd train"]),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"st'))[0], ["no metrics", "opd train"]),
    ],
)
def test_errors_name_the_path_and_the_fix_in_one_line(make, words, tmp_path):
    make(tmp_path / "mine")
    with pytest.raises(RunError) as error:
        write_report([tmp_path / "mine"], tmp_path / "out.html")
    message = str(error.value)
    assert all(word in message for word in [str(tmp_path / "mine"), *words])
    assert "\n" not in message
    assert not (tmp_path / "out.html").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(RunError, match=f"cannot write the report to {tmp_path} .*--out"):
        write_report([run], tmp_path)
    with pytest.raises(RunError, match="at least one"):
        write_report([], tmp_path / "x.html")


# ---- in a browser ----


@pytest.mark.slow
def test_in_a_browser_hover_and_keyboard_reach_every_token(browser, tmp_path):  # noqa: F811
    runs = [write_run(tmp_path / "a", prompts=12), write_run(tmp_path / "b")]
    row = held_out_row(4, 0) | {
        "prompt": ATTACK,
        "tokens": [ATTACK, "\n", " x", "", "<|im_end|>", " y"],
        "own": [ATTACK],
    }
    row["values"]["own value"] = [-1.0, None, 1.0, 0.0, 0.5, 0.5]
    write_lines(runs[0] / "samples.jsonl", [held_out_row(0, 0), row, *(held_out_row(4, i) for i in range(1, 12))])
    browser.open(write_report(runs, tmp_path / "page.html").as_uri())
    assert browser.run("document.querySelectorAll('.card').length") == 10
    assert browser.run("window.attacked") is None
    assert browser.run("document.querySelectorAll('main img').length") == 0
    first = browser.run("document.querySelector('.tokens').innerText")
    assert "U+2028" in first
    assert "U+202E" in first
    assert "</script>" in first

    browser.point_at("document.querySelectorAll('.t')[2]")
    assert "token 3 of 6" in browser.panel()
    assert "·x" in browser.panel()
    assert f"{row['values']['reverse_kl'][2]:.4g}" in browser.panel()
    _, probability = row["alternatives"]["teacher"][2][0]
    assert f"{probability:.4f}" in browser.panel()

    browser.run("document.querySelector('.t').focus()")
    assert "token 1 of 6" in browser.panel()
    browser.press("ArrowRight")
    assert "token 2 of 6" in browser.panel()
    browser.press("End")
    assert "token 6 of 6" in browser.panel()
    browser.press("ArrowDown")
    assert "p1" in browser.panel()
    browser.press("ArrowUp")
    browser.press("Home")
    browser.press("ArrowLeft")
    assert "token 1 of 6" in browser.panel()
    browser.press("Tab")  # what no layer reads, below the tokens
    assert browser.run("document.activeElement.textContent") == "own"
    browser.press("Tab")
    assert "p1" in browser.panel()

    browser.run(
        "(() => { const s = document.querySelector('#rollouts [data-control=colour]'); s.value = 'own value';"
        "s.dispatchEvent(new Event('change')) })()"
    )
    browser.until("document.querySelector('.t').classList.contains('negative')")
    assert browser.run("document.querySelectorAll('.t')[1].classList.contains('unknown')")
    assert "both" in browser.run("document.querySelector('.scale .ramp').className")

    browser.run("document.querySelector('[aria-label=\"next page\"]').click()")
    browser.until("document.querySelectorAll('.card').length === 2")
    browser.run("document.querySelector('[data-mode=pairs]').click()")
    browser.until("document.querySelectorAll('.pair').length === 1")
    browser.run("document.querySelector('[data-mode=training]').click()")
    browser.until("document.querySelectorAll('.card').length === 4 && !document.querySelector('.pair')")

    browser.run("document.getElementById('curves').scrollIntoView()")
    browser.until("document.querySelectorAll('#curves .main-svg').length > 0")
    assert "Keys that differ" in browser.run("document.getElementById('recipe').innerText")
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []
    assert len(browser.requests) == 1


@pytest.mark.slow
def test_in_a_browser_two_thousand_rollouts_open_in_three_seconds(browser, tmp_path):  # noqa: F811
    run = write_run(tmp_path / "big", steps=400, prompts=200, tokens=32, evaluations=10)
    out = write_report([run], tmp_path / "page.html")
    assert out.stat().st_size < 10_000_000
    browser.open(out.as_uri())
    shown = browser.run("performance.getEntriesByName('opd rollouts shown')[0].startTime")
    browser.until("performance.getEntriesByName('opd charts ready').length > 0")
    charts = browser.run("performance.getEntriesByName('opd charts ready')[0].startTime")
    print(f"2,000 rollouts: {out.stat().st_size / 1e6:.2f} MB, shown in {shown:.0f} ms, with charts in {charts:.0f} ms")
    assert shown < 3000
    assert "200 rollouts" in browser.run("document.querySelector('.pager').innerText")
