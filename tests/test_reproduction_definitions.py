"""What the file of a reproduction may define: gates, the smoke profile, and mistakes, each of which is one message."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from opd.cli import main
from opd.errors import RecipeError, RunError
from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage
from opd.reproductions.catalogue import find
from opd.reproductions.jobs import graph
from opd.reproductions.results import read
from tests.reproductions import TOY, cli, finished, run, run_anew, toy  # noqa: F401


def test_a_closed_gate_lets_no_arm_run_and_keeps_earlier_results(toy):  # noqa: F811
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


def test_a_gate_on_the_worst_class_closes_and_is_recorded(toy):  # noqa: F811
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


def test_smoke_measures_gates_and_writes_elsewhere(toy):  # noqa: F811
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


def test_a_figure_that_an_arm_does_not_return_is_named(toy):  # noqa: F811
    toy.write_text(TOY.replace('metrics=["score"]', 'metrics=["score", "scope"]'))
    with pytest.raises(RunError, match=r"more has no figure 'scope' \(did you mean 'score'\?\)"):
        run(toy)


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
def test_mistakes_on_the_command_line(words, message, toy, monkeypatch, capsys):  # noqa: F811
    toy.with_name("broken.py").write_text("import os\nx\n")
    toy.with_name("empty.py").touch()
    monkeypatch.setattr(sys, "argv", ["opd", "reproduce", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) <= 2
