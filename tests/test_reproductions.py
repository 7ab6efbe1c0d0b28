"""Reproductions: what counts as done, what a failure or a gate stops, and that verdicts follow from the values."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from opd.cli import main
from opd.errors import RecipeError, RunError
from opd.policies.held_out import by_prompt
from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage
from opd.reproductions.catalogue import find, shipped
from opd.reproductions.chart import ticks
from opd.reproductions.definition import COSTS
from opd.reproductions.fork_server import MODULES, ONE_THREAD, fork_server
from opd.reproductions.jobs import Job, graph
from opd.reproductions.page import BEGIN, END, pages, title, with_verdicts
from opd.reproductions.reproduce import reproduce
from opd.reproductions.results import judged, read, write
from opd.reproductions.runner import Worker
from opd.reproductions.training import filled
from opd.reproductions.verdicts import CONSTANT, CONVENTIONS, VERDICTS, tally
from tests.conftest import trajectories_of

ROOT = Path(__file__).parent.parent

TOY = '''
"""A toy: arms that only compute numbers, and stages that can be made to fail, die or wait from outside."""
import os, signal, time
from pathlib import Path
from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage

def made(folder, inputs, *, size):
    (folder / "data").write_text("x" * size)
    (folder / "half").write_text("unfinished")
    if Path("die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if Path("wait").exists():
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    return {"size": size}

def arm(folder, inputs, *, gain, seed):
    if Path(f"fail-{seed}").exists():
        raise ValueError("no luck today")
    score = len((inputs["data"] / "data").read_text()) + seed + gain
    costs = {"cpu_seconds": 1.5, "sampled_tokens": 10, "teacher_tokens": 20}
    curve = [{"step": step, **costs, "score": step * score} for step in (0, 1)]
    return {"score": score, **costs, "curve": curve, "items": {}}

reproduction = Reproduction(
    title="A toy", introduction="What is tested.", discussion="## Why\\n\\nIt adds up.",
    stages={"data": Stage(made, {"size": 5})},
    gates=[Gate("data", "size", at_least=5)],
    arms={"more": Stage(arm, {"gain": 2}, ["data"]), "less": Stage(arm, {"gain": 0}, ["data"])},
    seeds=[0, 1, 2],
    metrics=["score"],
    claims=[
        Claim("main", "More is more.", "score", "higher", "more", "less"),
        Claim("same", "More is the same.", "score", "higher", "more", "less", "equivalent", 1.0),
        Claim("large", "Also at a large size.", testable=False, note="No large machine."),
    ],
    smoke=Smoke(stages={"data": {"size": 1}}),
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the toy's file, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A file that a test writes twice within a second would be found compiled.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "reproductions").mkdir()
    path = tmp_path / "reproductions" / "toy_one.py"
    path.write_text(TOY)
    return path


def run(path, **options):
    return reproduce(find(str(path)), console=Console(quiet=True), **options)


def finished(path):
    return {file.parent.name: file.stat().st_mtime_ns for file in find(str(path)).cache.glob("*/job.json")}


def cli(*words):
    """Exit code, stdout and stderr of the real entry point in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "opd", "reproduce", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_second_call_runs_only_what_is_missing_and_writes_the_same(toy):
    code, out, err = cli(str(toy))
    assert code == 0, err
    assert "reproduced" in out
    entry = find(str(toy))
    before, results = finished(toy), entry.results.read_text()
    assert len(before) == 7
    assert run(toy).results is not None
    assert finished(toy) == before
    assert entry.results.read_text() == results
    toy.write_text(TOY.replace('"gain": 2', '"gain": 3'))
    assert run_anew(toy).results["arms"]["more"]["score"] == [8, 9, 10]
    after = finished(toy)
    assert before.items() <= after.items()
    assert len(after) == 10


def run_anew(path):
    sys.modules.pop(f"reproductions.{path.stem}", None)
    return run(path)


def test_a_key_depends_on_function_version_params_and_inputs_alone():
    def job(name="n", function="m:f", version=1, params=None, inputs=None):
        return Job(name, function, version, {"a": 1, "b": [0.1, "x"]} if params is None else params, inputs or {})

    # Written out: a change of the rule would make every finished job of every user look missing.
    assert job().key == "f-8d283cbaaade646b50e0"
    assert job(name="other", params={"b": [0.1, "x"], "a": 1}).key == job().key
    child = job(inputs={"data": job()}).key
    others = [
        job(function="m:g"),
        job(function="other:f"),
        job(version=2),
        job(params={"a": 2, "b": [0.1, "x"]}),
        job(params={}),
        job(inputs={"data": job()}),
        job(inputs={"data": job(version=2)}),
        job(inputs={"more": job()}),
    ]
    assert len({job().key, child, *(other.key for other in others)}) == len(others) + 1


def test_smoke_and_full_profiles_share_what_is_equal():
    def stages(**params):
        return {"data": Stage(os.path.join), "teacher": Stage(os.path.join, params, ["data"])}

    arms = {"a": Stage(os.path.join, {"recipe": {"steps": 9, "batch": {"prompts": 4}}}, ["teacher"])}
    smoke = Smoke(stages={"teacher": {"steps": 1}}, arms={"recipe": {"steps": 2}}, seeds=[7])
    claims = [Claim("main", "?", testable=False, note="a test")]
    full = Reproduction("", "", "", stages(steps=5), arms, [7, 8], [], claims, smoke=smoke)
    big, small = graph(full), graph(full.smoked())
    assert big.stages["data"][0].key == small.stages["data"][0].key
    assert big.stages["teacher"][0].key != small.stages["teacher"][0].key
    assert small.arms["a"][0].params == {"recipe": {"steps": 2, "batch": {"prompts": 4}}, "seed": 7}
    same = replace(full, smoke=Smoke(seeds=[8]))
    assert graph(same.smoked()).arms["a"][0].key == graph(same).arms["a"][1].key


def test_a_smoke_run_asks_nobody_for_a_figure_of_arms_that_it_leaves_out():
    arms = {name: Stage(os.path.join) for name in ("a", "b", "c")}
    claims = [
        Claim("main", "?", "score", method="a", baseline="b"),
        Claim("aside", "?", "rare", method="c", baseline="a"),
    ]
    full = Reproduction("", "", "", {}, arms, [7], ["score", "rare", "seen"], claims)
    small = full.smoked()
    assert list(small.arms) == ["a", "b"]
    assert list(small.metrics) == ["score", "seen"]


def test_stages_per_seed_are_taken_by_the_arm_of_the_same_seed():
    stages = {"init": Stage(os.path.join, per_seed=True), "data": Stage(os.path.join)}
    arms = {"a": Stage(os.path.join, {}, ["data", "init"])}
    claims = [Claim("main", "?", testable=False, note="a test")]
    made = graph(Reproduction("", "", "", stages, arms, [3, 4], [], claims))
    assert [job.inputs["init"].params["seed"] for job in made.arms["a"]] == [3, 4]
    assert made.arms["a"][0].inputs["data"] is made.arms["a"][1].inputs["data"]
    assert len(made.jobs()) == 5


def test_an_arm_of_fewer_seeds_is_compared_on_those(toy, tmp_path):
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


def test_a_killed_worker_leaves_nothing_that_counts_and_a_rerun_goes_on(toy, tmp_path):
    (tmp_path / "die").touch()
    done = run(toy)
    assert done.results is None
    assert "data: killed by SIGKILL" in done.problems[0]
    assert done.missing == ["data", *(f"{arm} (seed {seed})" for arm in ("more", "less") for seed in range(3))]
    (job,) = graph(find(str(toy)).reproduction).stages["data"]
    folder = find(str(toy)).cache / job.key
    assert (folder / "half").exists()
    assert finished(toy) == {}
    (tmp_path / "die").unlink()
    (folder / "stale").touch()
    assert run(toy).results is not None
    assert not (folder / "stale").exists()
    assert json.loads((folder / "job.json").read_text())["figures"] == {"size": 5}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda x: str(int(x))
)
def test_a_stopped_command_ends_its_workers(number, code, toy, tmp_path):
    (tmp_path / "wait").touch()
    command = subprocess.Popen([sys.executable, "-m", "opd", "reproduce", str(toy)], stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert command.poll() is None
            time.sleep(0.05)
        with pytest.raises(RunError, match="another process runs jobs"):
            run(toy)
        command.send_signal(number)
        assert command.wait(20) == code
    finally:
        command.kill()
    worker = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)
    assert finished(toy) == {}


def test_without_the_process_that_starts_them_jobs_end_and_the_command_says_so(toy, tmp_path):
    (tmp_path / "wait").touch()
    words = [sys.executable, "-m", "opd", "reproduce", str(toy)]
    command = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert command.poll() is None
            time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        assert server != command.pid
        os.kill(server, signal.SIGKILL)
        _, err = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 2
    assert "the process that starts jobs is gone: it was killed" in err
    assert not alive(worker)
    assert finished(toy) == {}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_job_stops_only_what_depends_on_it(toy, tmp_path):
    (tmp_path / "fail-1").touch()
    code, _, err = cli(str(toy))
    assert code == 1
    assert err.count("no luck today") == 2
    assert "missing: more (seed 1), less (seed 1)" in err
    assert "Traceback" not in err
    assert len(finished(toy)) == 5
    assert not find(str(toy)).results.exists()
    outputs = [file.read_text() for file in find(str(toy)).cache.glob("*/output.txt")]
    assert sorted("Traceback" in output for output in outputs) == [False] * 5 + [True] * 2
    (tmp_path / "fail-1").unlink()
    assert run(toy).results is not None


def test_a_closed_gate_lets_no_arm_run_and_keeps_earlier_results(toy):
    toy.write_text(TOY.replace("at_least=5", "at_least=6"))
    results = find(str(toy)).results
    results.parent.mkdir()
    results.write_text("earlier")
    code, _, err = cli(str(toy))
    assert code == 1
    assert "size of data is 5 and must be at least 6" in err
    assert [key.partition("-")[0] for key in finished(toy)] == ["made"]
    assert results.read_text() == "earlier"


BY_CLASS = {"right": {"one": 0.9, "two": 0.2}, "spread/a": 0.1, "spread/b": 0.4, "mean": 0.55}


@pytest.mark.parametrize(
    ("figure", "limit", "value", "name", "passes"),
    [
        # The mean of the classes, 0.55, would pass.
        ("right", {"at_least": 0.5}, 0.2, "two", False),
        ("right", {"at_least": 0.2}, 0.2, "two", True),
        ("right", {"at_most": 0.8}, 0.9, "one", False),
        ("spread", {"at_most": 0.3}, 0.4, "b", False),
        ("spread", {"at_least": 0.1}, 0.1, "a", True),
    ],
)
def test_a_gate_looks_at_the_worst_class(figure, limit, value, name, passes):
    gate = Gate("base", figure, **limit, worst=True)
    assert gate.measured("base", BY_CLASS) == (value, name)
    assert gate.passes(value) is passes


def test_a_class_without_a_number_is_the_worst():
    for limit in ({"at_least": 0.5}, {"at_most": 0.5}):
        gate = Gate("base", "x", **limit, worst=True)
        value, name = gate.measured("base", {"x": {"good": 0.5, "none": float("nan")}})
        assert (name, gate.passes(value)) == ("none", False)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate("base", "right", at_least=0.5), "no number 'right'; it is by class: set worst=True"),
        (Gate("base", "rihgt", at_least=0.5), "no number 'rihgt'; it returned right"),
        (Gate("base", "mean", at_least=0.5, worst=True), "no numbers of 'mean' by class"),
        (Gate("base", "empty", at_least=0.5, worst=True), "no numbers of 'empty' by class"),
    ],
)
def test_a_gate_on_a_figure_that_is_not_there_is_one_message(gate, message):
    with pytest.raises(RunError, match=message) as error:
        gate.measured("base", {**BY_CLASS, "empty": {}})
    assert len(str(error.value).splitlines()) == 1


def test_a_gate_on_the_worst_class_closes_and_is_recorded(toy):
    text = TOY.replace('return {"size": size}', 'return {"size": {"long": size, "short": 2}}')
    toy.write_text(text.replace("at_least=5", "at_least=3, worst=True"))
    code, _, err = cli(str(toy))
    assert code == 1
    assert "size of data is 2 at worst (short) and must be at least 3" in err
    assert [key.partition("-")[0] for key in finished(toy)] == ["made"]
    toy.write_text(toy.read_text().replace("at_least=3", "at_least=2"))
    results = run_anew(toy).results
    assert results["gates"] == [
        {"stage": "data", "figure": "size", "limit": "at least 2", "values": [2], "worst": ["short"], "passed": True}
    ]
    assert "size of data at worst at least 2, measured 2 (short)" in find(str(toy)).page.read_text()


def test_smoke_measures_gates_and_writes_elsewhere(toy):
    done = run(toy, smoke=True)
    entry = find(str(toy))
    assert done.results["gates"] == [
        {"stage": "data", "figure": "size", "limit": "at least 5", "values": [1], "passed": False}
    ]
    # The arms of the claims that stand in the appendix do not run.
    assert [(c["id"], c["ci95"], c["verdict"], c["note"]) for c in done.results["claims"]] == [
        ("main", None, "undecided", "one seed: no interval")
    ]
    assert read(entry.smoke_results) == done.results
    assert not entry.results.exists()
    assert not entry.page.exists()


def test_one_arm_alone_says_what_is_missing(toy):
    done = run(toy, arm="more")
    assert done.results is None
    assert done.problems == []
    assert done.missing == ["less (seed 0)", "less (seed 1)", "less (seed 2)"]
    assert run(toy, arm="less").results is not None


def test_results_hold_what_the_arms_returned_and_verdicts_follow_from_them(toy):
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


def test_the_page_says_what_the_results_say(toy, tmp_path):
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
    assert len(found) == 12
    index = (ROOT / "docs" / "reproductions" / "index.md").read_text(encoding="utf-8")
    assert with_verdicts(index, found) == index
    for name, title_, results in found:
        counts = tally(results["claims"])
        row = f"| [{title_}]({name}.md) | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |"
        assert row in index


def test_the_table_of_verdicts_goes_between_its_marks(toy):
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


def test_headline_claims_that_were_chosen_after_the_run_are_said_to_be(toy):
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


def test_curves_are_kept_under_the_names_that_they_have_on_validation(toy):
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


def test_json_keeps_any_text_and_puts_plain_lists_on_one_line(tmp_path):
    data = {"a": [1.0, 2.5], "b": [{"x": 'quote " bracket [ ] brace { }', "y": []}], "c": ["two\n lines", "ü"], "d": {}}
    write(data, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == data
    assert '"a": [1.0, 2.5]' in (tmp_path / "r.json").read_text()


CLAIM = Claim("main", "s", "m", "higher", "a", "b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Claim("main", "s", "m"), "needs metric, method and baseline"),
        (lambda: Claim("main", "s", testable=False), "say why in its note"),
        (lambda: replace(CLAIM, test="equivalent"), "margin above 0"),
        (lambda: Gate("data", "size"), "one of at_least and at_most"),
        (lambda: Stage(lambda folder, inputs: {}), "local or a lambda"),
        (lambda: Stage(os.path.join, {"x": {1}}), "not JSON"),
        (lambda: toy_with(stages={"a": Stage(os.path.join, inputs=["b"])}), "a takes the input 'b'"),
        (lambda: toy_with(gates=[Gate("daat", "x", at_most=1)]), r"did you mean 'data'\?"),
        (lambda: toy_with(smoke=Smoke(stages={"date": {}})), r"did you mean 'data'\?"),
        (lambda: toy_with(claims=[]), "exactly one claim with the id 'main'"),
        (
            lambda: toy_with(claims=[CLAIM, replace(CLAIM, id="x"), replace(CLAIM, id="x")]),
            "two claims have the id 'x'",
        ),
        (lambda: toy_with(headline=["main", "mian"]), r"headline names 'mian'.*did you mean 'main'"),
        (lambda: toy_with(headline=[]), "headline holds 'main' and each id once"),
        (lambda: toy_with(headline=["main", "main"]), "headline holds 'main' and each id once"),
        (lambda: with_headlines(9), "headline names 9 claims and may name 8"),
        (lambda: toy_with(claims=[replace(CLAIM, method="c")]), "compares 'c', which is not an arm"),
        (lambda: toy_with(claims=[replace(CLAIM, metric="n")]), "is about 'n'"),
        (lambda: toy_with(seeds=[1, 1]), "all different"),
        (
            lambda: toy_with(
                stages={"data": Stage(os.path.join, per_seed=True), "x": Stage(os.path.join, {}, ["data"])}
            ),
            "make it per_seed too",
        ),
        (lambda: Stage(os.path.join, seeds=0), "seeds of posixpath:join is 0"),
        (
            lambda: toy_with(stages={"data": Stage(os.path.join, per_seed=True, seeds=2)}),
            "arm a takes 'data', which runs with 2 seeds only; set seeds=2",
        ),
    ],
)
def test_a_wrong_file_is_one_message(make, message):
    with pytest.raises(RecipeError, match=message) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


def with_headlines(number):
    ids = ["main", *(f"claim {i}" for i in range(1, number))]
    return toy_with(claims=[replace(CLAIM, id=name) for name in ids], headline=ids)


def test_eight_headline_claims_are_accepted():
    assert len(with_headlines(8).headline) == 8


def toy_with(**changes):
    arm = Stage(os.path.join, {}, ["data"])
    fields = {
        "stages": {"data": Stage(os.path.join)},
        "arms": {"a": arm, "b": arm},
        "seeds": [0],
        "metrics": ["m"],
        "claims": [CLAIM],
    }
    return Reproduction("", "", "", **(fields | changes))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toyone"], "no reproduction 'toyone'"),
        (["reproductions/toy_one.py", "--arm", "mroe"], "no arm 'mroe' (did you mean 'more'?); arms: more, less"),
        (["reproductions/toy_one.py", "--page-only"], "run opd reproduce toy-one first"),
        (["reproductions/broken.py"], "broken.py:2: NameError: name 'x' is not defined"),
        (["reproductions/empty.py"], "defines no `reproduction`"),
    ],
)
def test_mistakes_on_the_command_line(words, message, toy, monkeypatch, capsys):
    toy.with_name("broken.py").write_text("import os\nx\n")
    toy.with_name("empty.py").touch()
    monkeypatch.setattr(sys, "argv", ["opd", "reproduce", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_a_file_that_changed_since_its_jobs_ran_is_named(toy):
    """They are found again by name, version, params and inputs, which is meant; but not in silence."""
    code, *said = cli(str(toy))
    assert code == 0, said
    assert "has changed since" not in "".join(said)
    toy.write_text(toy.read_text() + "\n# Another thought.\n")
    said = "".join(cli(str(toy))[1:])
    assert "reproductions.toy_one has changed since 7 finished jobs ran" in said
    assert "raise its version" in said


def test_the_list_shows_what_there_is_and_what_is_missing(toy, monkeypatch, capsys):
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


def test_a_figure_that_an_arm_does_not_return_is_named(toy):
    toy.write_text(TOY.replace('metrics=["score"]', 'metrics=["score", "scope"]'))
    with pytest.raises(RunError, match=r"more has no figure 'scope' \(did you mean 'score'\?\)"):
        run(toy)


def test_round_numbers_on_axes():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.31, 0.74) == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert ticks(0, 400) == [0, 100, 200, 300, 400]


def test_inputs_fill_a_recipes_texts():
    folders = {"teacher": Path("/t"), "data": Path("/d")}
    recipe = {"teacher": [{"model": "{teacher}/run", "n": 1}], "prompts": ["{data}/a", "{other}"], "x": None}
    assert filled(recipe, folders) == {
        "teacher": [{"model": "/t/run", "n": 1}],
        "prompts": ["/d/a", "{other}"],
        "x": None,
    }


def test_verdicts_of_a_prompt_are_averaged():
    rewards = torch.tensor([1.0, 0.0, float("nan"), float("nan"), 1.0, 1.0])
    measured = replace(trajectories_of([1, 2, 1, 1, 3, 1]), rewards=rewards, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert by_prompt(measured) == {"t0": 0.5, "t4": 1.0}
    assert by_prompt(trajectories_of([1])) == {}


DISTILLED = """
from opd.reproductions import Claim, Reproduction, Stage, train
from tests.conftest import save_tiny

def tiny(folder, inputs):
    save_tiny(folder / "student", seed=1)
    save_tiny(folder / "teacher", seed=2)
    return {}

def recipe(**changes):
    return {
        "steps": 2,
        "student": {"model": "{models}/student", "template": "plain"},
        "teacher": {"model": "{models}/teacher", "template": "plain"},
        "prompts": {"kind": "inline", "prompts": [{"prompt": f"{a}+1=", "answer": str(a)} for a in range(8)]},
        "rollout": {"max_new_tokens": 4},
        "verifier": "exact_match",
        "batch": {"prompts": 4, "group": 2},
        "evaluation": {"held_out": 3, "every": 1, "k": 2, "greedy": True},
        "update": {"learning_rate": 1e-2},
        "hardware": {"device": "cpu"},
        **changes,
    }

reproduction = Reproduction(
    title="Distilled", introduction="", discussion="",
    stages={"models": Stage(tiny)},
    arms={
        "long": Stage(train, {"recipe": recipe(steps=3)}, ["models"]),
        "short": Stage(train, {"recipe": recipe()}, ["models"]),
    },
    seeds=[0, 1],
    metrics=["reverse_kl", "accuracy"],
    claims=[Claim("main", "Longer is closer.", "reverse_kl", "lower", "long", "short")],
)
"""


STARTED = """
import os, random, sys
imported, threads = "torch" in sys.modules, len(os.listdir("/proc/self/task"))
from pathlib import Path
import numpy, torch
from opd.reproductions import Claim, Reproduction, Stage, train

def look(folder, inputs, *, seed):
    return {
        "imported": imported,
        "threads": threads,
        "parent": os.getppid(),
        "environment": [os.environ["OMP_NUM_THREADS"], torch.get_num_threads()],
        "python": random.random(),
        "numpy": float(numpy.random.rand()),
        "torch": float(torch.rand(())),
        "file": FILE,
    }

FILE = 1
claims = [Claim("main", "?", testable=False, note="a test")]
arms = {"look": Stage(look), "train": Stage(train, {"recipe": {}})}
reproduction = Reproduction("", "", "", {}, arms, [0, 1], [], claims)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_jobs_start_warm_and_each_with_its_own_random_state_and_file(toy):
    path = toy.with_name("started.py")
    path.write_text(STARTED)
    # The recipe is empty, so the ready-made job fails; that there is one makes the modules be imported.
    assert len(run(path, workers=1).problems) == 2
    jobs = graph(find(str(path)).reproduction).arms["look"]
    one, two = (job.figures(find(str(path)).cache) for job in jobs)
    # The job's own thread, and the one that watches its parent.
    assert [(f["imported"], f["threads"], f["environment"], f["file"]) for f in (one, two)] == [
        (True, 2, ["1", 1], 1)
    ] * 2
    assert one["parent"] == two["parent"] != os.getpid()
    for generator in ("python", "numpy", "torch"):
        assert one[generator] != two[generator]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_where_a_fork_is_not_safe_a_job_is_a_fresh_process(toy, tmp_path):
    (tmp_path / "calm.py").touch()
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
    )
    toy.with_name("seen.py").write_text(
        "import sys\nseen = sorted({'calm', 'threaded'} & sys.modules.keys())\n"
        "def look(folder, inputs):\n    return {'seen': seen}\n"
    )
    for modules, seen in ((["calm"], ["calm"]), (["calm", "threaded"], [])):
        job = Job("look", "reproductions.seen:look", len(modules), {}, {})
        worker = Worker(job, tmp_path, toy.parent)
        with (tmp_path / "lock").open("w") as lock, fork_server(tmp_path / "log", lock.fileno(), modules) as server:
            server.send(str(worker.folder))
            assert server.poll(60)
            assert server.recv() == (str(worker.folder), 0)
        assert job.figures(tmp_path) == {"seen": seen}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_what_jobs_import_lets_them_be_forked():
    code = (
        f"import os, importlib\nfor module in {MODULES!r}:\n    importlib.import_module(module)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["1"]


def figures_without_times(folder):
    figures = json.loads((folder / "job.json").read_text())["figures"]
    for point in figures["curve"]:
        del point["cpu_seconds"]
    return {name: value for name, value in figures.items() if "seconds" not in name}


def test_two_arms_and_two_seeds_of_real_training(toy):
    path = toy.with_name("distilled.py")
    path.write_text(DISTILLED)
    done = run(path)
    assert done.problems == []
    assert done.results is not None
    entry = find(str(path))
    for arm, steps in (("long", 3), ("short", 2)):
        cost = done.results["cost"][arm]
        for i, job in enumerate(graph(entry.reproduction).arms[arm]):
            folder = entry.cache / job.key
            figures = json.loads((folder / "job.json").read_text())["figures"]
            summary = json.loads((folder / "run" / "summary.json").read_text())
            assert figures["reverse_kl"] == summary["after"]["reverse_kl"]
            assert done.results["arms"][arm]["reverse_kl"][i] == pytest.approx(figures["reverse_kl"], rel=1e-5)
            assert [point["step"] for point in figures["curve"]] == list(range(steps + 1))
            assert figures["curve"][0]["sampled_tokens"] == 0
            # At most eight rollouts of four tokens a step, each scored by the one teacher.
            assert steps * 8 <= cost["sampled_tokens"][i] <= steps * 8 * 4
            assert cost["teacher_tokens"][i] == cost["sampled_tokens"][i]
            assert 0 < cost["cpu_seconds"][i] < 60
            for metric in ("accuracy", "greedy_accuracy"):
                rewards = figures["items"][metric]
                assert len(rewards) == 3
                assert sum(rewards.values()) / 3 == pytest.approx(figures[metric])
            assert (folder / "run" / "student" / "model.safetensors").exists()
    main_claim = done.results["claims"][0]
    assert main_claim["difference"] == pytest.approx(
        np.mean(main_claim["arms"]["short"]) - np.mean(main_claim["arms"]["long"])
    )
    assert main_claim["verdict"] in ("reproduced", "contradicted", "undecided")
    assert "reverse KL (nats a token)" in entry.page.read_text()
    # A job that was forked of a warm process has what a fresh one has, to the last bit.
    forked, weights = figures_without_times(folder), (folder / "run" / "student" / "model.safetensors").read_bytes()
    (folder / "job.json").unlink()
    shutil.rmtree(folder / "run")
    code = "import sys, pathlib; from opd.reproductions.worker import work; work(pathlib.Path(sys.argv[1]).resolve())"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=os.environ | ONE_THREAD)
    assert figures_without_times(folder) == forked
    assert (folder / "run" / "student" / "model.safetensors").read_bytes() == weights
