"""What results, pages, the index and the list say follows from the values that arms returned."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from opd.cli import main
from opd.errors import RecipeError, RunError
from opd.reproductions.catalogue import find, shipped
from opd.reproductions.chart import ticks
from opd.reproductions.definition import COSTS
from opd.reproductions.page import BEGIN, END, pages, title, with_verdicts
from opd.reproductions.results import judged, read, write
from opd.reproductions.verdicts import CONSTANT, CONVENTIONS, VERDICTS, tally
from tests.reproductions import ROOT, TOY, cli, finished, run, run_anew, toy  # noqa: F401


def test_results_hold_what_the_arms_returned_and_verdicts_follow_from_them(toy):  # noqa: F811
    results = run(toy).results
    assert results["arms"] == {"more": {"score": [7, 8, 9]}, "less": {"score": [5, 6, 7]}}
    assert results["cost"]["more"] == {
        "cpu_seconds": [1.5] * 3,
        "sampled_tokens": [10] * 3,
        "teacher_tokens": [20] * 3,
    }
    main_claim, same, large = results["claims"]
    assert main_claim == {
        "id": "main",
        "statement": "More is more.",
        "headline": True,
        "metric": "score",
        "better": "higher",
        "arms": {"more": [7, 8, 9], "less": [5, 6, 7]},
        "method": "more",
        "baseline": "less",
        "test": "better",
        "margin": 0.0,
        "seeds": 3,
        "difference": 2.0,
        "ci95": [2.0, 2.0],
        "ci90": [2.0, 2.0],
        "p": 0.0,
        "p_holm": 0.0,
        "seeds_to_decide": None,
        "verdict": "reproduced",
        "note": CONSTANT,
    }
    assert (same["verdict"], same["headline"], same["p_holm"]) == ("contradicted", False, None)
    # Whoever reads the file alone finds what the fields mean.
    assert {"difference", "ci95", "ci90", "p", "p_holm", "seeds_to_decide"} == results["conventions"].keys()
    assert "Positive favours the method" in results["conventions"]["difference"]
    assert (large["verdict"], large["note"], large["arms"]) == ("not testable here", "No large machine.", {})
    assert results["seeds"] == [0, 1, 2]
    assert "torch" in results["versions"]
    entry = find(str(toy))
    assert read(entry.results) == results
    assert '"score": [7.0, 8.0, 9.0]' in entry.results.read_text()


def test_an_arm_of_fewer_seeds_is_compared_on_those(toy, tmp_path):  # noqa: F811
    toy.write_text(
        TOY.replace('"less": Stage(arm, {"gain": 0}, ["data"])', '"less": Stage(arm, {"gain": 0}, ["data"], seeds=2)')
        .replace('return {"score": score, **costs', 'return {"score": score, **({"extra": 7} if gain else {}), **costs')
        .replace('metrics=["score"]', 'metrics=["extra", "score"]')
    )
    done = run(toy)
    assert len(finished(toy)) == 6
    assert done.results["arms"] == {"more": {"extra": [7, 7, 7], "score": [7, 8, 9]}, "less": {"score": [5, 6]}}
    # Of the first two seeds alone the difference is 2; of the means it would be 2.5.
    assert done.results["claims"][0]["difference"] == 2
    entry = find(str(toy))
    page = pages(entry.reproduction, done.results)["toy-one.md"]
    assert "more ran with all 3 seeds, the other arms with the first 2" in page
    assert "| less |  | 5.5 (5–6) |" in page
    # A claim about what an arm does not return is still an error.
    toy.write_text(toy.read_text().replace('"More is the same.", "score"', '"More is the same.", "extra"'))
    with pytest.raises(RunError, match="less has no figure 'extra'"):
        run_anew(toy)


def test_the_page_says_what_the_results_say(toy, tmp_path):  # noqa: F811
    run(toy)
    entry = find(str(toy))
    assert entry.page == tmp_path / "reproductions" / "toy-one" / "toy-one.md"
    text = entry.page.read_text()
    for wanted in (
        "# A toy",
        "Of 1 headline claims: 1 reproduced. They were declared before the run.",
        "| More is more. | score, higher is better | more: 8 (7–9) | less: 6 (5–7) | 3 | 2 | 2 to 2 | above 0 | 0 |",
        "| less: 6 (5–7) | 3 | 2 | 2 to 2 (90 %) | within ±1 | **contradicted** |",
        "so that positive favours the method",
        "| more | 8 (7–9) |",
        "| more | 1.5 | 10 | 20 |",
        "No large machine.",
        "It adds up.",
        "](toy-one.svg)",
        "size of data at least 5, measured 5",
        "opd reproduce toy-one",
    ):
        assert wanted in text
    curves = entry.page.with_suffix(".svg")
    drawn = ElementTree.fromstring(curves.read_text())
    assert len(drawn.findall(".//{*}polyline")) == 2 * 3 * 2
    headline, _, others = text.partition("## Appendix")
    assert "More is more." in headline
    assert "More is the same." not in headline
    assert "More is the same." in others
    entry.page.write_text("old")
    curves.unlink()
    stored = read(entry.results)
    write({**stored, "claims": [{**stored["claims"][0], "verdict": "old"}]}, entry.results)
    code, out, _ = cli(str(toy), "--page-only")
    assert (code, out.strip()) == (0, str(entry.page))
    assert entry.page.read_text() == text
    assert curves.exists()
    assert read(entry.results) == stored
    stored["arms"]["more"].pop("score")
    write(stored, entry.results)
    code, _, error = cli(str(toy), "--page-only")
    assert code == 2
    assert "has no 'score' of the arm 'more', which claim 'main' compares; run opd reproduce toy-one" in error


def committed():
    return [entry for entry in shipped().values() if entry.results.exists()]


@pytest.mark.parametrize("entry", committed(), ids=lambda entry: entry.name)
def test_committed_pages_and_verdicts_follow_from_committed_results(entry):
    results = read(entry.results)
    assert judged(entry.reproduction, results["arms"]) == results["claims"]
    assert results["conventions"] == CONVENTIONS
    made = pages(entry.reproduction, results)
    for name, text in made.items():
        assert (entry.page.parent / name).read_text(encoding="utf-8") == text
    # No figure without a curve of the page's metrics, and none that the page does not show.
    drawing = entry.page.with_suffix(".svg")
    assert drawing.exists() == (drawing.name in made)
    if drawing.exists():
        drawn = ElementTree.parse(drawing)
        shown = [text.text for text in drawn.iterfind(".//{*}text") if text.get("y") == "-8" and text.text]
        metrics = [metric for metric in entry.reproduction.metrics if metric not in COSTS]
        accepted = {title(metric) for metric in metrics}
        # Where a page has a test's metric, its curve is that on validation prompts.
        accepted |= {f"{title(metric.removeprefix('test_'))}, validation" for metric in metrics}
        assert shown
        assert set(shown) <= accepted
        lines = [line.get("points").split() for line in drawn.iterfind(".//{*}polyline")]
        assert lines
        assert all(len(points) > 1 for points in lines)
        assert len({point.split(",")[1] for points in lines for point in points}) > 2


def test_the_index_says_what_the_results_say():
    found = [(entry.name, entry.reproduction.title, read(entry.results)) for entry in committed()]
    assert len(found) == 13
    index = (ROOT / "docs" / "reproductions" / "index.md").read_text(encoding="utf-8")
    assert with_verdicts(index, found) == index
    for name, title_, results in found:
        counts = tally(results["claims"])
        row = f"| [{title_}]({name}.md) | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |"
        assert row in index


def test_the_table_of_verdicts_goes_between_its_marks(toy):  # noqa: F811
    run(toy)
    entry = find(str(toy))
    found = [("toy-one", "A toy", read(entry.results))]
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = with_verdicts(text, found)
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith(f"{END}\nafter\n")
    assert "| [A toy](toy-one.md) | 1 | 0 | 0 | 0 | reproduced |" in new
    assert with_verdicts(new, found) == new
    assert with_verdicts("no marks", found) == "no marks"


def test_headline_claims_that_were_chosen_after_the_run_are_said_to_be(toy):  # noqa: F811
    run(toy)
    entry = find(str(toy))
    assert read(entry.results)["headline_before"] == ["main"]
    toy.write_text(TOY.replace('metrics=["score"],', 'metrics=["score"], headline=["main", "same"],'))
    # The same jobs, whether the figures are judged again or collected again.
    for again in (run_anew, lambda path: cli(str(path), "--page-only")):
        again(toy)
        text = entry.page.read_text()
        assert "They were chosen after the run; declared before it were main." in text
        assert "Of 2 headline claims: 1 reproduced, 1 contradicted." in text
    # Results from before headline claims were declared at all.
    older = read(entry.results)
    del older["headline_before"]
    write(older, entry.results)
    assert cli(str(toy), "--page-only")[0] == 0
    assert "They were chosen after the run, from the 3 claims of this page." in entry.page.read_text()
    # New jobs are a new run, and these claims were there before it.
    toy.write_text(toy.read_text().replace('"gain": 2', '"gain": 3'))
    run_anew(toy)
    assert "They were declared before the run." in entry.page.read_text()


def test_curves_are_kept_under_the_names_that_they_have_on_validation(toy):  # noqa: F811
    text = TOY.replace('"score": score, **costs, "curve"', '"test_score": score, **costs, "curve"')
    toy.write_text(
        text.replace('metrics=["score"]', 'metrics=["test_score"]').replace('", "score", "', '", "test_score", "')
    )
    results = run(toy).results
    assert results["curves"]["more"][0] == {
        "step": [0, 1],
        "cpu_seconds": [1.5, 1.5],
        "sampled_tokens": [10, 10],
        "teacher_tokens": [20, 20],
        "score": [0, 7],
    }
    entry = find(str(toy))
    made = pages(entry.reproduction, results)
    assert "![Curves of score over steps and over CPU seconds" in made["toy-one.md"]
    assert "score, validation" in made["toy-one.svg"]
    # Where only steps and costs were kept there is nothing to draw, and the page says so.
    lost = {
        arm: [{k: v for k, v in one.items() if k != "score"} for one in seeds]
        for arm, seeds in results["curves"].items()
    }
    made = pages(entry.reproduction, {**results, "curves": lost})
    assert made.keys() == {"toy-one.md"}
    assert "The learning curves of this run were not kept" in made["toy-one.md"]
    assert "svg" not in made["toy-one.md"]
    # An arm without a line is not in the legend.
    made = pages(entry.reproduction, {**results, "curves": {**lost, "more": results["curves"]["more"]}})
    assert ">more</text>" in made["toy-one.svg"]
    assert ">less</text>" not in made["toy-one.svg"]


def test_round_numbers_on_axes():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.31, 0.74) == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert ticks(0, 400) == [0, 100, 200, 300, 400]


def test_json_keeps_any_text_and_puts_plain_lists_on_one_line(tmp_path):
    data = {"a": [1.0, 2.5], "b": [{"x": 'quote " bracket [ ] brace { }', "y": []}], "c": ["two\n lines", "ü"], "d": {}}
    write(data, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == data
    assert '"a": [1.0, 2.5]' in (tmp_path / "r.json").read_text()


def test_the_list_shows_what_there_is_and_what_is_missing(toy, monkeypatch, capsys):  # noqa: F811
    toy.with_name("shared_task.py").write_text("size = 5\n")
    toy.write_text(
        TOY.replace('"size": 5', '"size": size').replace(
            "import os,", "from reproductions.shared_task import size\nimport os,"
        )
    )
    monkeypatch.setattr("opd.reproductions.catalogue.reproduction_folder", lambda: toy.parent)
    run(toy, arm="more")

    def listing():
        monkeypatch.setattr(sys, "argv", ["opd", "reproduce"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    out = listing()
    assert "toy-one" in out
    assert "3 of 7" in out
    assert "not run yet" in out
    assert "shared" not in out
    run(toy)
    assert "main: reproduced" in listing()
    assert "1 reproduced" in listing()
    assert "earlier version" not in listing()
    # Results that an opd without headline claims wrote are listed, and can be judged again.
    stored = read(find("toy-one").results)
    older = {name: value for name, value in stored.items() if name not in ("conventions", "headline_before")}
    write({**older, "claims": [{"id": "main", "verdict": "not reproduced"}]}, find("toy-one").results)
    assert "--page-only judges them" in listing()
    monkeypatch.setattr(sys, "argv", ["opd", "reproduce", "toy-one", "--page-only"])
    with pytest.raises(SystemExit):
        main()
    capsys.readouterr()
    assert read(find("toy-one").results) == {**stored, "headline_before": None}
    toy.with_name("shared_task.py").write_text("size = 6\n")
    sys.modules.pop("reproductions.shared_task")
    sys.modules.pop("reproductions.toy_one")
    assert "7 of 7" in (out := listing())
    assert "earlier version" in out
    assert find("toy_one").file == toy
    assert find("toy_one").page == toy.parent.parent / "docs" / "reproductions" / "toy-one.md"
    with pytest.raises(
        RecipeError, match=r"did you mean 'toy-one'\?\); give a file that defines one, or one of: toy-one"
    ):
        find("toy-oen")
